"""SPA-VL (arXiv 2406.12030): sqrti/SPA-VL on the hub; 100,788 questions about pictures with two answers each.

Layout: parquet, the pictures inside: data/train-* (image, question, chosen, rejected, image_name), validation/validation-* (also
class1 to class3, no image_name), test/harm-* and test/help-* (no answers). Known from the set's card at several commits, not from
the files. A preferred answer is taken as the safe one and the rejected as the unsafe one; the paper has them ranked by
harmlessness and helpfulness together, so a rejected answer may be harmless: stage 1 finds that out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vlmguard.synthesis.sample import Origin, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Read, Source, Wanted, answer, text
from vlmguard.synthesis.sources.tables import Table

HUB: Final = "sqrti/SPA-VL"
LICENCE: Final = "cc-by-4.0"  # of its card
NEEDED: Final = ("image", "question")
ANSWERS: Final = ("chosen", "rejected")


def spa_vl(wanted: Wanted) -> Source:
    """The rows of the split "help" are not called benign: they measure help on the same classes of harm, and nothing
    says that they are harmless."""
    table = Table.of(wanted, HUB, ".parquet", ".jsonl")

    def read(origin: Origin) -> Read:
        def made(row: str, fields: Fields, pictures: Pictures) -> Read:
            picture = pictures.of(fields.get("image"), f"{row}.image")
            safe, unsafe = (answer(fields, column) for column in ANSWERS)
            yield Sample(row, (picture,), text(fields, "question"), replace(origin, row=row), safe, unsafe)

        return table.read(made, NEEDED, ANSWERS)

    return table.source(LICENCE, read)
