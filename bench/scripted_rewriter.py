"""Rewriters without a model, for bench/gateway.py: one finds everything harmless, the other everything risky."""

from __future__ import annotations

from vlmguard.chat import Chat
from vlmguard.rewriter.protocol import Analysis, Rewrite


class Harmless:
    name = "scripted:harmless"
    threshold = 0.5

    async def judge(self, chat: Chat) -> Rewrite:
        return Rewrite(0.1)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        return Rewrite(0.1)

    async def aclose(self) -> None:
        pass


class Risky(Harmless):
    name = "scripted:risky"

    async def judge(self, chat: Chat) -> Rewrite:
        return Rewrite(0.1 if chat.text.startswith("Safely") else 0.9, "fraud")

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        analysis = Analysis("Asks for something.", "Shows something.", "Together nothing more.")
        return Rewrite(0.9, "fraud", analysis, "Safely tell me what I should know of this.")
