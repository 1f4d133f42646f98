"""What can only be said of rows together, in the source's order: duplicates, overlap with evaluation sets, the share of
harmless ones."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vlmguard.errors import ImageError
from vlmguard.synthesis.duplicates import Duplicates, picture_hash
from vlmguard.synthesis.overlap import Overlap
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.sample import Picture, Row, Sample


def share_of(kinds: Iterable[tuple[str, str]], share: float) -> frozenset[str]:
    """The ids of the harmless rows that stay, so that they are at most `share` of all; chosen by a hash of their ids.

    Args:
        kinds: (id, kind) of every row.
    """
    harmless, risky = [], 0
    for name, kind in kinds:
        if kind == "helpfulness":
            harmless.append(name)
        else:
            risky += 1
    most = int(share * risky / (1 - share) + 0.5)
    chosen = sorted(harmless, key=lambda name: hashlib.sha256(name.encode()).digest())
    return frozenset(chosen[:most])


@dataclass
class Together:
    """A sieve; one for each pass over the rows.

    Args:
        staying: ids of the harmless rows that stay.
    """

    overlap: Overlap | None
    staying: frozenset[str] | None = None
    duplicates: Duplicates = field(default_factory=Duplicates)
    hashes: dict[str, str] = field(default_factory=dict)  # of pictures, by SHA-256: each pass needs them

    @classmethod
    def of(cls, recipe: Recipe) -> Together:
        return cls(Overlap.of([Path(path) for path in recipe.overlap]) if recipe.overlap else None)

    def again(self, staying: frozenset[str]) -> Together:
        """For the pass after the one that counted."""
        return Together(self.overlap, staying, hashes=self.hashes)

    def __call__(self, sample: Sample, row: Row) -> tuple[str, str] | None:
        try:
            pictures = [self._hash(picture) for picture in sample.pictures]
        except ImageError as error:
            return "source", error.message
        if self.overlap is not None and (where := self.overlap.find(row.prompt, pictures)):
            return "overlap", f"it is in an evaluation set: {where}"
        if (earlier := self.duplicates.add(row.id, row.prompt, pictures)) is not None:
            return "duplicate", f"it is nearly the same as {earlier}"
        if row.kind == "helpfulness" and self.staying is not None and row.id not in self.staying:
            return "share", "there are more harmless rows than their share"
        return None

    def _hash(self, picture: Picture) -> str:
        if picture.sha256 not in self.hashes:
            self.hashes[picture.sha256] = picture_hash(picture.read())
        return self.hashes[picture.sha256]
