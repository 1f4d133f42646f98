"""VLGuard (arXiv 2402.02207): ys-zong/VLGuard on the hub, gated; 3,000 pictures, safe and unsafe, with instructions of both kinds.

Layout: train.json and test.json, arrays of {id, image, safe, instr-resp: [...]}. A safe picture's instr-resp holds
{safe_instruction, response} and {unsafe_instruction, response}; an unsafe one's {instruction, response}, with harmful_category
beside it. Pictures in train.zip and test.zip, by paths such as bad_ads/NAME.png. The JSON is known from the authors' own
repository, gating and licence from a copy of the set's card, the inside of the archives from how their code names the folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from vlmguard.errors import BadRequest
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Malformed, Origin, Picture, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Read, Source, Wanted, answer, text
from vlmguard.synthesis.sources.tables import Table

HUB: Final = "ys-zong/VLGuard"
LICENCE: Final = "mit"  # of its card; the repository with the same files names none
KINDS: Final = ("safe_instruction", "unsafe_instruction", "instruction")


def vlguard(wanted: Wanted) -> Source:
    """A safe instruction about a safe picture is benign. The set's answers are the safe ones; it has no unsafe ones."""
    table = Table.of(wanted, HUB, ".json", ".jsonl")

    def read(origin: Origin) -> Read:
        def made(_: str, fields: Fields, pictures: Pictures) -> Read:
            return _samples(f"{table.split}-{text(fields, 'id')}", fields, pictures, origin)

        return table.read(made)

    return table.source(LICENCE, read, gated=True)


def _samples(row: str, fields: Fields, pictures: Pictures, origin: Origin) -> Read:
    """One for each instruction about a picture; one that is malformed leaves the others."""
    safe, told = fields.get("safe"), fields.get("instr-resp")
    if not isinstance(safe, bool):
        raise unexpected("true or false", safe, "safe")
    if not isinstance(told, list) or not told:
        raise unexpected("an array of one instruction or more", told, "instr-resp")
    picture = pictures.of(fields.get("image"), f"{row}.image")
    for number, one in enumerate(told):
        name = f"{row}-{number}"
        try:
            yield _sample(name, one, safe, picture, origin)
        except BadRequest as error:
            yield Malformed(name, error.message)


def _sample(name: str, told: object, safe: bool, picture: Picture, origin: Origin) -> Sample:
    if not isinstance(told, Mapping):
        raise unexpected("an object", told, "instr-resp")
    kinds = [kind for kind in KINDS if kind in told]
    if len(kinds) != 1:
        raise BadRequest(f"instr-resp: expected one of {', '.join(KINDS)}, got {' and '.join(kinds) or 'none'}")
    kind = kinds[0]
    if safe == (kind == "instruction"):
        raise BadRequest(f"a picture that is {'safe' if safe else 'unsafe'} has a field {kind}")
    prompt, benign = text(told, kind), kind == "safe_instruction"
    return Sample(name, (picture,), prompt, replace(origin, row=name), answer(told, "response"), benign=benign)
