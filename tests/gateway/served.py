"""`vlmguard serve` in a process of its own, and other servers beside it, for tests that talk to real ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent.parent
SCRIPTED: Final = f"{ROOT / 'tests' / 'stand_ins.py'}:Rewriter"  # judges by the word "risky"
START_SECONDS: Final = 60.0
STOP_SECONDS: Final = 20.0
BANNER: Final = re.compile(r" at (http://127\.0\.0\.1:\d+)/v1$", re.MULTILINE)


@contextmanager
def process(command: list[str], log: Path, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """A server in the block, started in the log's folder; what it says goes into the log."""
    settings = {**os.environ, **(environment or {})}
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, cwd=log.parent, env=settings
        )
    try:
        yield
    finally:
        running.terminate()
        try:
            running.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()


def until_ready(url: str, log: Path, seconds: float = START_SECONDS) -> None:
    """Raises RuntimeError with the end of the log when the address does not answer in time."""
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{url} did not answer:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def serving(settings: str, folder: Path, environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The address of `vlmguard serve` with these settings (TOML) on a free port, with the scripted rewriter; its files are
    the folder's."""
    config, log = folder / "vlmguard.toml", folder / "serve.log"
    config.write_text(settings, encoding="utf-8")
    command = [sys.executable, "-m", "vlmguard", "serve", "--config", str(config), "--rewriter", SCRIPTED]
    with process([*command, "--host", "127.0.0.1", "--port", "0"], log, environment):
        ends = time.monotonic() + START_SECONDS
        while not (said := BANNER.search(log.read_text(errors="replace"))):
            if time.monotonic() > ends:
                raise RuntimeError(f"the gateway did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        until_ready(f"{said[1]}/health/ready", log)
        yield said[1]
