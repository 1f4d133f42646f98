"""A scripted rewriter for tests of the command line, and the guard round it while the real one is not there.

The words of a request say what happens: "risky" is judged risky, "slow" takes a while, "unreadable" breaks the rewriter,
"locked" meets a server that refuses the key.
"""

import asyncio
import importlib.util
import sys
import time
from dataclasses import dataclass
from types import ModuleType

import pytest

from vlmguard import load
from vlmguard.chat import Action, Chat, Response, Step, Usage
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
        risky = "risky" in chat.text
        return Rewrite(0.9 if risky else 0.1, "fraud" if risky else None)

    async def __call__(self, chat: Chat) -> Rewrite:
        verdict = await self.judge(chat)
        if verdict.category is None:
            return verdict
        return Rewrite(verdict.risk, verdict.category, ANALYSIS, f"Safely: {chat.text}")

    async def aclose(self) -> None:
        pass


@dataclass(frozen=True)
class Policy:
    mode: str = "rewrite"
    failure: str = "closed"


@dataclass(frozen=True)
class Screened:
    chat: Chat | None
    step: Step
    usage: Usage
    original: Chat


class Guard:
    """What VLMGuardR1 promises, in short."""

    def __init__(self, target: VLM | None, rewriter: Rewriter, policy: Policy, threshold: float | None = None) -> None:
        self.target, self.rewriter, self.policy = target, rewriter, policy
        self.threshold = rewriter.threshold if threshold is None else threshold

    async def __call__(self, chat: Chat) -> Response:
        assert self.target is not None
        screened = await self.screen(chat)
        if screened.chat is None:
            return Response("I can't help with that.", usage=screened.usage, trace=(screened.step,))
        answer = await self.target(screened.chat)
        return answer.plus(screened.usage).with_step(screened.step)

    async def screen(self, chat: Chat) -> Screened:
        started = time.perf_counter()
        try:
            rewrite = Rewrite(0.0) if self.policy.mode == "off" else await self.rewriter(chat)
        except RewriteUnreadable as error:
            action: Action = "refused" if self.policy.failure == "closed" else "passed"
            step = Step("vlmguard-r1", action, threshold=self.threshold, note=str(error))
            return Screened(None if action == "refused" else chat, step, Usage(1), chat)
        risky = rewrite.risk >= self.threshold
        actions: dict[str, Action] = {"shadow": "flagged", "rewrite": "rewrote", "block": "refused"}
        action = actions[self.policy.mode] if risky else "passed"
        sent = rewrite.prompt if action == "rewrote" else None
        analysis = vars(rewrite.analysis) if rewrite.analysis and risky else None
        category = rewrite.category if risky else None
        step = Step("vlmguard-r1", action, analysis, sent, rewrite.risk, category, self.threshold)
        passed_on = None if action == "refused" else chat.with_text(sent) if sent else chat
        return Screened(passed_on, step, Usage(1, 7, 3, time.perf_counter() - started), chat)

    async def gate(self, chat: Chat) -> Screened:
        rewrite = await self.rewriter.judge(chat)
        risky = rewrite.risk >= self.threshold
        action: Action = "flagged" if risky else "passed"
        step = Step("vlmguard-r1", action, None, None, rewrite.risk, rewrite.category, self.threshold)
        return Screened(chat, step, Usage(1, 7, 1, 0.001), chat)


def install(patch: pytest.MonkeyPatch, rewriter: Rewriter | None = None) -> Rewriter:
    """Puts the scripted rewriter behind every spec, and the guard above where the real one is not written yet."""
    chosen = rewriter or Rewriter()
    patch.setattr(load, "rewriter", lambda spec: chosen, raising=False)
    real = load.vlm
    patch.setattr(
        load,
        "vlm",
        lambda spec: (
            Scripted(lambda chat: f"You said: {chat.text}", name=spec) if spec.startswith("packaged:") else real(spec)
        ),
    )
    patch.setattr("vlmguard.vlms.assemble.ensure", lambda report=print: None)
    for name, value in (("policy", Policy), ("vlmguard_r1", Guard)):
        if importlib.util.find_spec(f"vlmguard.guards.{name}") is None:
            module = ModuleType(f"vlmguard.guards.{name}")
            setattr(module, {"policy": "Policy", "vlmguard_r1": "VLMGuardR1"}[name], value)
            patch.setitem(sys.modules, module.__name__, module)
    return chosen
