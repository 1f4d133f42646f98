"""VLSBench (arXiv 2411.19939): Foreshhh/vlsbench on the hub; the words are harmless, the harm is in the picture.

Layout: data.json, an array of {instruction_id, instruction, image_path, ...}, and imgs.tar with imgs/0.png and so on: known from
the authors' own repository and the set's pages on the hub, as is the licence. Other people's code reads a parquet form with `image`
inside under the split "train"; that is read too. It has no answers, and it is a benchmark: what is trained on it can't be
measured by it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Origin, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Fields
from vlmguard.synthesis.sources.source import Read, Source, Wanted, text
from vlmguard.synthesis.sources.tables import Table

HUB: Final = "Foreshhh/vlsbench"
LICENCE: Final = "apache-2.0"


def vlsbench(wanted: Wanted) -> Source:
    table = Table.of(wanted, HUB, ".parquet", ".json", ".jsonl", usual="data")

    def read(origin: Origin) -> Read:
        def made(row: str, fields: Fields, pictures: Pictures) -> Read:
            own = fields.get("instruction_id", row)
            if isinstance(own, bool) or not isinstance(own, int | str):
                raise unexpected("a number", own, "instruction_id")
            picture = pictures.of(fields.get("image") or fields.get("image_path"), f"{own}.image")
            yield Sample(str(own), (picture,), text(fields, "instruction"), replace(origin, row=str(own)))

        return table.read(made, ("instruction",), ("image", "image_path", "instruction_id"))

    return table.source(LICENCE, read)
