"""What the tests of every API share: pictures, what a guard reads of a request, and the official SDKs without a network."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import anthropic
import httpx2
import openai
from hypothesis import strategies as st

from vlmguard.chat import Chat, Response, Usage
from vlmguard.gateway.wire import Conversation, Wire
from vlmguard.gateway.wire.problem import Problem
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_input

PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC",
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGNgYPgPAAEDAQAIicLsAAAAAElFTkSuQmCC",
)
OLD, NEW = (f"data:image/png;base64,{data}" for data in PNG)
CACHED: Final[dict[str, Any]] = {"cache_control": {"type": "ephemeral"}}
REWRITTEN: Final = "Safely: what should I know of this?"
SAID: Final = ("Kind ", "words.")
USAGE: Final = Usage(1, 7, 3, 0.1)

leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)
json_values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
more = st.fixed_dictionaries({}, optional={"cache_control": st.just({"type": "ephemeral"}), "x-unknown": json_values})
datas = st.sampled_from(PNG)
words = st.text(max_size=12)


class Suspicious:
    """A rewriter that finds all risky but what it wrote itself; `judged` holds what it was shown."""

    name = "scripted:suspicious"
    threshold = 0.5

    def __init__(self) -> None:
        self.judged: list[Chat] = []

    async def judge(self, chat: Chat) -> Rewrite:
        self.judged.append(chat)
        return Rewrite(0.1 if chat.text == REWRITTEN else 0.9, "fraud")

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        return Rewrite(0.9, "fraud", Analysis("Asks.", "Shows.", "Both."), REWRITTEN)

    async def aclose(self) -> None:
        pass


async def guarded(wire: Wire, body: Mapping[str, Any]) -> tuple[Chat, dict[str, Any]]:
    """What the rewriter was shown of a request, and what goes on in its place."""
    rewriter = Suspicious()
    asked = wire.read(body)
    screened = await VLMGuardR1(None, rewriter).screen(asked.chat)
    assert screened.chat is not None
    return rewriter.judged[0], wire.write(asked, screened.chat)


async def shown(wire: Wire, body: Mapping[str, Any]) -> str:
    """The text that the rewriter's model reads."""
    return render_input((await guarded(wire, body))[0], whole=True)


def same(one: Any, other: Any) -> bool:
    """As JSON, the order of keys included."""
    return json.dumps(one) == json.dumps(other)


def only_the_text_changed(old: Mapping[str, Any], new: Mapping[str, Any], text_types: Sequence[str]) -> None:
    """Of a turn: other parts are as they were and where they were, cache_control stays, one text holds the rewritten one."""
    assert same({**old, "content": 0}, {**new, "content": 0})
    if not isinstance(old.get("content"), list):
        assert new["content"] == REWRITTEN
        return
    before, after = ([part for part in turn["content"] if not _is_text(part, text_types)] for turn in (old, new))
    assert same(before, after)
    texts = [part for part in old["content"] if _is_text(part, text_types)]
    (text,) = (part for part in new["content"] if _is_text(part, text_types))
    assert text["text"] == REWRITTEN
    assert text["type"] in text_types
    assert {key for part in texts for key in part} <= text.keys()
    assert text.get("cache_control") == next((part["cache_control"] for part in texts if "cache_control" in part), None)
    if texts:
        assert new["content"].index(text) == old["content"].index(texts[0])


def _is_text(part: Any, text_types: Sequence[str]) -> bool:
    return part.get("type") in text_types


def replied(body: bytes, kind: str = "application/json", status: int = 200) -> httpx2.MockTransport:
    return httpx2.MockTransport(lambda _: httpx2.Response(status, content=body, headers={"content-type": kind}))


def openai_client(transport: httpx2.MockTransport) -> openai.OpenAI:
    client = httpx2.Client(transport=transport)
    return openai.OpenAI(api_key="none", base_url="http://gateway/v1", http_client=client, max_retries=0)


def anthropic_client(transport: httpx2.MockTransport) -> anthropic.Anthropic:
    client = httpx2.Client(transport=transport)
    return anthropic.Anthropic(api_key="none", base_url="http://gateway", http_client=client, max_retries=0)


def answered(wire: Wire, body: Mapping[str, Any], said: Response) -> httpx2.MockTransport:
    """Replies with an answer made here."""
    asked = wire.read(body)
    return replied(json.dumps(wire.answer(said, asked, "r1", 1)).encode())


async def streamed(wire: Wire, body: Mapping[str, Any], said: Response, *texts: str) -> httpx2.MockTransport:
    """Replies with a stream made here."""
    return replied(b"".join(await events(wire, wire.read(body), said, *texts)), "text/event-stream")


async def events(wire: Wire, asked: Conversation, said: Response, *texts: str) -> list[bytes]:
    async def pieces() -> AsyncIterator[str | Response]:
        for text in texts:
            yield text
        yield said

    return [event async for event in wire.stream(pieces(), asked, "r1", 1)]


def data_of(told: Sequence[bytes]) -> list[Any]:
    """The JSON of each event."""
    lines = (line for event in told for line in event.decode().splitlines() if line.startswith("data: "))
    return [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]


def raised(wire: Wire, status: int, call: Callable[[httpx2.MockTransport], object]) -> Exception:
    """What an SDK raises for an error of this status."""
    problem = Problem(status, "what happened. What to do.", "messages[0]")
    try:
        call(replied(json.dumps(wire.error(problem)).encode(), status=status))
    except (openai.OpenAIError, anthropic.AnthropicError) as error:
        return error
    raise AssertionError("the SDK took it for an answer")
