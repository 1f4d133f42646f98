"""Sets that are tables: a sample a row, pictures in the rows or by path, one or several files a split."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeAlias

from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources.files import Files
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, Fields, rows
from vlmguard.synthesis.sources.source import Wanted, each

Made: TypeAlias = Callable[[str, Fields, Pictures], Sample]  # id, row, where its pictures are found


def samples(
    files: Files,
    wanted: Wanted,
    made: Made,
    *suffixes: str,
    needed: Collection[str] = (),
    optional: Collection[str] = (),
) -> Callable[[], Iterator[Sample | Malformed]]:
    """Reads the split that is wanted, anew with every call; ids are the split's name and the row's number.

    Raises ConfigError where there is no such split.
    """
    split, names = files.split(wanted.split, *suffixes)

    def read() -> Iterator[Sample | Malformed]:
        before = 0
        for name in names:
            count = 0
            with Pictures(files, name, split, wanted.images) as pictures:
                numbered = _counted(rows(files, name, needed, optional), split, before)
                for sample in each(numbered, lambda row, fields: made(row, fields, pictures)):
                    count += 1
                    yield sample
            before += count

    return read


def _counted(
    found: Iterator[tuple[int, Fields | Broken]], split: str, before: int
) -> Iterator[tuple[str, Fields | Broken]]:
    for number, (_, fields) in enumerate(found, start=before):
        yield f"{split}-{number}", fields
