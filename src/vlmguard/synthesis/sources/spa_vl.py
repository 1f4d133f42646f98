"""SPA-VL (arXiv 2406.12030): sqrti/SPA-VL on the hub, parquet.

Columns, by the paper and the hub's listing: image, question, chosen, rejected (and classes of harm). A preferred answer is taken
as the safe one and the rejected as the unsafe one; the paper has them ranked by harmlessness and helpfulness together, so a
rejected answer may be harmless: stage 2 finds that out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vlmguard.synthesis.sample import Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Source, Wanted, answer, text
from vlmguard.synthesis.sources.tables import samples

HUB: Final = "sqrti/SPA-VL"
LICENCE: Final = "cc-by-4.0"  # of its card


def spa_vl(wanted: Wanted) -> Source:
    files = wanted.files(HUB)
    origin = files.origin(wanted.name, LICENCE)

    def made(row: str, fields: Fields, pictures: Pictures) -> Sample:
        return Sample(
            row,
            (pictures.of(fields.get("image"), f"{row}.image"),),
            text(fields, "question"),
            replace(origin, row=row),
            answer(fields, "chosen"),
            answer(fields, "rejected"),
        )

    read = samples(
        files, wanted, made, ".parquet", ".jsonl", needed=("image", "question"), optional=("chosen", "rejected")
    )
    return Source(origin, bool(files.gated), read)
