"""What a rewriter is, and the one that any VLM can be: prompted with the protocol's instructions, or trained to its format."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable

from vlmguard.chat import Chat, Response, TokenLogprob
from vlmguard.errors import RewriteUnreadable
from vlmguard.rewriter.protocol import INSTRUCTIONS, VERDICTS, Rewrite, parse_output, render_input
from vlmguard.vlms.protocol import VLM, Capability, need

MAX_OUTPUT_TOKENS: Final = 400
DEFAULT_THRESHOLD: Final = 0.5  # of a model without calibration


@runtime_checkable
class Rewriter(Protocol):
    """Judges a chat, and rewrites a risky one. `threshold` is the probability from which it calls a chat risky."""

    @property
    def name(self) -> str: ...

    @property
    def threshold(self) -> float: ...

    async def judge(self, chat: Chat) -> Rewrite:
        """The gate alone: risk in [0, 1] and, of a risky chat, its category."""
        ...

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        """The whole rewrite of a risky chat; judged first where no `verdict` is given. Raises RewriteUnreadable."""
        ...

    async def aclose(self) -> None: ...


@dataclass
class Prompted:
    """A rewriter on any VLM: an endpoint or a local model, zero-shot by instructions or with a trained adapter.

    Calls: one with a single output token where the VLM gives logprobs (its first token is the verdict), else one of the
    whole output; one more for a risky chat.

    Args:
        vlm: sees every picture of the chat, and its text as quoted data.
        instructed: send the instructions as a system message; a model trained on the format needs none.
    """

    vlm: VLM
    threshold: float = DEFAULT_THRESHOLD
    instructed: bool = True

    def __post_init__(self) -> None:
        need(self.vlm, {Capability.TEXT}, "a rewriter")

    @property
    def name(self) -> str:
        return self.vlm.name

    async def judge(self, chat: Chat) -> Rewrite:
        if Capability.LOGPROBS not in self.vlm.can:
            return await self._written(chat)
        asked = self._asked(chat).with_extra(max_tokens=1, logprobs=True, top_logprobs=20)
        answer = await self.vlm(asked)
        if not answer.logprobs:
            return await self._written(chat)
        return Rewrite(verdict_probability(answer.logprobs[0]), usage=answer.usage)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        return await self._written(chat, verdict.risk if verdict else None)

    async def aclose(self) -> None:
        await self.vlm.aclose()

    async def _written(self, chat: Chat, risk: float | None = None) -> Rewrite:
        begun = time.perf_counter()
        answer: Response = await self.vlm(self._asked(chat).with_extra(max_tokens=MAX_OUTPUT_TOKENS))
        usage = answer.usage if answer.usage.seconds else replace(answer.usage, seconds=time.perf_counter() - begun)
        if answer.finish_reason == "length":
            raise RewriteUnreadable(f"the rewriter was cut off at {MAX_OUTPUT_TOKENS} tokens", "Use a rewriter trained on the format.")
        return replace(parse_output(answer.text, risk), usage=usage)

    def _asked(self, chat: Chat) -> Chat:
        """The chat as data, in one user turn behind all its pictures."""
        asked = Chat.of(render_input(chat), temperature=0).with_images([image.url for image in chat.images])
        return asked.with_system(INSTRUCTIONS) if self.instructed else asked


def verdict_probability(first: TokenLogprob) -> float:
    """P(risky) / (P(risky) + P(safe)) from the first token's alternatives.

    A token counts for the verdict that it begins ("ris", " Risky"). Raises RewriteUnreadable when neither is among them.
    """
    mass = dict.fromkeys(VERDICTS, 0.0)
    for token, logprob in {first.token: first.logprob, **first.top}.items():
        bare = token.strip().lower()
        for verdict in VERDICTS:
            if len(bare) > 1 and verdict.startswith(bare):
                mass[verdict] += math.exp(logprob)
    total = sum(mass.values())
    if total < 0.01:
        raise RewriteUnreadable(f"the rewriter's first token is {first.token!r}", "Expected safe or risky: use a larger or a trained rewriter.")
    return mass["risky"] / total

