"""VLSBench (arXiv 2411.19939): Foreshhh/vlsbench on the hub; the words are harmless, the harm is in the picture.

Fields, as its own data file has them: instruction_id, instruction, image_path (image, in the hub's parquet), and descriptions that
are not read here. It has no answers. It is a benchmark: what is trained on it can't be measured by it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vlmguard.synthesis.sample import Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Source, Wanted, text
from vlmguard.synthesis.sources.tables import samples

HUB: Final = "Foreshhh/vlsbench"
LICENCE: Final = "unknown"


def vlsbench(wanted: Wanted) -> Source:
    files = wanted.files(HUB)
    origin = files.origin(wanted.name, LICENCE)

    def made(row: str, fields: Fields, pictures: Pictures) -> Sample:
        held = fields.get("image") or fields.get("image_path")
        picture = pictures.of(held, f"{row}.image")
        return Sample(row, (picture,), text(fields, "instruction"), replace(origin, row=row))

    read = samples(
        files, wanted, made, ".parquet", ".json", ".jsonl", needed=("instruction",), optional=("image", "image_path")
    )
    return Source(origin, bool(files.gated), read)
