"""A guard in front of the target, in the two forms that guards have: one reads the request, the other the answer too."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol, cast

from vlmguard.chat import Chat, Image, Other, Part, Response, Step, Text
from vlmguard.errors import BadRequest
from vlmguard.gateway.breaker import shared_seconds
from vlmguard.gateway.facts import Facts
from vlmguard.gateway.tracing import CONTEXT, Tracing
from vlmguard.gateway.upstream import Answer, Call, Target, said_here
from vlmguard.gateway.wire import CHAT
from vlmguard.guards.policy import REFUSAL
from vlmguard.guards.vlmguard_r1 import Screened, VLMGuardR1
from vlmguard.vlms.completions import completion
from vlmguard.vlms.protocol import VLM

SAME: Final = (
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "stop",
)  # fields of a chat that mean the same in every API


class Guard(Protocol):
    """Answers a call, guarded; what it did goes into the facts."""

    def open(self, call: Call, facts: Facts) -> AbstractAsyncContextManager[Answer]: ...


@dataclass(frozen=True)
class Screening:
    """A guard that reads the request alone: the target's answer passes through as it comes."""

    guard: VLMGuardR1
    target: Target
    seconds: float
    tracing: Tracing

    @asynccontextmanager
    async def open(self, call: Call, facts: Facts) -> AsyncIterator[Answer]:
        begun = time.perf_counter()
        with self.tracing.span("guard") as span:
            screened = await self.screen(call.chat)
            span.set(action=screened.step.action, risk=screened.step.risk, category=screened.step.category)
        facts.screened(screened.step, time.perf_counter() - begun)
        if screened.chat is None:
            async with said_here(call, Response(REFUSAL, "stop", screened.usage)) as answer:
                yield answer
            return
        async with asked(self.target, replace(call, chat=screened.chat), facts, self.tracing) as answer:
            yield answer

    async def screen(self, chat: Chat) -> Screened:
        """What the guard makes of it, in `seconds`; the target is not asked."""
        with shared_seconds(self.seconds):
            return await self.guard.screen(chat)


@dataclass(frozen=True)
class Holding:
    """A guard that has to see the answer (ECSO, a moderator of answers): a stream is held back until it is judged."""

    guard: VLM
    target: VLM

    async def aclose(self) -> None:
        await self.guard.aclose()
        await self.target.aclose()  # whether or not the guard did

    @asynccontextmanager
    async def open(self, call: Call, facts: Facts) -> AsyncIterator[Answer]:
        facts.held = call.conversation.stream
        begun = time.perf_counter()
        response = await self.guard(as_completions(call))
        step = response.trace[-1] if response.trace else Step(self.guard.name, "passed")
        facts.screened(step, time.perf_counter() - begun)
        async with said_here(call, as_judged(response)) as answer:
            yield answer


def as_completions(call: Call) -> Chat:
    """The chat as chat completions spells it, whatever the API: the guard asks the target itself.

    Raises BadRequest for tools of another API: the answer's calls would have no way back.
    """
    if call.wire is CHAT:
        return call.chat
    turns = [(turn.role, list(turn.parts)) for turn in call.chat.messages]
    if call.chat.extra.get("tools") or any(isinstance(part, Other) for _, parts in turns for part in parts):
        raise BadRequest(f"this gateway's guard takes no tools on {call.wire.path}", f"Use {CHAT.path}.", param="tools")
    messages = [{"role": role, "content": [_part(part) for part in parts]} for role, parts in turns]
    return Chat.parse(
        {**{name: call.chat.extra[name] for name in SAME if name in call.chat.extra}, "messages": messages}
    )


def _part(part: Part) -> Any:
    return Image.of(part.url).raw if isinstance(part, Image) else {"type": "text", "text": cast(Text, part).text}


def as_judged(response: Response) -> Response:
    """The response without the server's own answer where that says something else, or more, than the guard saw."""
    choices = response.raw.get("choices") if isinstance(response.raw, dict) else None
    if not choices or (len(choices) == 1 and completion(response.raw, 0).text == response.text):
        return response
    return replace(response, raw=None)


@dataclass(frozen=True)
class Plain:
    """No guard: an operator's own decision for a route or a key."""

    target: Target
    tracing: Tracing

    @asynccontextmanager
    async def open(self, call: Call, facts: Facts) -> AsyncIterator[Answer]:
        facts.action = "passed"
        async with asked(self.target, call, facts, self.tracing) as answer:
            yield answer


@asynccontextmanager
async def asked(target: Target, call: Call, facts: Facts, tracing: Tracing) -> AsyncIterator[Answer]:
    """The target's answer; how long it took to begin goes into the facts."""
    begun = time.perf_counter()
    with tracing.span("upstream", stream=call.conversation.stream) as span:
        if onward := span.onward(call.headers):
            call = replace(call, headers=[*onward, *(pair for pair in call.headers if pair[0] not in CONTEXT)])
        async with target.open(call) as answer:
            facts.upstream_first_byte_seconds = time.perf_counter() - begun
            span.set(status=answer.status)
            yield answer
