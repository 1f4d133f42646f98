"""MIS (arXiv 2501.18533): Tuwhy/MIS_Train on the hub; two pictures or more that are risky together.

Layout: mis_train.json, an array of {image: [PATH, ...], conversations: [{from: human, value}, {from: gpt, value}]}, paths
seen from its folder; of the test sets mis_easy.json, mis_hard.json and mis_real.json, of {question, image_path1,
image_path2}. Here their splits are train, easy, hard and real; the test sets are on the hub under another name, so give a
local copy of them. The test sets are known from the authors' code, the training set from other people's notes and readers
(3,927 rows). Not known: how the hub packs the pictures, and the licence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from vlmguard.errors import BadRequest
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Answer, Origin, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Read, Source, Wanted, text
from vlmguard.synthesis.sources.tables import Table

HUB: Final = "Tuwhy/MIS_Train"
LICENCE: Final = "unknown"
ROLES: Final = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
MARK: Final = re.compile(r"(?:Image-\d+:\s*)?<image>\s*")  # where a picture stands in a text
PATHS: Final = tuple(f"image_path{number}" for number in range(1, 10))
OPTIONAL: Final = ("images", "image", "conversations", "question", *PATHS)


def mis(wanted: Wanted) -> Source:
    """The conversation's last question; the answer to it is the safe one. Earlier turns are its history."""
    table = Table.of(wanted, HUB, ".json", ".jsonl", ".parquet", prefix="mis_")

    def read(origin: Origin) -> Read:
        def made(row: str, fields: Fields, pictures: Pictures) -> Read:
            found = tuple(pictures.of(one, f"{row}.{number}") for number, one in enumerate(_held(fields)))
            history, prompt, safe = _said(fields)
            yield Sample(row, found, prompt, replace(origin, row=row), safe, history=history)

        return table.read(made, optional=OPTIONAL)

    return table.source(LICENCE, read)


def _held(fields: Fields) -> list[Any]:
    held = fields.get("images") or fields.get("image")
    if held is None:
        held = [fields[name] for name in PATHS if fields.get(name) is not None]
    held = held if isinstance(held, list) else [held]
    if not held:
        raise BadRequest("it has no pictures")
    return held


def _said(fields: Fields) -> tuple[tuple[Mapping[str, Any], ...], str, Answer | None]:
    """Earlier turns, the question, and the answer to it. Raises BadRequest."""
    told = fields.get("conversations")
    if told is None:
        return (), text(fields, "question"), None
    if not isinstance(told, list):
        raise unexpected("an array of turns", told, "conversations")
    turns = [_turn(one) for one in told]
    answered = turns.pop() if turns and turns[-1]["role"] == "assistant" else None
    if not turns or turns[-1]["role"] != "user":
        raise BadRequest("its conversation has no question at its end")
    *history, question = turns
    return tuple(history), question["content"], Answer(answered["content"]) if answered else None


def _turn(told: object) -> dict[str, str]:
    """As a chat's message. Raises BadRequest."""
    if not isinstance(told, Mapping):
        raise unexpected("an object", told, "conversations")
    role = ROLES.get(str(told.get("from", told.get("role"))))
    if role is None:
        raise BadRequest("a turn of its conversation is from nobody known")
    said = MARK.sub("", text(told, "value" if "value" in told else "content")).strip()
    if not said:
        raise BadRequest("a turn of its conversation is empty")
    return {"role": role, "content": said}
