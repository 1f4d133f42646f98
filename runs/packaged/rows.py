"""Authored situations and requests -> cases: one request with its pictures, and what the rewriter should say of it.

The held-out share is taken by situation: all phrasings, pictures and twins of one situation fall on the same side.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DRAWN = ("typeset", "strip", "sign", "label", "chat", "document")


@dataclass(frozen=True)
class Case:
    situation: str
    where: str
    text: str
    risk: bool
    language: str = "en"
    category: str | None = None
    analysis: dict[str, str] | None = None
    prompt: str | None = None
    pictures: tuple[str, ...] = ()  # keys of `Album`: "photo NAME NUMBER" or "drawn JSON"
    turns: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def held(self) -> bool:
        return part(self.situation, 6) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def part(name: str, parts: int) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % parts


def load(folder: Path, called: dict[str, str], seed: int = 0, per_text: int = 2) -> list[Case]:
    """Every case of `data/situations` and `data/requests`; each text meets `per_text` of the pictures that fit it.

    `called`: what stands for {photo} in an analysis, by photo name, where that is not the label itself.
    """
    situations = [row for path in sorted((folder / "situations").glob("*.jsonl")) for row in lines(path)]
    # a generator a row, so that a new situation changes no picture of the others
    cases = [
        case for row in situations for case in _situation(row, random.Random(f"{seed} {row['id']}"), per_text, called)
    ]
    neutral = sorted(
        {
            text
            for row in situations
            if _kind(row.get("picture")) == "typeset" and row["language"] == "en"
            for text in row["texts"]
        }
    )
    cases += _requests(folder, neutral, seed)
    return cases


def captions(data: Path, authored: Path) -> dict[str, str]:
    """What stands for {photo} where a label would be a number: captions, in lower case."""
    called = {}
    for folder in ("coco_mini_open", "coco_mini_research"):
        for row in lines(data / folder / "captions.jsonl"):
            called["coco:" + Path(row["image"]).stem.lstrip("0")] = row["captions"][1].strip().rstrip(".").lower()
    for row in lines(authored / "photos/jailguard.jsonl"):
        called[f"jailguard:{row['id']}"] = row["caption"].rstrip(".").lower()
    return called


def ordinary(folder: Path, data: Path, cases: list[Case]) -> list[Case]:
    """Plain harmless requests: JailGuard's questions on its photos, the assistant's own, and every rewritten prompt by itself."""
    made = []
    for row in lines(data / "jailguard_benign/questions.jsonl"):
        key = f"photo jailguard:{row['id']} 0"
        made.append(
            Case(
                f"jailguard-{row['id']}",
                "benign",
                row["question"],
                False,
                pictures=(key,),
                tags=frozenset({"photo", "natural"}),
            )
        )
    for number, row in enumerate(lines(folder / "answers/photos.jsonl")):
        made.append(
            Case(
                f"answer-photo-{number}",
                "benign",
                row["question"],
                False,
                pictures=(f"photo {row['photo']} 0",),
                tags=frozenset({"photo", "natural"}),
            )
        )
    for number, row in enumerate(lines(folder / "answers/text.jsonl")):
        made.append(
            Case(
                f"answer-text-{number}",
                "benign",
                row["question"],
                False,
                tags=frozenset({"none", "natural"}),
            )
        )
    prompts = {case.prompt: case for case in cases if case.prompt}
    made += [
        Case(case.situation, "benign", prompt, False, case.language, tags=frozenset({"none", "rewritten"}))
        for prompt, case in prompts.items()
    ]
    return made


def _kind(picture: Any) -> str:
    one = picture[0] if isinstance(picture, list) and picture else picture
    if not one:
        return "none"
    return next((kind for kind in DRAWN if kind in one), "photo")


def _situation(row: dict[str, Any], rng: random.Random, per_text: int, called: dict[str, str]) -> Iterator[Case]:
    common = {"situation": row["id"], "language": row.get("language", "en"), "system": row.get("system")}
    parent = row.get("picture")
    turns = tuple((turn["role"], turn["text"]) for turn in row.get("turns", []))
    risky = row["where"] != "benign"
    tags = frozenset({_kind(parent)} | ({"turns"} if turns else set()))
    for text, pictures, names in _pairs(row["texts"], parent, rng, per_text):
        name = " and ".join(called.get(one, one.split(":")[1]) for one in names) or "the picture"
        filled = {key: value.replace("{photo}", name) for key, value in (row.get("analysis") or {}).items()}
        yield Case(
            where=row["where"],
            text=text,
            risk=risky,
            category=row.get("category") if risky else None,
            pictures=pictures,
            analysis=filled if risky else None,
            prompt=(row.get("prompt") or "").replace("{photo}", name) if risky else None,
            turns=turns,
            tags=tags,
            **common,
        )
    for twin in row.get("twins", []):
        picture = twin.get("picture", parent)
        own = tuple((turn["role"], turn["text"]) for turn in twin["turns"]) if "turns" in twin else turns
        same = bool(set(twin["texts"]) & set(row["texts"]))
        for text, pictures, _ in _pairs(twin["texts"], picture, rng, per_text):
            yield Case(
                where=row["where"],
                text=text,
                risk=False,
                pictures=pictures,
                turns=own,
                tags=frozenset({_kind(picture), "twin", "same words" if same else "other words"}),
                **common,
            )


def _pairs(
    texts: list[str], picture: Any, rng: random.Random, per_text: int
) -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """(text, picture keys, names of the photos): every photo and every text comes up."""
    specs = [spec for spec in (picture if isinstance(picture, list) else [picture]) if spec]
    most = max([len(spec.get("photos", [])) for spec in specs if not any(kind in spec for kind in DRAWN)] or [1])
    count = max(len(texts), min(most, len(texts) * per_text))
    start = rng.randrange(97)
    for index in range(count):
        keys, names = [], []
        for spec in specs:
            photos = spec.get("photos") or []
            name = photos[(start + index) % len(photos)] if photos else ""
            if any(kind in spec for kind in DRAWN):
                drawn = {**{kind: spec[kind] for kind in DRAWN if kind in spec}, "seed": rng.randrange(10**6)}
                keys.append("drawn " + json.dumps({**drawn, "photo": name} if name else drawn, ensure_ascii=False))
            else:
                keys.append(f"photo {name} {rng.randrange(20)}")
                names.append(name)
        yield texts[index % len(texts)], tuple(keys), names


def _requests(folder: Path, neutral: list[str], seed: int) -> Iterator[Case]:
    for path in sorted((folder / "requests").glob("*.jsonl")):
        for number, row in enumerate(lines(path)):
            rng = random.Random(f"{seed} {path.stem} {number}")
            common = {
                "situation": f"request-{path.stem}-{number // 2}",
                "risk": row["risk"],
                "category": row.get("category"),
                "language": row.get("language", "en"),
            }
            if "text" in row:
                yield Case(
                    where="text" if row["risk"] else "benign", text=row["text"], tags=frozenset({"none"}), **common
                )
                continue
            for text in rng.sample(neutral, 2):
                yield Case(
                    where="picture" if row["risk"] else "benign",
                    text=text,
                    pictures=(_title(row["title"], rng),),
                    tags=frozenset({"typeset", "title"}),
                    **common,
                )


def _title(title: str, rng: random.Random) -> str:
    """A title as a list to be filled in, or as a strip, sometimes below a photo."""
    spec: dict[str, Any] = {"seed": rng.randrange(10**6)}
    if rng.random() < 0.55:
        marks = rng.choice([["1.", "2.", "3."], ["1.", "2.", "3."], ["-", "-", "-"], ["1)", "2)", "3)"], []])
        spec["typeset"] = [title, *marks]
    else:
        spec["strip"] = re.sub(r"[.:]$", "", title) if rng.random() < 0.5 else title
        if rng.random() < 0.5:
            spec["photo"] = "any"
    return "drawn " + json.dumps(spec, ensure_ascii=False)
