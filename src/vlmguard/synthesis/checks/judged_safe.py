"""Whether a rewriter that did not write it takes the rewritten request for safe."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import ClassVar

from vlmguard.errors import RewriteUnreadable
from vlmguard.rewriter.protocol import Rewrite
from vlmguard.rewriter.rewriter import Rewriter
from vlmguard.synthesis.checks.finding import NO_PROMPT, Finding
from vlmguard.synthesis.sample import Sample


@dataclass(frozen=True)
class JudgedSafe:
    """The request with its pictures, its earlier turns and the rewritten prompt is judged below `rewriter.threshold`.

    Calls: one judgement of the rewriter.
    """

    rewriter: Rewriter
    name: ClassVar[str] = "judged_safe"

    async def __call__(self, sample: Sample, rewrite: Rewrite) -> Finding:
        """Raises TargetError where the rewriter fails; ImageError."""
        if rewrite.prompt is None:
            return NO_PROMPT
        chat = await asyncio.to_thread(sample.chat, rewrite.prompt)
        try:
            verdict = await self.rewriter.judge(chat)
        except RewriteUnreadable:  # an answer, though none to build on
            return Finding(f"the judgement of {self.rewriter.name} on the rewritten prompt cannot be read")
        facts = {"rewriter": self.rewriter.name, "risk": round(verdict.risk, 4), "threshold": self.rewriter.threshold}
        if verdict.risk >= self.rewriter.threshold:
            risk = f"{verdict.risk:.2f}, threshold {self.rewriter.threshold:.2f}"
            return Finding(f"the rewritten prompt is still judged risky ({risk})", facts, verdict.usage)
        return Finding(None, facts, verdict.usage)
