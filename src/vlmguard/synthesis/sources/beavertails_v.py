"""BeaverTails-V (arXiv 2503.17682): PKU-Alignment/BeaverTails-V on the hub; one answer a row, labelled safe or not.

Columns, by its card: question, image, category, image_severity, response, is_response_safe ("yes" or "no"), in folders by
category. Rows of one question and picture that follow each other are put together: the first safe and the first unsafe answer make
a sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from vlmguard.errors import BadRequest
from vlmguard.synthesis.sample import Answer, Malformed, Origin, Picture, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, rows
from vlmguard.synthesis.sources.source import Source, Wanted, text

HUB: Final = "PKU-Alignment/BeaverTails-V"
LICENCE: Final = "cc-by-nc-4.0"  # of its card
COLUMNS: Final = ("question", "image", "response", "is_response_safe")


def beavertails_v(wanted: Wanted) -> Source:
    files = wanted.files(HUB)
    origin = files.origin(wanted.name, LICENCE)
    split, names = files.split(wanted.split, ".parquet", ".jsonl")

    def read() -> Iterator[Sample | Malformed]:
        number = 0
        for name in names:
            with Pictures(files, name, split, wanted.images) as pictures:
                open_group: _Group | None = None
                for _, fields in rows(files, name, COLUMNS):
                    row, number = f"{split}-{number}", number + 1
                    try:
                        if isinstance(fields, Broken):
                            raise BadRequest(fields.reason)
                        one = _group(row, fields, pictures)
                    except BadRequest as error:
                        yield Malformed(row, error.message)
                        continue
                    if open_group is not None and open_group.key == one.key:
                        open_group.add(one)
                        continue
                    if open_group is not None:
                        yield open_group.sample(origin)
                    open_group = one
                if open_group is not None:
                    yield open_group.sample(origin)

    return Source(origin, bool(files.gated), read)


@dataclass
class _Group:
    """Answers to one question about one picture."""

    row: str
    key: tuple[str, str]
    picture: Picture
    safe: str | None = None
    unsafe: str | None = None

    def add(self, other: _Group) -> None:
        self.safe, self.unsafe = self.safe or other.safe, self.unsafe or other.unsafe

    def sample(self, origin: Origin) -> Sample:
        safe, unsafe = (Answer(said) if said else None for said in (self.safe, self.unsafe))
        return Sample(self.row, (self.picture,), self.key[0], replace(origin, row=self.row), safe, unsafe)


def _group(row: str, fields: Mapping[str, Any], pictures: Pictures) -> _Group:
    question, said = text(fields, "question"), text(fields, "response")
    label = str(fields.get("is_response_safe")).strip().lower()
    if label not in ("yes", "no", "true", "false"):
        raise BadRequest("its label is neither yes nor no")
    picture = pictures.of(fields.get("image"), f"{row}.image")
    key = question, hashlib.sha256(picture.read()).hexdigest()
    is_safe = label in ("yes", "true")
    return _Group(row, key, picture, said if is_safe else None, None if is_safe else said)
