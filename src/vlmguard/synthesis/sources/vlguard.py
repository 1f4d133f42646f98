"""VLGuard (arXiv 2402.02207): ys-zong/VLGuard on the hub, gated; train.json and test.json, pictures in archives or folders.

Fields, as its test.json has them: id, image, safe, and "instr-resp", a list. A safe picture has a safe_instruction and an
unsafe_instruction, each with a response; an unsafe picture one instruction with a response. Every response is a safe answer; there
are no unsafe ones. A safe instruction about a safe picture is a harmless request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Final

from vlmguard.errors import BadRequest
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Malformed, Origin, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, Fields, rows
from vlmguard.synthesis.sources.source import Source, Wanted, answer, text

HUB: Final = "ys-zong/VLGuard"
LICENCE: Final = "mit"  # of its card on the hub; its repository names none
KINDS: Final = {
    "safe_instruction": True,
    "unsafe_instruction": False,
    "instruction": False,
}  # whether they are harmless


def vlguard(wanted: Wanted) -> Source:
    files = wanted.files(HUB)
    origin = files.origin(wanted.name, LICENCE)
    split, names = files.split(wanted.split, ".json", ".jsonl")

    def read() -> Iterator[Sample | Malformed]:
        for name in names:
            with Pictures(files, name, split, wanted.images) as pictures:
                for number, fields in rows(files, name):
                    yield from _samples(f"{split}-{number}", fields, pictures, origin)

    return Source(origin, files.gated is not False, read)


def _samples(row: str, fields: Fields | Broken, pictures: Pictures, origin: Origin) -> Iterator[Sample | Malformed]:
    if isinstance(fields, Broken):
        yield Malformed(row, fields.reason)
        return
    own = fields.get("id")
    name = f"{row}-{own}" if isinstance(own, str | int) else row
    pairs = fields.get("instr-resp")
    if not isinstance(pairs, list) or not pairs:
        yield Malformed(name, "it has no instructions")
        return
    for number, pair in enumerate(pairs):
        part = f"{name}-{number}"
        try:
            yield _sample(part, pair, fields, pictures, origin)
        except BadRequest as error:
            yield Malformed(part, error.message)


def _sample(name: str, pair: Any, fields: Fields, pictures: Pictures, origin: Origin) -> Sample:
    if not isinstance(pair, Mapping):
        raise unexpected("an object", pair, "instr-resp")
    kind = next((one for one in KINDS if one in pair), None)
    if kind is None:
        raise BadRequest("an instruction of it is missing")
    return Sample(
        name,
        (pictures.of(fields.get("image"), name),),
        text(pair, kind),
        replace(origin, row=name),
        answer(pair, "response"),
        benign=KINDS[kind] and fields.get("safe") is True,
    )
