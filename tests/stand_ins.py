"""Scripted models in the place of the packaged ones, for tests of the command line.

The words of a request say what happens: "risky" is judged risky, "slow" takes a while, "unreadable" breaks the
rewriter, "locked" meets a server that refuses the key.
"""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from vlmguard import load
from vlmguard.chat import Chat, Usage
from vlmguard.errors import AuthenticationFailed, RewriteUnreadable
from vlmguard.rewriter.protocol import Analysis, Rewrite
from vlmguard.vlms.protocol import VLM
from vlmguard.vlms.scripted import Scripted

THRESHOLD = 0.5
ANALYSIS = Analysis("Asks for something.", "Shows something.", "Together it is [bold]worse[/].")


class Rewriter:
    """Judges by the word "risky"; `most` is the largest number of requests it had at once."""

    name = "scripted:rewriter"
    threshold = THRESHOLD

    def __init__(self, slow_seconds: float = 0.2) -> None:
        self.slow_seconds = slow_seconds
        self.judged: list[Chat] = []
        self.most = self._now = 0

    async def judge(self, chat: Chat) -> Rewrite:
        self.judged.append(chat)
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            await asyncio.sleep(self.slow_seconds if "slow" in chat.text else 0)
        finally:
            self._now -= 1
        if "unreadable" in chat.text:
            raise RewriteUnreadable("the rewriter's output is not in its format")
        if "locked" in chat.text:
            raise AuthenticationFailed("the server refused the key", "Set VLMGUARD_API_KEY.")
        risky = "risky" in chat.text and not chat.text.startswith("Safely")
        return Rewrite(0.9 if risky else 0.1, "fraud" if risky else None, usage=Usage(1, 7, 1, 0.001))

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        verdict = verdict or await self.judge(chat)
        return Rewrite(verdict.risk, verdict.category, ANALYSIS, f"Safely: {chat.text}", Usage(1, 7, 20, 0.001))

    async def aclose(self) -> None:
        pass


def install(patch: pytest.MonkeyPatch, rewriter: Rewriter | None = None) -> Rewriter:
    """Puts scripted models in the place of the packaged ones."""
    chosen = rewriter or Rewriter()
    vlm, real = load.vlm, load.rewriter

    def assistant(spec: str) -> VLM:
        said = Scripted(lambda chat: f"You said: {chat.text}", name=spec)
        return said if spec == "packaged:assistant" else vlm(spec)

    patch.setattr(load, "vlm", assistant)
    patch.setattr(load, "rewriter", lambda spec: chosen if spec == "packaged:rewriter" else real(spec))
    patch.setattr("vlmguard.vlms.assemble.ensure", lambda report: None)
    return chosen


def read_lines(path: Path) -> list[Any]:
    """The objects in a JSONL file, each on a whole line."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def write_lines(path: Path, *values: Any) -> Path:
    """A JSONL file of the values; a string is a line as it is."""
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
