"""A file of JSON lines that a killed process leaves whole: one write a line, and a torn last line is cut off on opening."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from vlmguard.errors import ConfigError, VLMGuardError


class Journal:
    """Objects by a key, appended, never changed; only the keys and places are held in memory.

    Args:
        key: the field that names an object; a second one of the same name is not written.

    Raises:
        ConfigError: the file is in use by another process, cannot be opened, or is no journal.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}", "Check its folder and your rights."
            ) from None
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The objects, in the order in which they were written."""
        for place in list(self._places.values()):
            yield self._at(place)

    def get(self, name: str) -> dict[str, Any] | None:
        place = self._places.get(name)
        return None if place is None else self._at(place)

    def append(self, told: Mapping[str, Any]) -> None:
        """Writes an object; it is there after a kill. Raises VLMGuardError where the disk takes no more: what was there stays."""
        name = told[self.key]
        if name in self._places:
            return
        line = json.dumps(told, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        written = 0
        try:
            while written < len(line):
                written += os.pwrite(self._file, line[written:], self._end + written)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise VLMGuardError(
                f"{self.path} cannot be written: {error.strerror}; {len(self)} lines are in it",
                "Make room, then run the same command with --resume: it goes on from there.",
            ) from error
        self._places[name] = (self._end, len(line))
        self._end += len(line)

    def _at(self, place: tuple[int, int]) -> dict[str, Any]:
        start, size = place
        told: dict[str, Any] = json.loads(os.pread(self._file, size, start))
        return told

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another process is writing {self.path}", "Wait for it, or give another --out."
            ) from None
        except OSError:
            pass  # a file system without locks

    def _read(self) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # torn: what it was to say is done again
                try:
                    name = json.loads(line)[self.key]
                except (ValueError, KeyError, TypeError):
                    problem = f"{self.path} is damaged: its line {number} has no {self.key}"
                    raise ConfigError(problem, "Give another --out, or remove the line.") from None
                self._places.setdefault(name, (self._end, len(line)))
                self._end += len(line)
        os.ftruncate(self._file, self._end)
