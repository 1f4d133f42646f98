"""The rows that a rewriter learns from: our own datasets, and the `messages + images` files of ms-swift and LLaMA-Factory.

    read(path) -> Rows          a dataset's folder, its dataset.jsonl, or a messages file
    write_messages(rows, path)  what other trainers read

A row that cannot be used is dropped with its reason, and the reasons are counted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlmguard.chat import Chat
from vlmguard.errors import BadRequest, ConfigError, RewriteUnreadable
from vlmguard.rewriter.protocol import INSTRUCTIONS, parse_output, render_input
from vlmguard.strict_json import parse_json
from vlmguard.synthesis.sample import Row

PICTURE_MARK: Final = "<image>"  # where a messages file has a picture in a text
HELD_PARTS: Final = 1000
MOST_RELATED: Final = 8  # rows about one picture


@dataclass
class Rows:
    """
    Args:
        images: the folder that the rows' pictures are seen from.
        dropped: reasons, and how many rows each cost.
        sha256: of the file.
    """

    rows: list[Row]
    images: Path
    sha256: str
    dropped: Counter[str] = field(default_factory=Counter)

    def chat(self, row: Row) -> Chat:
        """The request that a row is about. Raises ImageUnreadable."""
        return Chat.of(row.prompt, [self.images / one["path"] for one in row.images], turns=row.history)

    def split(self, share: float) -> tuple[list[Row], list[Row]]:
        """(to learn from, held out), by a hash: the same for every run, whatever else is in the file.

        Rows with the same first picture fall on one side, else what is held out would be half known; a row without one
        goes by its id, and so does one whose picture is everywhere, such as a blank one.
        """
        families = [_family(row) for row in self.rows]
        counts = Counter(families)
        held = [
            _part(row.id if counts[name] > MOST_RELATED else name) < share * HELD_PARTS
            for row, name in zip(self.rows, families, strict=True)
        ]
        learn = [row for row, out in zip(self.rows, held, strict=True) if not out]
        return learn, [row for row, out in zip(self.rows, held, strict=True) if out]


def _family(row: Row) -> str:
    first = row.images[0] if row.images else {}
    return first.get("sha256") or first.get("path") or row.id


def _part(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_PARTS


def read(data: Path, images: Path | None = None) -> Rows:
    """Reads a dataset.

    Args:
        images: in place of the dataset's own folder.

    Raises:
        ConfigError: it is missing, or holds no row that can be used.
    """
    path = data / "dataset.jsonl" if data.is_dir() else data
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Give a dataset's folder or file.") from None
    found = Rows([], images or path.parent, hashlib.sha256(content).hexdigest())
    known: dict[tuple[str, str], str | None] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, problem = _row(line, number)
        problem = problem or (_picture_problem(row, found.images, known) if row else None)
        if problem is None and row is not None:
            found.rows.append(row)
        else:
            found.dropped[problem or "it is none"] += 1
    if not found.rows:
        why = ", ".join(f"{count} since {reason}" for reason, count in found.dropped.most_common(3))
        raise ConfigError(f"{path} has no row that can be used{': ' + why if why else ''}", "Check it, and --images.")
    return found


def _row(line: bytes, number: int) -> tuple[Row | None, str | None]:
    try:
        told = parse_json(line)
        if not isinstance(told, dict):
            return None, "it is no JSON object"
        row = _of_messages(told, number) if "messages" in told else Row.of(told)
        if problem := _shape_problem(row):
            return None, problem
        Chat.of(row.prompt, turns=row.history)
        parse_output(row.output)
    except BadRequest as error:
        return None, error.message
    except RewriteUnreadable:
        return None, "its output is not in the rewriter's format"
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return None, f"it is no row: {type(error).__name__}"
    return row, None


def _shape_problem(row: Any) -> str | None:
    if not isinstance(row.id, str) or not row.id:
        return "its id is no text"
    if not isinstance(row.prompt, str) or not isinstance(row.output, str):
        return "prompt and output are no texts"
    for one in row.images:
        if not isinstance(one, Mapping) or not isinstance(one.get("path"), str) or not one["path"]:
            return "its images are not objects with a path"
        if not isinstance(one.get("sha256") or "", str):
            return "a picture's sha256 is no text"
    if not isinstance(row.origin, Mapping):
        return "its origin is no object"
    return None


def _picture_problem(row: Row, folder: Path, known: dict[tuple[str, str], str | None]) -> str | None:
    for one in row.images:
        path, expected = one["path"], one.get("sha256") or ""
        if (path, expected) not in known:
            known[path, expected] = _problem_of(folder / path, expected)
        if problem := known[path, expected]:
            return problem
    return None


def _problem_of(path: Path, expected: str) -> str | None:
    try:
        data = path.read_bytes()
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return "a picture of it is missing"
    if expected and hashlib.sha256(data).hexdigest() != expected:
        return "a picture of it is another one than its hash says"
    return None


# messages + images


def to_messages(row: Row, *, instructed: bool = False) -> dict[str, Any]:
    """A row as ms-swift and LLaMA-Factory take it: what the guard asks the rewriter, its output, pictures by path.

    What they train on it is what `load.rewriter` serves. The row itself stays beside it under "vlmguard", as text: those
    trainers pass it over, and a column of text has one type.
    """
    asked = render_input(Chat.of(row.prompt, turns=row.history), whole=True)
    system = [{"role": "system", "content": INSTRUCTIONS}] if instructed else []
    return {
        "messages": [
            *system,
            {"role": "user", "content": PICTURE_MARK * len(row.images) + asked},
            {"role": "assistant", "content": row.output},
        ],
        "images": [one["path"] for one in row.images],
        "vlmguard": json.dumps(row.fields(), ensure_ascii=False),
    }


def write_messages(rows: Iterable[Row], path: Path, *, instructed: bool = False) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(to_messages(row, instructed=instructed), ensure_ascii=False) + "\n")


_ASKED: Final = re.compile(r'(?:.*\n)?Request: "(?:[^"\\]|\\.)*"', re.DOTALL)  # what `render_input` writes


def _of_messages(told: Mapping[str, Any], number: int) -> Row:
    if own := told.get("vlmguard"):
        return Row.of(json.loads(own))
    *turns, request, output = told["messages"]
    if (request["role"], output["role"]) != ("user", "assistant"):
        raise BadRequest("its last messages are not a request and an output")
    if turns and turns[0]["role"] == "system" and _text(turns[0]) == INSTRUCTIONS:
        turns = turns[1:]
    said = "".join(map(_text, (*turns, request)))
    images = [one if isinstance(one, Mapping) else {"path": one} for one in told.get("images") or ()]
    if said.count(PICTURE_MARK) not in (0, len(images)):
        raise BadRequest(f"it has another number of pictures than of {PICTURE_MARK}")
    prompt = _text(request).replace(PICTURE_MARK, "")
    if _ASKED.fullmatch(prompt.strip()):
        raise BadRequest("it was written for other trainers, and its vlmguard field is missing")
    history = tuple({"role": turn["role"], "content": _text(turn).replace(PICTURE_MARK, "")} for turn in turns)
    written = _text(output)
    kind = "helpfulness" if written.strip() == "safe" else "safety"
    return Row(f"line-{number}", tuple(images), prompt, written, kind, {}, history)


def _text(turn: Mapping[str, Any]) -> str:
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
