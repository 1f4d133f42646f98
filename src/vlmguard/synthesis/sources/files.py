"""The files of a data set: in a local folder here, on the hub in hub.py. Either way they are asked for by name."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from vlmguard import load
from vlmguard.errors import ConfigError
from vlmguard.synthesis.sample import Origin

ROWS: Final = (".parquet", ".json", ".jsonl")
ARCHIVES: Final = (".zip", ".tar")
# As the hub's tools name the parts of a split: train-00003-of-00008, with a hash behind it from older ones.
SHARD: Final = re.compile(r"(?P<split>.+)-\d{5}-of-(?P<count>\d{5})(-[0-9a-f]+)?")
COMMIT: Final = re.compile("[0-9a-f]{40}")
LICENCE: Final = re.compile(r"^\s*\"?license\"?\s*:\s*\"?([\w.+-]+)", re.MULTILINE)


@dataclass(frozen=True)
class Files:
    """What a data set consists of.

    Args:
        where: for messages.
        names: of its files, seen from its top, sorted. Of a local folder those with rows, and archives, alone.
        fetch: the local path of one, which the hub's client may have to download; None where it is missing.
        revision: a commit of the hub, where it is known.
        licence: as its card names it, where it has one.
        gated: what the hub says, None where it was not asked.
        alone: one file was asked for, not the whole set.
    """

    where: str
    names: tuple[str, ...]
    fetch: Callable[[str], Path | None]
    revision: str | None = None
    licence: str | None = None
    gated: bool | None = None
    alone: bool = False

    def origin(self, name: str, licence: str) -> Origin:
        """Of its samples; `licence` is what the set was known to have, for a copy without its card."""
        return Origin(name, self.licence or licence, self.revision)

    def path(self, name: str) -> Path:
        """Raises ConfigError where it is gone."""
        found = self.fetch(name)
        if found is None:
            raise ConfigError(f"{self.where} no longer has {name}", "Download it again.")
        return found

    def split(
        self, wanted: str | None, *suffixes: str, usual: str = "train", prefix: str = ""
    ) -> tuple[str, list[str]]:
        """The split that is wanted, else the `usual` one, else the only one; and its files' names.

        A file belongs to the split that it is named for: train.json, or train-00003-of-00008.parquet.

        Args:
            prefix: that the set puts before the names of its splits.

        Raises:
            ConfigError: there is no such split, or a part of it is missing.
        """
        found: dict[str, list[str]] = {}
        for name in self.names:
            if name.endswith(suffixes):
                found.setdefault(_split_of(name).removeprefix(prefix), []).append(name)
        if not found:
            expected = "The folder of the set, as it is when downloaded, or a file of it."
            raise ConfigError(f"{self.where} holds no {' or '.join(suffixes)} file", f"Expected: {expected}")
        if wanted is None:
            wanted = usual if usual in found else next(iter(found))
            if wanted != usual and len(found) > 1:
                raise ConfigError(f"{self.where} has no split {usual!r}", f"Name one of {', '.join(sorted(found))}.")
        if wanted not in found:
            raise load.unknown(f"split of {self.where}", wanted, found)
        if not self.alone:
            self._check_whole(wanted, found[wanted])
        return wanted, found[wanted]

    def _check_whole(self, split: str, names: list[str]) -> None:
        """An interrupted download must not pass for the whole split."""
        counts: dict[tuple[str, int], int] = {}
        for name in names:
            if shard := SHARD.fullmatch(Path(name).stem):
                key = (str(Path(name).parent), int(shard["count"]))
                counts[key] = counts.get(key, 0) + 1
        for (_, expected), count in counts.items():
            if count < expected:
                raise ConfigError(
                    f"{self.where} has {count} of the {expected} files of the split {split!r}",
                    "Download the rest, or give the path of one file to read it alone.",
                )


def in_folder(path: Path, revision: str | None = None) -> Files:
    """The files of a local copy: its folder, or one file with rows, beside whose folder's archives.

    Raises:
        ConfigError: there is no such path, or a folder in it cannot be read.
    """
    if not path.exists():
        raise ConfigError(f"there is no file or folder {path}", "Check the path.")
    root = path if path.is_dir() else path.parent

    def fetch(name: str) -> Path | None:
        return root / name if os.path.isfile(root / name) else None  # noqa: PTH113 - a name may be too long for Path's

    names = _names_in(root) if path.is_dir() else [path.name, *_archives_in(root)]
    return Files(
        str(path), tuple(names), fetch, revision or _commit(root), _licence(root), None, alone=not path.is_dir()
    )


def torn(path: Path, kind: str) -> ConfigError:
    """The error for a file that is not what its name says."""
    with path.open("rb") as file:
        start = file.read(40)
    if start.startswith(b"version https://git-lfs"):
        return ConfigError(f"{path} is a Git LFS pointer, not the file itself", "Fetch it with: git lfs pull")
    return ConfigError(f"{path} is not {kind}, or a part of it is missing", "Download it again.")


def _split_of(name: str) -> str:
    stem = Path(name).stem
    shard = SHARD.fullmatch(stem)
    return shard["split"] if shard else stem


def _names_in(root: Path) -> list[str]:
    def unreadable(error: OSError) -> NoReturn:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}", "Check its permissions.") from error

    names: list[str] = []
    for folder, inner, files in os.walk(root, onerror=unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]  # .git, the hub client's .cache
        below = Path(folder).relative_to(root)
        names += [(below / name).as_posix() for name in files if name.endswith((*ROWS, *ARCHIVES))]
    return sorted(names)


def _archives_in(root: Path) -> list[str]:
    return sorted(file.name for file in root.iterdir() if file.suffix in ARCHIVES)


def _commit(root: Path) -> str | None:
    """Of a copy that the hub's client made: in its cache by the folder's name, else by the notes it leaves."""
    if root.parent.name == "snapshots" and COMMIT.fullmatch(root.name):
        return root.name
    notes = sorted((root / ".cache" / "huggingface" / "download").glob("*.metadata"))
    commits = {note.read_text(errors="replace").partition("\n")[0].strip() for note in notes}
    known = commits.pop() if len(commits) == 1 else ""
    return known if COMMIT.fullmatch(known) else None


def _licence(root: Path) -> str | None:
    """As the copy's card has it in its front matter, YAML or JSON."""
    card = root / "README.md"
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = LICENCE.search(front[1]) if front else None
    return found[1] if found else None
