"""A row's pictures: files below its set's folder, members of the archives there, or bytes that the row holds.

None is decoded. A path that leads out of the folder, and an address, are refused: a data set must not make this
machine send its files, or fetch something.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Final, Self

from vlmguard.errors import ImageNotAllowed, ImageUnreadable
from vlmguard.images import open_url
from vlmguard.pixels import LIMITS, format_of, too_many_bytes
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Picture
from vlmguard.synthesis.sources.files import ARCHIVES, Files, torn

HEAD_BYTES: Final = 64  # that tell a picture's format
SHOWN_CHARACTERS: Final = 200


@dataclass
class Pictures:
    """Finds the pictures that a file's rows name. A context: it closes the archives that it opened.

    A path is looked for in `images` alone if that is given. Else it is seen from the file with the rows, from the
    folder there that is named as the split, and from the top of the set; then from the same places inside archives:
    that named as the split, or all where none is.
    """

    files: Files
    name: str
    split: str
    images: Path | None = None
    _opened: dict[str, _Archive] = field(default_factory=dict)
    _closing: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.clear()
        self._closing.close()

    def of(self, value: object, reference: str) -> Picture:
        """The picture that a row holds or names.

        Args:
            value: bytes; {"bytes", "path"} as `datasets` writes pictures into parquet; a path; or a data URI.
            reference: what to call one that has no path.

        Raises:
            ImageError: it is missing, too large, of a format that is not read, or somewhere else.
            BadRequest: it is none of these.
        """
        if isinstance(value, Mapping):
            if not isinstance(data := value.get("bytes"), bytes):
                return self.of(value.get("path"), reference)
            path = value.get("path")
            return _held(data, path if isinstance(path, str) and path else reference)
        if isinstance(value, bytes):
            return _held(value, reference)
        if not isinstance(value, str) or not value:
            raise unexpected("a picture", value, "image")
        if value[:5].lower() == "data:":
            return _held(open_url(value), reference)
        return self._named(value)

    def _named(self, path: str) -> Picture:
        if "://" in path[:SHOWN_CHARACTERS]:
            raise ImageNotAllowed("its picture is an address, which is not fetched", "Download it.")
        if path.startswith("/") or ".." in PurePosixPath(path).parts:
            raise ImageNotAllowed("its picture's path leads out of the folder", "Give the folder that it lies in.")
        shown = path[:SHOWN_CHARACTERS]
        if (file := self._file(path)) is not None:
            return _on_disk(file, shown)
        for archive in [] if self.images else self._archives():
            data = archive.read(path, self.split)
            if data is not None:
                return _held(data, shown)
        raise ImageUnreadable(f"its picture {shown} is missing", "Give the folder that it lies in.")

    def _file(self, path: str) -> Path | None:
        if self.images is not None:
            places = [self.images / path, self.images / self.split / path]
            return next((file for file in places if os.path.isfile(file)), None)  # noqa: PTH113 - a long name is missing
        beside = PurePosixPath(self.name).parent
        found = (self.files.fetch(str(place / path)) for place in (beside, beside / self.split, PurePosixPath()))
        return next((file for file in found if file is not None), None)

    def _archives(self) -> list[_Archive]:
        names = [name for name in self.files.names if name.endswith(ARCHIVES)]
        own = [name for name in names if PurePosixPath(name).stem.endswith(self.split)]
        for name in own or names:
            if name not in self._opened:
                self._opened[name] = _Archive.open(self.files.path(name), self._closing)
        return [self._opened[name] for name in own or names]


@dataclass
class _Archive:
    """An open ZIP or TAR; its members by their path in it."""

    file: Any
    members: dict[str, Any]

    @classmethod
    def open(cls, path: Path, closing: ExitStack) -> Self:
        """Raises ConfigError where it is damaged."""
        try:
            if path.suffix == ".zip":
                archive = closing.enter_context(zipfile.ZipFile(path))
                return cls(archive, {one.filename: one for one in archive.infolist() if not one.is_dir()})
            tar = closing.enter_context(tarfile.open(path, "r:"))  # noqa: SIM115 (closing does)
            return cls(tar, {one.name.removeprefix("./"): one for one in tar if one.isfile()})
        except (zipfile.BadZipFile, tarfile.TarError, OSError) as error:
            raise torn(path, "an archive") from error

    def read(self, path: str, split: str) -> bytes | None:
        """The member at `path`, seen from the archive's top, from the split's folder or the archive's own."""
        own = PurePosixPath(self._name).stem
        member = next(
            (found for at in ("", split, own) if (found := self.members.get(f"{at}/{path}".lstrip("/")))), None
        )
        if member is None:
            return None
        is_zip = isinstance(member, zipfile.ZipInfo)
        size = member.file_size if is_zip else member.size
        if size > LIMITS.bytes:
            raise too_many_bytes(size, LIMITS)
        try:
            data: bytes = self.file.read(member) if is_zip else self.file.extractfile(member).read()
        except (zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError) as error:
            raise ImageUnreadable(f"its picture {path[:SHOWN_CHARACTERS]} cannot be unpacked") from error
        return data

    @property
    def _name(self) -> str:
        return str(self.file.filename if isinstance(self.file, zipfile.ZipFile) else self.file.name)


def _held(data: bytes, reference: str) -> Picture:
    _check(data[:HEAD_BYTES], len(data))
    return Picture(reference, data=data)


def _on_disk(file: Path, reference: str) -> Picture:
    try:
        with file.open("rb") as opened:
            _check(opened.read(HEAD_BYTES), file.stat().st_size)
    except OSError as error:
        raise ImageUnreadable(f"its picture {reference} cannot be read: {error.strerror}") from error
    return Picture(reference, file=file)


def _check(start: bytes, size: int) -> None:
    """What can be told without decoding. Raises ImageError."""
    if size > LIMITS.bytes:
        raise too_many_bytes(size, LIMITS)
    if not start:
        raise ImageUnreadable("its picture is empty")
    format_of(start)
