"""A source of samples, and what its layout is asked for."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from vlmguard.errors import BadRequest
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Answer, Malformed, Origin, Sample
from vlmguard.synthesis.sources.files import Files, in_folder

Read: TypeAlias = Iterator[Sample | Malformed]


@dataclass(frozen=True)
class Source:
    """Samples in the order of their source, the same on every iteration; only what is at hand is in memory.

    Every id is given once: a row that repeats one is Malformed, under an id of its own.

    Args:
        origin: of every sample, without its row. A plain JSONL file's rows may name their own.
        gated: its hub page asks for terms to be accepted.
        read: gives the rows anew from the first.
    """

    origin: Origin
    gated: bool
    read: Callable[[], Read]

    @property
    def name(self) -> str:
        return self.origin.name

    @property
    def licence(self) -> str:
        return self.origin.licence

    @property
    def revision(self) -> str | None:
        return self.origin.revision

    def __iter__(self) -> Generator[Sample | Malformed, None, None]:
        seen: set[str] = set()
        for one in self.read():
            given, times = one.id, 1
            while given in seen:
                times += 1
                given = f"{one.id}#{times}"
            seen.add(given)
            if times == 1:
                yield one
            else:
                yield Malformed(given, one.reason if isinstance(one, Malformed) else "another row has its id")


@dataclass(frozen=True)
class Wanted:
    """What a layout is asked to open.

    Args:
        name: as the user wrote it.
        path: a local copy; None for the hub.
        split, revision, images: as of `opened`.
    """

    name: str
    path: Path | None = None
    split: str | None = None
    revision: str | None = None
    images: Path | None = None

    def files(self, hub: str) -> Files:
        """Those of the local copy, or of the data set `hub` (OWNER/NAME). Raises ConfigError, MissingExtra."""
        if self.path is not None:
            return in_folder(self.path, self.revision)
        from vlmguard.synthesis.sources.hub import on_hub

        return on_hub(hub, self.name, self.revision)


def text(fields: Mapping[str, Any], key: str) -> str:
    """A text that has to be there. Raises BadRequest."""
    value = fields.get(key)
    if not isinstance(value, str):
        raise unexpected("text", value, key)
    if not value.strip():
        raise BadRequest(f"{key} is empty")
    return value


def answer(fields: Mapping[str, Any], key: str) -> Answer | None:
    """An answer, None where there is none or an empty one. Raises BadRequest."""
    value = fields.get(key)
    if value is not None and not isinstance(value, str):
        raise unexpected("text", value, key)
    return Answer(value) if value and value.strip() else None
