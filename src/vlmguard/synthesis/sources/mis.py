"""MIS (arXiv 2501.18533): Tuwhy/MIS_Train on the hub; two pictures or more that are risky together.

What is known of its fields is by other people's readers and not by a card: rows of {"images": [...], "conversations": [{"from":
"human", "value"}, {"from": "gpt", "value"}]} for training, and of {"question", "image_path1", "image_path2", ...} for the test
set. The training answers are safe ones; there are no unsafe ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from vlmguard.errors import BadRequest
from vlmguard.synthesis.sample import Answer, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Source, Wanted, text
from vlmguard.synthesis.sources.tables import samples

HUB: Final = "Tuwhy/MIS_Train"
LICENCE: Final = "unknown"
OPTIONAL: Final = ("images", "image", "conversations", "question", *(f"image_path{number}" for number in range(1, 7)))


def mis(wanted: Wanted) -> Source:
    files = wanted.files(HUB)
    origin = files.origin(wanted.name, LICENCE)

    def made(row: str, fields: Fields, pictures: Pictures) -> Sample:
        held = fields.get("images") or fields.get("image")
        if held is None:
            held = [value for name in OPTIONAL[4:] if (value := fields.get(name))]
        if not isinstance(held, list) or not held:
            raise BadRequest("it has no list of pictures")
        found = tuple(pictures.of(one, f"{row}.{number}") for number, one in enumerate(held))
        prompt, safe = _said(fields)
        return Sample(row, found, prompt, replace(origin, row=row), safe)

    read = samples(files, wanted, made, ".json", ".jsonl", ".parquet", optional=OPTIONAL)
    return Source(origin, bool(files.gated), read)


def _said(fields: Fields) -> tuple[str, Answer | None]:
    turns = fields.get("conversations")
    if turns is None:
        return text(fields, "question"), None
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise BadRequest("its conversation is no list of turns")
    asked = _first(turns, "human", "user")
    if asked is None:
        raise BadRequest("its conversation has no request")
    answered = _first(turns, "gpt", "assistant")
    return re.sub(r"<image>\s*", "", asked).strip(), Answer(answered) if answered else None


def _first(turns: list[Mapping[str, Any]], *roles: str) -> str | None:
    for turn in turns:
        value = turn.get("value", turn.get("content"))
        if turn.get("from", turn.get("role")) in roles and isinstance(value, str) and value.strip():
            return value
    return None
