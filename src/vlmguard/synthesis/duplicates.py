"""Rows that nearly repeat an earlier one: the same words about the same pictures.

Text: two texts are near when they share at least 80 % of their distinct words (Jaccard). The index is exact: a text with
that much in common shares one of any 20 % + 1 of our words, so the rarest are looked up. It is our own since on 100,000
texts of 16 words it takes 17 s and 29 MiB (130 MiB with a picture each) and finds every pair. datasketch's MinHash LSH (128
permutations, the bands that it chooses) takes 21 s and 348 MiB, and by its own formula finds 40 % of the pairs at the bound;
comparing all pairs with rapidfuzz takes five thousand million comparisons.

Pictures: `imagehash.phash` with 256 bits. Of 860 pictures of evaluation sets, JPEG at quality 20 changes at most 12 bits and
a quarter of the size 4; no two pictures differ in 1 to 24. With 64 bits white pages of text come within 6 of each other. A
cropped copy (3 % off each side: 56 bits) counts as another picture.
"""

from __future__ import annotations

import math
import re
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, cast

from vlmguard.errors import ConfigError, missing_extra
from vlmguard.images import decode

if TYPE_CHECKING:
    from PIL import Image

LEAST_SHARE: Final = 0.8  # of distinct words
MOST_DISTANCE: Final = 16  # bits of 256
HASH_SIDE: Final = 16
# Scripts that put no blanks between words; of these, pairs of letters take the place of words.
_UNPARTED: Final = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"
)


def words_of(text: str) -> frozenset[str]:
    """A text's distinct words, whatever their case and width; never none."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    found = set(re.findall(r"\w+", _UNPARTED.sub(" ", plain)))
    for run in _UNPARTED.findall(plain):
        found.update(run[at : at + 2] for at in range(max(1, len(run) - 1)))
    return frozenset(found) or frozenset({plain.strip()})


def picture_hash(data: bytes) -> str:
    """What an encoded picture looks like: 64 hexadecimal digits a frame, joined by "-".

    Raises ImageError; MissingExtra.
    """
    return "-".join(f"{_looks(frame):064x}" for frame in decode(data))


def _looks(frame: Image.Image) -> int:
    try:
        import imagehash
    except ImportError as error:
        raise missing_extra("imagehash", "synthesis") from error
    low, high = cast("tuple[int, int]", frame.convert("L").getextrema())
    if high - low <= 2:  # one colour, JPEG's noise aside: it has no structure, and all would have one hash
        return _colour(frame)
    return int(str(imagehash.phash(frame, hash_size=HASH_SIDE)), 16)


def _colour(frame: Image.Image) -> int:
    """Bits of a colour: of each channel as many ones as it is bright, so that near colours differ in few."""
    pixel = frame.getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return sum((1 << round(value / 255 * 80)) - 1 << 80 * place for place, value in enumerate(pixel))


def distance(first: int, second: int) -> int:
    return (first ^ second).bit_count()


def frames_of(pictures: Iterable[str]) -> tuple[int, ...]:
    """The hashes of all frames of `picture_hash`es."""
    return tuple(int(frame, 16) for picture in pictures for frame in picture.split("-"))


class NearTexts:
    """Texts by number, in the order in which they are added, and which of them are near to another."""

    def __init__(self, least_share: float = LEAST_SHARE) -> None:
        self.least_share = least_share
        self._words: dict[str, int] = {}
        self._texts: list[array[int]] = []
        self._with_word: list[array[int]] = []

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, words: frozenset[str]) -> None:
        number = len(self._texts)
        ours = array("I", sorted(self._words.setdefault(word, len(self._words)) for word in words))
        self._with_word += (array("I") for _ in range(len(self._words) - len(self._with_word)))
        for word in ours:
            self._with_word[word].append(number)
        self._texts.append(ours)

    def candidates(self, words: frozenset[str]) -> list[array[int]]:
        """Numbers of texts; every near one is in one of them."""
        known = (self._with_word[self._words[word]] for word in words if word in self._words)
        fewest = sorted(known, key=len)
        unknown = len(words) - len(fewest)
        looked_up = len(words) - _at_least(self.least_share, len(words)) + 1 - unknown
        return fewest[: max(0, looked_up)]

    def nearness(self, words: frozenset[str]) -> Callable[[int], bool]:
        """Tells of a text's number whether it is near."""
        ours = {self._words[word] for word in words if word in self._words}
        fewest = _at_least(self.least_share, len(words))

        def is_near(number: int) -> bool:
            theirs = self._texts[number]
            if len(theirs) < fewest or len(words) < _at_least(self.least_share, len(theirs)):
                return False
            shared = len(ours.intersection(theirs))
            return shared >= _at_least(self.least_share, len(theirs) + len(words) - shared)

        return is_near


def _at_least(share: float, count: int) -> int:
    return math.ceil(share * count - 1e-9)


class NearPictures:
    """Hashes of frames by number, and which of them are near to another.

    Two hashes that differ in at most d bits are equal in one of d + 1 parts: the parts are looked up.
    """

    def __init__(self, most_distance: int = MOST_DISTANCE) -> None:
        self.most_distance = most_distance
        self._width = HASH_SIDE**2 // (most_distance + 1)
        self._hashes: list[int] = []
        self._with_part: defaultdict[int, array[int]] = defaultdict(lambda: array("I"))

    def __len__(self) -> int:
        return len(self._hashes)

    def add(self, frame: int) -> None:
        for part in self._parts(frame):
            self._with_part[part].append(len(self._hashes))
        self._hashes.append(frame)

    def candidates(self, frame: int) -> list[array[int]]:
        """Numbers of hashes; every near one is in one of them."""
        return [self._with_part[part] for part in self._parts(frame) if part in self._with_part]

    def is_near(self, number: int, frame: int) -> bool:
        return distance(self._hashes[number], frame) <= self.most_distance

    def _parts(self, frame: int) -> Iterator[int]:
        mask = (1 << self._width) - 1
        for part in range(self.most_distance + 1):
            yield (frame >> part * self._width & mask) * (self.most_distance + 1) + part


@dataclass
class _Shelf:
    """Rows with as many frames; their numbers are those of the texts and of the first frames."""

    texts: NearTexts
    first: NearPictures
    ids: list[str] = field(default_factory=list)
    frames: list[tuple[int, ...]] = field(default_factory=list)


class Duplicates:
    """Finds rows that nearly repeat one that was added before.

    The same words with other pictures are no duplicate: the one may be harmless and the other not. Rows without pictures
    are compared by their words alone.

    Args:
        least_share: of distinct words that two texts have in common, in (0, 1].
        most_distance: bits of 256 by which each picture may differ from the one in its place, of an animation each frame.
    """

    def __init__(self, least_share: float = LEAST_SHARE, most_distance: int = MOST_DISTANCE) -> None:
        self.least_share, self.most_distance = checked(least_share, most_distance)
        self._shelves: dict[int, _Shelf] = {}

    def add(self, name: str, text: str, pictures: Sequence[str] = ()) -> str | None:
        """The name of the earliest row that this one nearly repeats; else None, and later ones are compared with it.

        Args:
            name: the row's id.
            pictures: their `picture_hash`es, in order.
        """
        frames, words = frames_of(pictures), words_of(text)
        shelf = self._shelves.get(len(frames))
        if shelf is None:
            shelf = _Shelf(NearTexts(self.least_share), NearPictures(self.most_distance))
            self._shelves[len(frames)] = shelf
        if (number := self._earliest(shelf, words, frames)) is not None:
            return shelf.ids[number]
        shelf.texts.add(words)
        if frames:
            shelf.first.add(frames[0])
            shelf.frames.append(frames)
        shelf.ids.append(name)
        return None

    def _earliest(self, shelf: _Shelf, words: frozenset[str], frames: tuple[int, ...]) -> int | None:
        # The way with fewer candidates: thousands of rows may ask the same of other pictures, or something else of one.
        ways = [shelf.texts.candidates(words)]
        if frames:
            ways.append(shelf.first.candidates(frames[0]))
        has_near_text = shelf.texts.nearness(words)
        numbers = min(ways, key=lambda way: sum(map(len, way)))
        for number in sorted(set().union(*numbers)):
            near = not frames or all(
                distance(one, other) <= self.most_distance
                for one, other in zip(frames, shelf.frames[number], strict=True)
            )
            if near and has_near_text(number):
                return number
        return None


def checked(least_share: float, most_distance: int) -> tuple[float, int]:
    """Raises ConfigError where one is out of range."""
    if not 0 < least_share <= 1:
        raise ConfigError.wrong("least_share", expected="a number above 0, at most 1", got=least_share)
    if not 0 <= most_distance < 64:
        raise ConfigError.wrong("most_distance", expected="a whole number of bits from 0 to 63", got=most_distance)
    return least_share, most_distance
