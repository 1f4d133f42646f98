"""The packaged rewriter: a calibrated gate, then the packaged language model with our `rewriter` adapter."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from vlmguard.chat import Chat, Usage
from vlmguard.errors import ModelError, RewriteUnreadable
from vlmguard.images import frames, model_ready
from vlmguard.rewriter.protocol import VERDICTS, Rewrite, Seen, opening, parse_output, render_input

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from vlmguard.rewriter.gate import Gate
    from vlmguard.rewriter.sight import Sight
    from vlmguard.vlms.packaged import Base

FOLDER: Final = Path(__file__).parent.parent / "packaged"
MAX_PICTURES: Final = 4  # with image tokens in the generation; the gate sees every one
MAX_NEW_TOKENS: Final = 200
REMEMBERED: Final = 64  # pictures whose features and words are kept


@dataclass(frozen=True)
class Look:
    """One picture as the rewriter sees it."""

    features: Tensor  # (49, 1280) of the vision tower
    labels: tuple[str, ...]
    words: str


@dataclass
class PackagedRewriter:
    """Gate and rewriter on the packaged base. Thread-safe; one call computes at a time."""

    base: Base
    gate: Gate
    sight: Sight
    name: str = "packaged:rewriter"
    _looks: OrderedDict[str, list[Look]] = field(default_factory=OrderedDict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "rewriter"), repr=False)

    @classmethod
    def load(cls) -> PackagedRewriter:
        """Raises ModelError when the packaged weights are missing or the base can't be had."""
        from vlmguard.rewriter.gate import Gate
        from vlmguard.rewriter.sight import Sight
        from vlmguard.vlms.packaged import Base

        if not (FOLDER / "gate.json").is_file():
            raise ModelError(
                "the packaged rewriter's weights are missing",
                "Install vlmguard-r1 again, or train them: runs/packaged.sh.",
            )
        base = Base.load("rewriter")
        return cls(base, Gate.load(FOLDER), Sight.load(FOLDER, base.classifier))

    @property
    def threshold(self) -> float:
        return self.gate.threshold

    async def judge(self, chat: Chat) -> Rewrite:
        return await self._run(self._judge, chat)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        return await self._run(self._rewrite, chat, verdict)

    async def aclose(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Any, *arguments: Any) -> Rewrite:
        result: Rewrite = await asyncio.get_running_loop().run_in_executor(self._worker, call, *arguments)
        return result

    def _judge(self, chat: Chat) -> Rewrite:
        begun = time.perf_counter()
        looks = self._see(chat)
        risk, category = self.gate(chat, looks, lambda one: self._first_token(one, looks))
        seen = tuple(look_seen(look) for look in looks)
        return Rewrite(risk, category, usage=Usage(calls=1, seconds=time.perf_counter() - begun), seen=seen)

    def _first_token(self, chat: Chat, looks: Sequence[Look]) -> float:
        """How much likelier the rewriter begins with "risky" than with "safe", as a difference of logits."""
        shown = looks[:MAX_PICTURES]
        asked = render_input(chat, [look_seen(look) for look in shown])
        safe, risky = self.base.first_token(asked, [look.features for look in shown], VERDICTS).tolist()
        return float(risky - safe)

    def _rewrite(self, chat: Chat, verdict: Rewrite | None) -> Rewrite:
        begun = time.perf_counter()
        spent = Usage()
        if verdict is None:
            verdict = self._judge(chat)
            spent = verdict.usage
            if verdict.risk < self.threshold:
                return verdict
        looks = self._see(chat)[:MAX_PICTURES]
        asked = render_input(chat, [look_seen(look) for look in looks])
        start = opening(verdict.category)
        written, read, made = self.base.generate(asked, [look.features for look in looks], start, MAX_NEW_TOKENS)
        if made >= MAX_NEW_TOKENS:
            raise RewriteUnreadable(f"the rewriter was cut off at {MAX_NEW_TOKENS} tokens")
        rewrite = parse_output(start + written, verdict.risk)
        return replace(
            rewrite, usage=spent + Usage(1, read, made, time.perf_counter() - begun - spent.seconds), seen=verdict.seen
        )

    def _see(self, chat: Chat) -> list[Look]:
        """Every frame of every picture of the conversation, in order; what was seen before is remembered by its bytes."""
        looks: list[Look] = []
        for image in chat.images:
            key = _digest(image.url)
            if key not in self._looks:
                self._looks[key] = self._look([model_ready(frame) for frame in frames(image)])
                while len(self._looks) > REMEMBERED:
                    self._looks.popitem(last=False)
            self._looks.move_to_end(key)
            looks += self._looks[key]
        return looks

    def _look(self, pictures: Sequence[Image.Image]) -> list[Look]:
        distinct = _distinct(pictures)
        features = self.base.features(distinct)
        seen = self.sight(distinct, features.float().mean(1))
        return [Look(feature, one.labels, one.words) for feature, one in zip(features, seen, strict=True)]


def look_seen(look: Look) -> Seen:
    return Seen(look.labels, look.words)


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()


def _distinct(pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """The frames of an animation without those that look like the one before them."""
    kept: list[Image.Image] = []
    last = None
    for picture in pictures:
        small = picture.resize((64, 64)).tobytes()
        if small != last:
            kept.append(picture)
        last = small
    return kept
