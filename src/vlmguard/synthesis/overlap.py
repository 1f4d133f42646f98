"""What of evaluation sets comes back in a dataset: training on it would spoil every measurement on those sets.

    Overlap.of([folder, file, ...])   reads every text and every picture in them
    overlap.find(text, pictures)      the place of the item that a row nearly repeats, or None

A text overlaps when it has four words or more and shares at least 80 % of its distinct words with one of an evaluation set; a
picture when it looks the same (see `duplicates`). Either alone is enough: a known picture with another question is known.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final, Self

from vlmguard.errors import ConfigError, ImageError
from vlmguard.synthesis.duplicates import (
    LEAST_SHARE,
    MOST_DISTANCE,
    NearPictures,
    NearTexts,
    checked,
    frames_of,
    picture_hash,
    words_of,
)

LEAST_WORDS: Final = 4
MOST_WORDS: Final = 400  # a longer text is an answer or a document
MOST_CHARACTERS: Final = 20_000  # a longer string is not looked at: encoded data
PICTURES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff"})
TABLES: Final = frozenset({".csv", ".tsv"})
LINES: Final = frozenset({".jsonl", ".ndjson"})
# Data that is not read here. Other files (licences, code, documents) hold no items.
CLOSED: Final = frozenset(
    {".parquet", ".arrow", ".feather", ".xlsx", ".zip", ".gz", ".tar", ".tgz", ".zst", ".db", ".pkl"}
)
REMEDY: Final = "Give folders or files of JSONL, JSON, CSV, TSV and pictures."


class Overlap:
    """
    Attributes:
        texts, pictures: how many different ones are compared with.
        unread: files that could not be compared with, each with the reason.
    """

    def __init__(self, least_share: float = LEAST_SHARE, most_distance: int = MOST_DISTANCE) -> None:
        checked(least_share, most_distance)
        self.unread: list[str] = []
        self._texts, self._frames = NearTexts(least_share), NearPictures(most_distance)
        self._known: set[frozenset[str]] = set()
        self._at_text: list[str] = []
        self._at_frame: list[str] = []
        self._pictures = 0

    @classmethod
    def of(
        cls, paths: Iterable[Path | str], least_share: float = LEAST_SHARE, most_distance: int = MOST_DISTANCE
    ) -> Self:
        """Reads evaluation sets; of a folder everything below it. Takes about 5 ms a picture.

        Raises:
            ConfigError: a path is missing or holds no text or picture; a file of texts cannot be read.
            MissingExtra.
        """
        overlap = cls(least_share, most_distance)
        for path in map(Path, paths):
            if not sum(overlap._read(file, name) for file, name in _files(path)):
                raise ConfigError(f"{path} holds no text and no picture to compare with", REMEDY)
        return overlap

    @property
    def texts(self) -> int:
        return len(self._texts)

    @property
    def pictures(self) -> int:
        return self._pictures

    def find(self, text: str, pictures: Sequence[str] = ()) -> str | None:
        """Where a row's text or one of its pictures stands in an evaluation set.

        Args:
            pictures: their `duplicates.picture_hash`es.
        """
        words = words_of(text)
        if len(words) >= LEAST_WORDS:
            is_near = self._texts.nearness(words)
            for number in sorted(set().union(*self._texts.candidates(words))):
                if is_near(number):
                    return f"the text of {self._at_text[number]}"
        for frame in frames_of(pictures):
            for number in sorted(set().union(*self._frames.candidates(frame))):
                if self._frames.is_near(number, frame):
                    return f"the picture {self._at_frame[number]}"
        return None

    def _read(self, file: Path, name: str) -> int:
        """How many items of a file are compared with from now on."""
        suffix = file.suffix.lower()
        if suffix in PICTURES:
            return self._read_picture(file, name)
        if suffix in CLOSED:
            self.unread.append(f"{name}: {suffix} files are not read")
        rows = _rows(file) if suffix in (*LINES, *TABLES, ".json") else ()
        return sum(self._add(text, f"{name}, row {row}") for row, value in rows for text in _strings(value))

    def _read_picture(self, file: Path, name: str) -> int:
        try:
            frames = frames_of([picture_hash(file.read_bytes())])
        except ImageError as error:
            self.unread.append(f"{name}: {error.message}")
            return 0
        except OSError as error:
            raise _unreadable(file, error.strerror) from None
        for frame in frames:
            self._frames.add(frame)
            self._at_frame.append(name)
        self._pictures += 1
        return 1

    def _add(self, text: str, place: str) -> bool:
        words = words_of(text)
        if not LEAST_WORDS <= len(words) <= MOST_WORDS:
            return False
        if words not in self._known:
            self._known.add(words)
            self._texts.add(words)
            self._at_text.append(place)
        return True


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    """The files at or below a path, each with its name below it, in a fixed order."""
    if path.is_file():
        if path.suffix.lower() not in {*PICTURES, *LINES, *TABLES, *CLOSED, ".json"}:
            raise ConfigError(f"{path} is of no kind that is read", REMEDY)
        yield path, path.name
    elif path.is_dir():
        top = path.resolve().name
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield file, f"{top}/{file.relative_to(path).as_posix()}"
    else:
        raise ConfigError(f"there is no {path}", REMEDY)


def _rows(file: Path) -> Iterator[tuple[int, object]]:
    """The rows of a file of texts, counted from 1. Raises ConfigError: an item that is passed over could come back."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            if file.suffix.lower() in TABLES:
                yield from enumerate(csv.reader(lines, delimiter=_delimiter(lines, file)), start=1)
            elif file.suffix.lower() in LINES:
                yield from _lines(lines)
            else:
                yield from _values(lines.read())
    except OSError as error:
        raise _unreadable(file, error.strerror) from None
    except RecursionError:
        raise _unreadable(file, "it is nested too deeply") from None
    except (ValueError, csv.Error) as error:  # what JSON and UTF-8 raise are ValueErrors
        raise _unreadable(file, error) from None


def _delimiter(lines: IO[str], file: Path) -> str:
    """What parts the cells of a table: most often in its first line."""
    if file.suffix.lower() == ".tsv":
        return "\t"
    head = lines.readline()
    lines.seek(0)
    return max(",;\t|", key=head.count)


def _lines(lines: Iterable[str]) -> Iterator[tuple[int, object]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _values(text: str) -> Iterator[tuple[int, object]]:
    """The rows of a JSON array or object; also where the file is JSON lines under another name."""
    try:
        whole = json.loads(text)
    except ValueError:
        if "\n{" not in text.strip():
            raise
        yield from _lines(text.split("\n"))
        return
    rows = whole.values() if isinstance(whole, dict) else whole if isinstance(whole, list) else [whole]
    yield from enumerate(rows, start=1)


def _strings(value: object) -> Iterator[str]:
    """Every string of a row that may be a request: it has several words."""
    if isinstance(value, str):
        if len(value) <= MOST_CHARACTERS and (" " in value.strip() or not value.isascii()):
            yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _unreadable(file: Path, why: object) -> ConfigError:
    return ConfigError(f"{file} cannot be read: {why}", "Mend it, or name the files beside it one by one.")
