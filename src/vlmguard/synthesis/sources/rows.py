"""The rows of a file, one at a time: parquet, a JSON array, or JSON lines.

A row that cannot be read is Broken, and the next is read all the same; a file that cannot be is a ConfigError.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO, TypeAlias

from vlmguard.errors import BadRequest, ConfigError, missing_extra
from vlmguard.strict_json import parse_json
from vlmguard.synthesis.sources.files import Files, torn

Fields: TypeAlias = Mapping[str, Any]

LONGEST_ROW: Final = 64 * 2**20  # bytes of JSON: two pictures of the largest size as data URIs
READ_CHARACTERS: Final = 2**20
END_BYTES: Final = 2**12  # in which a whole JSON array shows its end
BATCH_ROWS: Final = 8  # each may hold a picture of megabytes
BUFFER_BYTES: Final = 2**20  # read ahead of a column
BOM: Final = b"\xef\xbb\xbf"
BLANKS: Final = re.compile(r"[ \t\r\n]*")
UTF_16: Final = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Broken:
    """A row that cannot be read, and why, without what it holds."""

    reason: str


Rows: TypeAlias = Iterator[tuple[int, Fields | Broken]]


def rows(files: Files, name: str, needed: Collection[str] = (), optional: Collection[str] = ()) -> Rows:
    """The rows of the file `name`, numbered from 0 (lines of JSON from 1).

    Args:
        needed, optional: the columns that are read of a parquet file.

    Raises:
        ConfigError: the file is empty, torn or of another format or encoding, or lacks a needed column.
        MissingExtra: it is parquet, and pyarrow is not installed.
    """
    path = files.path(name)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(max(0, path.stat().st_size - END_BYTES))
            end = file.read().rstrip()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Check the path and its permissions.") from error
    if not start:
        raise ConfigError(f"{path} is empty", "Download it again.")
    if path.suffix == ".parquet":
        return _of_parquet(path, needed, optional)
    if start.startswith(UTF_16) or b"\0" in start:
        raise _not_utf_8(path)
    if path.suffix != ".json":
        return _of_lines(path)
    if not end.endswith(b"]"):
        raise torn(path, "a JSON array")
    return _of_array(path)


def _of_parquet(path: Path, needed: Collection[str], optional: Collection[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise missing_extra("pyarrow", "synthesis") from error
    number = 0
    try:
        # Read ahead, or without a buffer, all pictures of a row group would be in memory; so it is a page of them.
        with pyarrow.parquet.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False) as file:
            columns = file.schema_arrow.names
            if lacking := [column for column in needed if column not in columns]:
                got = ", ".join(columns)
                raise ConfigError(f"{path} has no column {' or '.join(lacking)}; it has {got}", "Check its layout.")
            kept = [column for column in columns if column in {*needed, *optional}]
            for batch in file.iter_batches(BATCH_ROWS, columns=kept):
                for at in range(batch.num_rows):
                    yield number, _row(batch.slice(at, 1))
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise torn(path, "a parquet file") from error


def _row(one: Any) -> Fields | Broken:
    try:
        fields: Fields = one.to_pylist()[0]
    except UnicodeDecodeError:
        return Broken("a text in it is not UTF-8")
    return fields


def _of_array(path: Path) -> Rows:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, element in enumerate(_Array(file, path)):
                yield number, _parsed(element.encode())
    except UnicodeDecodeError as error:
        raise _not_utf_8(path) from error


@dataclass
class _Array:
    """The elements of a JSON array, as text: only the one at hand is in memory."""

    file: TextIO
    path: Path
    text: str = ""
    at: int = 0
    # It only finds where an element ends: what a number is does not matter.
    decoder: json.JSONDecoder = field(default_factory=lambda: json.JSONDecoder(parse_int=str, parse_float=str))

    def __iter__(self) -> Iterator[str]:
        self._take("[")
        if self._next() != "]":
            yield self._element()
            while self._take(",]") == ",":
                yield self._element()
        else:
            self._take("]")
        if self._next():
            raise torn(self.path, "one JSON array")

    def _next(self) -> str:
        """The next character that is no blank, "" at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            self.at = blanks.end() if blanks else self.at
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _take(self, expected: str) -> str:
        got = self._next()
        if not got or got not in expected:
            raise torn(self.path, "a JSON array")
        self.at += 1
        return got

    def _element(self) -> str:
        self._next()
        while True:
            try:
                end = self.decoder.raw_decode(self.text, self.at)[1]
            except (ValueError, RecursionError):
                end = len(self.text)
            if end < len(self.text):  # else it may go on: a number, or what is torn here
                break
            if len(self.text) - self.at > LONGEST_ROW or not self._more():
                raise torn(self.path, "a JSON array")
        element, self.at = self.text[self.at : end], end
        return element

    def _more(self) -> bool:
        """Reads on: as much again as there is, so that a long element is not tried a hundred times."""
        new = self.file.read(max(READ_CHARACTERS, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + new, 0
        return bool(new)


def _of_lines(path: Path) -> Rows:
    number = 0
    with path.open("rb") as file:
        while line := file.readline(LONGEST_ROW + 1):
            number += 1
            whole = line.endswith(b"\n")
            long = len(line) > LONGEST_ROW and not whole
            while long and not whole and (rest := file.readline(READ_CHARACTERS)):
                whole = rest.endswith(b"\n")
            line = line.removeprefix(BOM) if number == 1 else line
            if long:
                yield number, Broken(f"it has over {LONGEST_ROW:,} bytes")
            elif line.strip():
                parsed = _parsed(line)
                torn_here = isinstance(parsed, Broken) and not whole
                yield number, Broken("the file ends in the middle of it") if torn_here else parsed


def _parsed(data: bytes) -> Fields | Broken:
    try:
        value = parse_json(data, LONGEST_ROW)
    except BadRequest as error:
        return Broken(error.message.replace("the body", "it"))
    return value if isinstance(value, dict) else Broken("it is not a JSON object")


def _not_utf_8(path: Path) -> ConfigError:
    return ConfigError(f"{path} is not UTF-8", "Save it as UTF-8.")
