"""What a terminal shows, and what a program that reads our standard output gets."""

import asyncio
import json
import os
import re
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

import stamina
from rich.console import Console
from rich.text import Text

from vlmguard.errors import VLMGuardError

PLAIN_WIDTH = 100  # columns where the output is no terminal
SHOW_AFTER_SECONDS = 2.0


def stdout() -> Console:
    return Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else 10_000)


def shown(text: str, style: str = "") -> Text:
    """Text from outside: no markup, and no control character, which could take the terminal over."""
    kept = "".join(char for char in text if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs"))
    return Text(kept, style)


def one_line(text: str) -> str:
    """The text on one line; the lines of a list are parted by semicolons."""
    return re.sub(r"\s*\n\s*", "; ", re.sub(r":\s*\n\s*", ": ", text.strip()))


def say(text: str, style: str = "") -> None:
    """A line on standard error."""
    stderr().print(shown(text, style))


def print_json(value: Any) -> None:
    """The only thing on standard output: one line for a program, several for a reader."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(value, ensure_ascii=not utf8, indent=2 if sys.stdout.isatty() else None)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def print_error(error: VLMGuardError, *, as_json: bool) -> None:
    if as_json:
        print_json({"error": {"type": type(error).__name__, "message": one_line(str(error))}})
    else:
        stderr().print(Text("error: ", "bold red") + shown(one_line(str(error))))


@contextmanager
def quietly() -> Iterator[None]:
    """Keeps the libraries below from writing to standard output, and their notices and bars to themselves."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
    ):
        os.environ.setdefault(name, value)
    stamina.instrumentation.set_on_retry_hooks(())  # a line for each try of each call
    with redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def busy(what: str) -> Iterator[Callable[[str], None]]:
    """A turning sign with `what`, on a terminal, until the work is done; gives what prints a line above it."""
    console = stderr()
    with console.status(what) if sys.stderr.isatty() else nullcontext():
        yield lambda line: console.print(shown(line))


class Bar:
    """A bar of progress that shows itself when the work takes over two seconds; lines where there is no terminal."""

    LINE_EVERY_SECONDS = 30.0

    def __init__(self, total: int | None, done: int, what: str = "Guarding") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=stderr(), transient=True)
        self._task = self._progress.add_task(what, total=total, completed=done)
        self._next: asyncio.TimerHandle | None = None
        self._text = ""

    def __enter__(self) -> "Bar":
        self._next = asyncio.get_running_loop().call_later(SHOW_AFTER_SECONDS, self._show)
        return self

    def __exit__(self, *_: object) -> None:
        if self._next is not None:
            self._next.cancel()
        if self._progress.live.is_started:
            self._progress.stop()

    def update(self, done: int, total: int | None, rows_per_second: float, more: str = "") -> None:
        self._progress.update(self._task, completed=done)
        of = "" if total is None else f" of {total}"
        self._text = f"{done}{of} rows, {rows_per_second:.1f} rows/s{more}"

    def _show(self) -> None:
        if sys.stderr.isatty():
            self._progress.start()
            return
        if self._text:
            say(self._text)
        wait = self.LINE_EVERY_SECONDS if self._text else SHOW_AFTER_SECONDS
        self._next = asyncio.get_running_loop().call_later(wait, self._show)
