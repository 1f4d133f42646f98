"""VLMGuard-R1: a reasoning rewriter in front of the target.

Paper: VLMGuard-R1: Proactive Safety Alignment for VLMs via Reasoning-Driven Prompt Optimization, arXiv 2504.12661, section
"inference": the target gets the original image and the rewritten text; its weights stay as they are.
Calls: one of the gate for every request; for a risky one also one of the rewriter, one of the gate on its output, one of the target.
Differs: the paper rewrites every request. Here a gate lets harmless ones pass unchanged, the whole conversation and every picture
are judged, words drawn in pictures are read, and the rewriter's output is checked before it is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass, field, replace

from vlmguard.chat import Chat, Response, Step, Usage
from vlmguard.errors import AuthenticationFailed, ConfigError, ImageError, RewriteUnreadable, VLMGuardError
from vlmguard.guards.policy import REFUSAL, Policy, wrapped
from vlmguard.rewriter.protocol import Rewrite, check_prompt
from vlmguard.rewriter.rewriter import Rewriter
from vlmguard.vlms.protocol import VLM, Capability, need

NAME = "vlmguard-r1"


@dataclass(frozen=True)
class Screened:
    """What the guard makes of a chat, without the target: `chat` is what to send, None when refused."""

    chat: Chat | None
    step: Step
    usage: Usage
    original: Chat


@dataclass
class VLMGuardR1:
    """
    Args:
        target: the VLM to protect; None to screen only.
        rewriter: judges and rewrites.
        threshold: of the gate's probability; by default the rewriter's own, calibrated one.
    """

    target: VLM | None
    rewriter: Rewriter
    policy: Policy = field(default_factory=Policy)
    threshold: float | None = None
    needs = frozenset({Capability.TEXT})

    def __post_init__(self) -> None:
        if self.target is not None:
            need(self.target, self.needs, NAME)
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ConfigError.wrong("threshold", expected="a probability in [0, 1]", got=self.threshold)

    @property
    def name(self) -> str:
        return f"{NAME}({self.target.name if self.target else ''})"

    @property
    def can(self) -> frozenset[Capability]:
        """A guarded model answers chats; its insides are not offered, since they would go round the guard."""
        offered = {Capability.TEXT, Capability.NO_IMAGE, Capability.TEMPERATURE, Capability.LOGPROBS}
        return frozenset(offered & self.target.can) if self.target else frozenset()

    async def __call__(self, chat: Chat) -> Response:
        screened = await self.screen(chat)
        if screened.chat is None:
            return Response(REFUSAL, "stop", screened.usage).with_step(screened.step)
        answer = await self._target()(screened.chat)
        return replace(answer, usage=answer.usage + screened.usage, trace=(*answer.trace, screened.step))

    async def stream(self, chat: Chat) -> AsyncIterator[str | Response]:
        screened = await self.screen(chat)
        if screened.chat is None:
            yield REFUSAL
            yield Response(REFUSAL, "stop", screened.usage).with_step(screened.step)
            return
        async for piece in self._target().stream(screened.chat):
            if isinstance(piece, Response):
                piece = replace(piece, usage=piece.usage + screened.usage, trace=(*piece.trace, screened.step))
            yield piece

    async def aclose(self) -> None:
        if self.target is not None:
            await self.target.aclose()

    async def gate(self, chat: Chat) -> Screened:
        """The verdict alone: `passed` or `flagged`; nothing is rewritten."""
        verdict = await self.rewriter.judge(chat)
        action = "flagged" if verdict.risk >= self.limit else "passed"
        step = Step(NAME, action, sent=chat.text, risk=verdict.risk, category=self._named(verdict), threshold=self.limit)  # type: ignore[arg-type]
        return Screened(chat, step, verdict.usage, chat)

    async def screen(self, chat: Chat) -> Screened:
        """Judge, and for a risky chat rewrite, by the policy. Never raises for a failing rewriter: that is the policy's too.

        Raises:
            ImageError: a picture that cannot be read is not passed on unseen.
        """
        if self.policy.mode == "off" and not self.policy.categories:
            return Screened(chat, Step(NAME, "passed", sent=chat.text, threshold=self.limit, note="policy: off"), Usage(), chat)
        begun = time.perf_counter()
        spent: list[Usage] = []
        verdict: Rewrite | None = None
        try:
            verdict = await self.rewriter.judge(chat)
            spent.append(verdict.usage)
            screened = await self._by_policy(chat, verdict, spent)
        except ImageError:
            raise
        except VLMGuardError as error:
            screened = self._failed(chat, verdict, error)
        usage = sum(spent, Usage())
        return replace(screened, usage=replace(usage, seconds=time.perf_counter() - begun))

    async def _by_policy(self, chat: Chat, verdict: Rewrite, spent: list[Usage]) -> Screened:
        mode = self.policy.mode_of(verdict.category)
        if verdict.risk < self.limit or mode == "off":
            return self._done(chat, chat, "passed", verdict)
        if mode == "shadow":
            return self._done(chat, chat, "flagged", verdict)
        if mode == "block":
            return self._done(chat, None, "refused", verdict)
        rewrite = await self.rewriter(chat, verdict)
        spent.append(rewrite.usage)
        if rewrite.prompt is None:  # a prompted model may take back its first word
            return self._failed(chat, verdict, RewriteUnreadable("the gate found it risky, the rewriter wrote no request"))
        check_prompt(rewrite.prompt, chat.text)
        again = await self.rewriter.judge(Chat.of(rewrite.prompt))
        spent.append(again.usage)
        if again.risk >= self.limit:
            raise RewriteUnreadable(f"the rewritten request is itself judged risky ({again.risk:.2f})")
        sent = await self._pictures(chat.with_text(rewrite.prompt), verdict)
        return self._done(chat, sent, "rewrote", replace(rewrite, risk=verdict.risk))

    async def _pictures(self, chat: Chat, verdict: Rewrite) -> Chat:
        """The image policy: words in the pictures of a risky request are kept, painted over, or withheld with their picture."""
        if self.policy.pictures == "keep" or not any(seen.words for seen in verdict.seen):
            return chat
        if self.policy.pictures == "withhold":
            return chat.without_images()
        from vlmguard.rewriter.masking import masked

        return chat.with_images([await asyncio.to_thread(masked, image) for image in chat.images])

    def _failed(self, chat: Chat, verdict: Rewrite | None, error: VLMGuardError) -> Screened:
        kind = self.policy.on_failure(error)
        if self.policy.mode == "shadow" and not isinstance(error, AuthenticationFailed):
            kind = "open"
        known = verdict or Rewrite(risk=1.0)
        note = f"{type(error).__name__}: {error}"
        if kind == "open":
            return self._done(chat, chat, "flagged", known, note)
        if kind == "refuse":
            return self._done(chat, None, "refused", known, note)
        return self._done(chat, chat.with_text(wrapped(chat.text)), "rewrote", known, f"static wrapper; {note}")

    def _done(self, original: Chat, sent: Chat | None, action: str, rewrite: Rewrite, note: str | None = None) -> Screened:
        step = Step(
            NAME,
            action,  # type: ignore[arg-type]
            asdict(rewrite.analysis) if rewrite.analysis else None,
            sent.text if sent is not None else None,
            rewrite.risk,
            self._named(rewrite),
            self.limit,
            note,
        )
        return Screened(sent, step, Usage(), original)

    def _named(self, verdict: Rewrite) -> str | None:
        return verdict.category if verdict.risk >= self.limit else None

    @property
    def limit(self) -> float:
        return self.rewriter.threshold if self.threshold is None else self.threshold

    def _target(self) -> VLM:
        if self.target is None:
            raise ConfigError("this guard has no target", "Give one: VLMGuardR1(target, rewriter).")
        return self.target
