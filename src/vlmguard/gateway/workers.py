"""Metrics that several workers show together.

Every process has counters of its own, and a scrape reaches just one of them. So each writes its numbers into files of
one folder, prometheus_client's multiprocess mode, and whichever is scraped adds up all of them. The library chooses that
mode when it is imported, by the variable PROMETHEUS_MULTIPROC_DIR. `prepare_workers` makes the folder and sets the
variable; it is to be called in the parent, before its workers start and before anything imports the library, unless the
workers are new interpreters ("spawn").
"""

from __future__ import annotations

import atexit
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from vlmguard.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the library's name for it
FILE: Final = re.compile(r"(?:counter|histogram|summary|gauge_[a-z]+)_([0-9]{1,9})\.db")  # gauge_livesum_7.db


def prepare_workers() -> Path:
    """Makes the folder that the workers of this process share their numbers in; for before they start.

    A folder that PROMETHEUS_MULTIPROC_DIR names already is used, and emptied of what an earlier run left; else it is a
    temporary one, which goes when this process ends.

    Raises:
        ConfigError: the folder cannot be made.
    """
    given = os.environ.get(FOLDER)
    try:
        if given:
            folder = Path(given)
            folder.mkdir(parents=True, exist_ok=True)
            for process, file in _files(folder):
                if not _lives(process):
                    file.unlink(missing_ok=True)
            return folder
        folder = Path(tempfile.mkdtemp(prefix="vlmguard-metrics-"))
    except OSError as error:
        raise ConfigError(
            f"the workers' metrics cannot be shared: {error.strerror}", f"Set {FOLDER} to a folder that can be written."
        ) from None
    os.environ[FOLDER] = str(folder)
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a fork inherits the call, not the folder
        shutil.rmtree(folder, ignore_errors=True)


def shared_folder(registry: CollectorRegistry) -> Path | None:
    """The folder that several workers share, with the registry set to read it; None for one process by itself."""
    given = os.environ.get(FOLDER)
    if not given:
        return None
    if not Path(given).is_dir():
        raise ConfigError(f"{FOLDER} names no folder", "Unset it, or make the folder: it is for several workers.")
    from prometheus_client import values
    from prometheus_client.multiprocess import MultiProcessCollector

    if values.ValueClass is values.MutexValue:
        raise ConfigError(
            f"prometheus_client was imported before {FOLDER} was set: each worker would show its own numbers alone",
            "Set it, or call prepare_workers, before that import.",
        )
    MultiProcessCollector(registry, given)  # type: ignore[no-untyped-call]
    return Path(given)


def _files(folder: Path) -> Iterator[tuple[int, Path]]:
    """The library's files, each with the id of its process."""
    for file in folder.iterdir():
        if name := FILE.fullmatch(file.name):
            yield int(name[1]), file


def forget_the_dead(folder: Path) -> None:
    """Takes the gauges of dead workers out of the sums; what they counted stays."""
    from prometheus_client.multiprocess import mark_process_dead

    for process in {process for process, file in _files(folder) if file.name.startswith("gauge_live")}:
        if not _lives(process):
            with suppress(FileNotFoundError):  # another worker, scraped at the same time, was faster
                mark_process_dead(process, str(folder))  # type: ignore[no-untyped-call]


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
