"""Sets that are tables: rows in one file a split, or in several, and pictures in the rows or by path."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Self, TypeAlias

from vlmguard.errors import BadRequest
from vlmguard.synthesis.sample import Malformed, Origin
from vlmguard.synthesis.sources.files import Files
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, Fields, Rows, rows
from vlmguard.synthesis.sources.source import Read, Source, Wanted

Made: TypeAlias = Callable[[str, Fields, Pictures], Read]  # of a row's id, its fields, and where its pictures are found


@dataclass(frozen=True)
class Table:
    """The rows of the split that is wanted."""

    wanted: Wanted
    files: Files
    split: str
    names: Sequence[str]

    @classmethod
    def of(cls, wanted: Wanted, hub: str, *suffixes: str, usual: str = "train", prefix: str = "") -> Self:
        """Of the local copy, or of the data set `hub` (OWNER/NAME); the rest as of `Files.split`.

        Raises:
            ConfigError: there is no such set, split or access. MissingExtra: the hub's client is not installed.
        """
        files = wanted.files(hub)
        return cls(wanted, files, *files.split(wanted.split, *suffixes, usual=usual, prefix=prefix))

    def source(self, licence: str, read: Callable[[Origin], Read], *, gated: bool = False) -> Source:
        """The source that `read` gives the samples of.

        Args:
            licence, gated: as the set was known to be; its card, and the hub, may say otherwise.
        """
        origin = self.files.origin(self.wanted.name, licence)
        return Source(origin, gated if self.files.gated is None else self.files.gated, lambda: read(origin))

    def read(
        self,
        made: Made,
        needed: Collection[str] = (),
        optional: Collection[str] = (),
        *,
        grouped: Callable[[Rows], Rows] = iter,
    ) -> Read:
        """What `made` gives for each row; Malformed where it raises BadRequest, and for a row that is broken.

        Args:
            made: its first argument is the split's name and the row's number in it.
            needed, optional: columns, as of `rows`.
            grouped: makes one row of several that belong together.
        """
        numbers = count()
        for name in self.names:
            with Pictures(self.files, name, self.split, self.wanted.images) as pictures:
                found = rows(self.files, name, needed, optional)
                numbered = ((number, fields) for (_, fields), number in zip(found, numbers, strict=False))
                for number, fields in grouped(numbered):
                    yield from _judged(f"{self.split}-{number}", fields, pictures, made)


def _judged(row: str, fields: Fields | Broken, pictures: Pictures, made: Made) -> Read:
    if isinstance(fields, Broken):
        yield Malformed(row, fields.reason)
        return
    try:
        yield from made(row, fields, pictures)
    except BadRequest as error:
        yield Malformed(row, error.message)
