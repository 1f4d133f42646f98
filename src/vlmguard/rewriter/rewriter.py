"""What a rewriter is, and the one that any VLM can be: prompted with the instructions, or trained to the format."""

from __future__ import annotations

import asyncio
import io
import math
import time
from dataclasses import dataclass, replace
from typing import Final, Protocol, runtime_checkable

import PIL.Image

from vlmguard.chat import Chat, Image, Response, TokenLogprob
from vlmguard.errors import RewriteUnreadable
from vlmguard.images import frames
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

    Calls: one with a single output token where the VLM gives logprobs (its first token is the verdict), and one more
    for a risky chat; else one of the whole output.

    Args:
        vlm: sees every picture of the chat, of an animation every frame, and all its text as quoted data.
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
        asked = await self._asked(chat)
        answer = await self.vlm(asked.with_extra(max_tokens=1, logprobs=True, top_logprobs=20))
        if not answer.logprobs:
            written = await self._written(chat)
            return replace(written, usage=answer.usage + written.usage)
        return Rewrite(verdict_probability(answer.logprobs[0]), usage=answer.usage)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        return await self._written(chat, verdict.risk if verdict else None)

    async def aclose(self) -> None:
        await self.vlm.aclose()

    async def _written(self, chat: Chat, risk: float | None = None) -> Rewrite:
        asked = await self._asked(chat)
        begun = time.perf_counter()
        answer: Response = await self.vlm(asked.with_extra(max_tokens=MAX_OUTPUT_TOKENS))
        usage = answer.usage if answer.usage.seconds else replace(answer.usage, seconds=time.perf_counter() - begun)
        if answer.finish_reason == "length":
            problem = f"the rewriter was cut off at {MAX_OUTPUT_TOKENS} tokens"
            raise RewriteUnreadable(problem, "Use a rewriter trained on the format.")
        return replace(parse_output(answer.text, risk), usage=usage)

    async def _asked(self, chat: Chat) -> Chat:
        return await asyncio.to_thread(question, chat, instructed=self.instructed)


def question(chat: Chat, *, instructed: bool) -> Chat:
    """The chat as data, in one user turn behind all its pictures: what a rewriter is asked, and trained on.

    Raises ImageError where a picture cannot be read.
    """
    pictures = [shot for image in chat.images for shot in _shots(image)]
    asked = Chat.of(render_input(chat, whole=True), temperature=0).with_images(pictures)
    return asked.with_system(INSTRUCTIONS) if instructed else asked


def _shots(image: Image) -> list[str | bytes]:
    """A picture as it came, or an animation's frames as PNG: most servers show a model the first one alone (F400)."""
    shots = frames(image)
    return [image.url] if len(shots) == 1 else [_png(shot) for shot in shots]


def _png(frame: PIL.Image.Image) -> bytes:
    data = io.BytesIO()
    frame.save(data, "PNG")
    return data.getvalue()


def verdict_probability(first: TokenLogprob) -> float:
    """P(risky) / (P(risky) + P(safe)) from the first token's alternatives.

    A token counts for the verdict that it begins ("ris", " Risky", "▁safe"). Raises RewriteUnreadable when there is
    neither.
    """
    mass = dict.fromkeys(VERDICTS, 0.0)
    for token, logprob in {first.token: first.logprob, **first.top}.items():
        bare = token.strip("▁Ġ \t\r\n").lower()
        for verdict in VERDICTS:
            if len(bare) > 1 and verdict.startswith(bare):
                mass[verdict] += math.exp(logprob)
    total = sum(mass.values())
    if total < 0.01:
        remedy = "Expected safe or risky: use a larger or a trained rewriter."
        raise RewriteUnreadable(f"the rewriter's first token is {first.token!r}", remedy)
    return mass["risky"] / total
