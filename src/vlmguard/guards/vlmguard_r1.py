"""VLMGuard-R1: a reasoning rewriter in front of the target.

Paper: VLMGuard-R1: Proactive Safety Alignment for VLMs via Reasoning-Driven Prompt Optimization, arXiv 2504.12661,
section "inference": the target gets the original image and the rewritten text; its weights stay as they are.
Calls: one of the gate for every request and one of the target; for a risky request also one of the rewriter and one of
the gate on its output.
Differs: the paper rewrites every request. Here a gate lets harmless ones pass unchanged, the whole conversation and
every picture are judged, words drawn in pictures are read, and the rewriter's output is checked before it is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass, field, replace

from vlmguard.chat import Action, Chat, Response, Step, Usage
from vlmguard.errors import ConfigError, ImageError, RewriteUnreadable, Timeout, VLMGuardError
from vlmguard.guards.policy import OPERATORS_OWN, REFUSAL, Policy, wrapped
from vlmguard.rewriter.protocol import Rewrite, check_prompt
from vlmguard.rewriter.rewriter import Rewriter
from vlmguard.vlms.protocol import VLM, Capability, closing, need

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
        async with closing(self._target().stream(screened.chat)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Response):
                    piece = replace(piece, usage=piece.usage + screened.usage, trace=(*piece.trace, screened.step))
                yield piece

    async def aclose(self) -> None:
        if self.target is not None:
            await self.target.aclose()

    async def gate(self, chat: Chat) -> Screened:
        """The verdict alone: `passed` or `flagged`; nothing is rewritten."""
        verdict = await self.rewriter.judge(chat)
        return replace(
            self._done(chat, chat, "flagged" if verdict.risk >= self.limit else "passed", verdict), usage=verdict.usage
        )

    async def screen(self, chat: Chat) -> Screened:
        """Judge, and for a risky chat rewrite, by the policy, which also says what to do when the rewriter fails.

        Raises:
            ImageError: a picture that cannot be read is not passed on unseen.
        """
        if self.policy.mode == "off" and not self.policy.categories:
            step = Step(NAME, "passed", sent=chat.text, threshold=self.limit, note="policy: off")
            return Screened(chat, step, Usage(), chat)
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
        except TimeoutError:  # of a rewriter that does not translate it (F027)
            screened = self._failed(chat, verdict, Timeout("the rewriter did not answer in time"))
        usage = sum(spent, Usage())
        return replace(screened, usage=replace(usage, seconds=time.perf_counter() - begun))

    async def _by_policy(self, chat: Chat, verdict: Rewrite, spent: list[Usage]) -> Screened:
        if verdict.risk >= self.limit and verdict.category is None and self.policy.categories:
            verdict = await self._write(chat, verdict, spent)  # a prompted gate names no category, its rewrite does
        mode = self.policy.mode_of(verdict.category)
        if verdict.risk < self.limit or mode == "off":
            return self._done(chat, chat, "passed", verdict)
        if mode == "shadow":
            return self._done(chat, chat, "flagged", verdict)
        if mode == "block":
            return self._done(chat, None, "refused", verdict)
        rewrite = await self._write(chat, verdict, spent)
        assert rewrite.prompt is not None
        check_prompt(rewrite.prompt, chat.text, rewrite.analysis)
        again = await self.rewriter.judge(Chat.of(rewrite.prompt))
        spent.append(again.usage)
        if again.risk >= self.limit:
            raise RewriteUnreadable(f"the rewritten request is itself judged risky ({again.risk:.2f})")
        return self._done(chat, await self._pictures(chat.with_text(rewrite.prompt), verdict), "rewrote", rewrite)

    async def _write(self, chat: Chat, verdict: Rewrite, spent: list[Usage]) -> Rewrite:
        """The verdict with its rewrite, which some rewriters give at once."""
        if verdict.prompt is not None:
            return verdict
        rewrite = await self.rewriter(chat, verdict)
        spent.append(rewrite.usage)
        if rewrite.prompt is None:  # a prompted model may take back its first word
            raise RewriteUnreadable("the gate found it risky, the rewriter wrote no request")
        return replace(rewrite, risk=verdict.risk, seen=verdict.seen)

    async def _pictures(self, chat: Chat, verdict: Rewrite) -> Chat:
        """The image policy: pictures with words in a risky request are kept, painted over, or withheld."""
        worded = self._worded(chat, verdict)
        if not any(worded) or self.policy.pictures == "withhold":
            return _without(chat, worded)
        from vlmguard.rewriter.masking import masked

        pairs = zip(chat.images, worded, strict=True)
        return chat.with_images([await asyncio.to_thread(masked, image) if has else image for image, has in pairs])

    def _worded(self, chat: Chat, verdict: Rewrite | None) -> list[bool]:
        """Which pictures the image policy is about; all of them where it isn't known which one has the words."""
        seen = verdict.seen if verdict else ()
        if self.policy.pictures == "keep" or (seen and not any(one.words.strip() for one in seen)):
            return [False] * len(chat.images)
        known = len(seen) == len(chat.images)  # an animation has several
        return [bool(one.words.strip()) for one in seen] if known else [True] * len(chat.images)

    def _failed(self, chat: Chat, verdict: Rewrite | None, error: VLMGuardError) -> Screened:
        kind = self.policy.on_failure(error)
        category = verdict.category if verdict else None
        modes = {self.policy.mode_of(category)} if category else {self.policy.mode, *self.policy.categories.values()}
        if modes <= {"off", "shadow"} and not isinstance(error, OPERATORS_OWN):
            kind = "open"
        known = verdict or Rewrite(risk=1.0)
        note = f"{type(error).__name__}: {error}"
        if kind == "open":
            return self._done(chat, chat, "flagged", known, note)
        if kind == "refuse":
            return self._done(chat, None, "refused", known, note)
        sent = _without(chat.with_text(wrapped(chat.text)), self._worded(chat, verdict))
        return self._done(chat, sent, "rewrote", known, f"static wrapper; {note}")

    def _done(
        self, original: Chat, sent: Chat | None, action: Action, rewrite: Rewrite, note: str | None = None
    ) -> Screened:
        step = Step(
            NAME,
            action,
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


def _without(chat: Chat, left_out: Sequence[bool]) -> Chat:
    """The chat without some of its pictures."""
    if not any(left_out):
        return chat
    return chat.with_images([None if out else image for image, out in zip(chat.images, left_out, strict=True)])
