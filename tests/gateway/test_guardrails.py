"""The guard for who calls the model himself: /v1/guard, LiteLLM's generic guardrail, a webhook."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.gateway.running import Running, Upstream, running
from tests.stand_ins import Rewriter
from vlmguard.chat import Chat
from vlmguard.errors import BadRequest
from vlmguard.gateway.guardrails import GUARD, GUARDRAILS, LITELLM, TAKEN_OUT, WEBHOOK
from vlmguard.guards.policy import REFUSAL, Policy
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.rewriter.protocol import render_input

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}
WITHHOLD = Policy(pictures="withhold")
CALLS = [{"id": "c1", "type": "function", "function": {"name": "shell", "arguments": "calling words"}}]


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


async def told(path: str, body: dict[str, Any], policy: Policy | None = None) -> tuple[Chat, dict[str, Any]]:
    """What the rewriter was shown, and what the caller is told."""
    rewriter, rail = Rewriter(), GUARDRAILS[path]
    chat = rail.read(body)
    assert chat is not None
    screened = await VLMGuardR1(None, rewriter, policy or Policy()).screen(chat)
    return rewriter.judged[0], rail.answer(body, screened, "r1")


async def answer(path: str, body: dict[str, Any], policy: Policy | None = None) -> dict[str, Any]:
    return (await told(path, body, policy))[1]


def litellm(*messages: dict[str, Any], texts: list[str], **fields: Any) -> dict[str, Any]:
    """A request as LiteLLM 1.108 makes it."""
    nothing = ("litellm_call_id", "litellm_trace_id", "images", "tools", "tool_calls", "model", "request_headers")
    own: dict[str, Any] = {
        "input_type": "request",
        "texts": texts,
        "structured_messages": list(messages) or None,
        "request_data": {},
    }
    return {**dict.fromkeys(nothing), **own, **fields}


# LiteLLM


async def test_a_harmless_request_is_left_alone() -> None:
    assert await answer(LITELLM, litellm(user("hello"), texts=["hello"])) == {"action": "NONE"}
    shadow = await answer(LITELLM, litellm(user("risky"), texts=["risky"]), Policy("shadow"))
    assert shadow == {"action": "NONE"}


async def test_a_risky_request_is_blocked_where_the_policy_says_so() -> None:
    blocked = await answer(LITELLM, litellm(user("risky"), texts=["risky"]), Policy("block"))
    assert blocked == {"action": "BLOCKED", "blocked_reason": REFUSAL}


async def test_the_rewritten_text_stands_in_the_place_of_the_last_user_turns() -> None:
    messages = (
        {"role": "system", "content": [text("kind"), text("rules")]},
        user("earlier"),
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        user([text("risky"), IMAGE, text("more")]),
        {"role": "tool", "tool_call_id": "c1", "content": "a result"},
    )
    texts = ["kind", "rules", "earlier", "risky", "more", "a result"]
    said = await answer(LITELLM, litellm(*messages, texts=texts, images=[PIXEL]))
    new = ["kind", "rules", "earlier", "Safely: risky\nmore", TAKEN_OUT, "a result"]
    assert said == {"action": "GUARDRAIL_INTERVENED", "texts": new}


said = st.text(max_size=6)
turns = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "user", "assistant", "tool"]),
    said | st.lists(st.builds(text, said) | st.just(IMAGE), max_size=3) | st.none(),
)


@given(st.lists(turns, max_size=4), st.lists(said | st.just(""), max_size=2), st.booleans())
async def test_texts_keep_their_count_and_order(earlier: list[Any], others: list[str], trusted: bool) -> None:
    messages = [*earlier, user([text("risky"), IMAGE])]
    texts = [part["text"] for turn in messages for part in _texts(turn["content"])]
    if not trusted:
        messages, texts = earlier, [*others, "risky"]
    got = await answer(LITELLM, litellm(*messages, texts=texts))
    assert got["action"] == "GUARDRAIL_INTERVENED"
    assert got["texts"] == [*texts[:-1], "Safely: risky"]


def _texts(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [text(content)]
    return [part for part in content or () if part["type"] == "text"]


async def test_f008_messages_that_do_not_tell_the_texts_are_seen_but_not_trusted() -> None:
    body = litellm(user("a hostile wish"), user([IMAGE]), texts=["kind", "risky"], images=[PIXEL, "data:,other"])
    seen, got = await told(LITELLM, body)
    assert "a hostile wish" in render_input(seen)
    assert seen.text == "risky"
    assert [image.url for image in seen.images] == [PIXEL, "data:,other"]
    assert got == {"action": "GUARDRAIL_INTERVENED", "texts": ["kind", "Safely: risky"]}


async def test_a_picture_that_stands_beside_the_messages_is_seen() -> None:
    seen, _ = await told(LITELLM, litellm(user("hello"), texts=["hello"], images=[PIXEL]))
    assert [image.url for image in seen.images] == [PIXEL]


async def test_texts_and_pictures_alone_are_guarded() -> None:
    seen, got = await told(LITELLM, litellm(texts=["kind", "risky"], images=[PIXEL]))
    assert [turn.text for turn in seen.messages] == ["kind", "risky"]
    assert len(seen.images) == 1
    assert got == {"action": "GUARDRAIL_INTERVENED", "texts": ["kind", "Safely: risky"]}


async def test_tool_calls_alone_are_guarded() -> None:
    seen, got = await told(LITELLM, litellm(texts=[], tool_calls=CALLS))
    assert "calling words" in render_input(seen)
    assert got == {"action": "NONE"}


class Alarmed(Rewriter):
    """Finds every request risky."""

    async def judge(self, chat: Chat) -> Any:
        self.judged.append(chat)
        return await super().judge(Chat.of("Safely" if chat.text.startswith("Safely") else "risky"))


@pytest.mark.parametrize("trusted", [True, False])
async def test_f002_a_rewrite_without_a_text_to_replace_comes_in_messages_or_blocks(trusted: bool) -> None:
    messages = (user("earlier"), user([IMAGE])) if trusted else ()
    body = litellm(*messages, texts=["earlier"] if trusted else [], images=[PIXEL])
    chat = GUARDRAILS[LITELLM].read(body)
    assert chat is not None
    got = GUARDRAILS[LITELLM].answer(body, await VLMGuardR1(None, Alarmed()).screen(chat), "r1")
    if not trusted:
        assert got == {"action": "BLOCKED", "blocked_reason": REFUSAL}
        return
    assert got["texts"] == ["earlier"]
    assert got["structured_messages"] == [user("earlier"), user([IMAGE, text("Safely: ")])]


async def test_a_withheld_picture_is_withheld_in_messages_or_blocks() -> None:
    messages = (
        {"role": "system", "content": "kind"},
        user([text("risky", cache_control={"type": "ephemeral"}), IMAGE]),
    )
    got = await answer(LITELLM, litellm(*messages, texts=["kind", "risky"], images=[PIXEL]), WITHHOLD)
    assert (got["action"], got["texts"], got["images"]) == ("GUARDRAIL_INTERVENED", ["kind", "Safely: risky"], [])
    changed = user([text("Safely: risky", cache_control={"type": "ephemeral"})])
    assert got["structured_messages"] == [messages[0], changed]
    blocked = await answer(LITELLM, litellm(texts=["risky"], images=[PIXEL]), WITHHOLD)
    assert blocked["action"] == "BLOCKED"


async def test_a_nested_text_of_the_last_turn_stays() -> None:
    result = {"type": "tool_result", "content": [text("a result")]}
    got = await answer(LITELLM, litellm(user([result, text("risky")]), texts=["a result", "risky"]))
    assert got["texts"] == ["a result", "Safely: risky"]


@pytest.mark.parametrize("words", ["hello", "risky"])
async def test_a_fetched_picture_goes_on_as_it_was_judged(words: str) -> None:
    remote = {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}
    body = litellm(user([text(words), remote]), texts=[words], images=["https://example.org/a.png"])
    rail = GUARDRAILS[LITELLM]
    chat = rail.read(body)
    assert chat is not None
    screened = await VLMGuardR1(None, Rewriter()).screen(chat.with_images([PIXEL]))
    got = rail.answer(body, replace(screened, original=chat), "r1")
    sent = words if words == "hello" else "Safely: risky"
    assert got == {
        "action": "GUARDRAIL_INTERVENED",
        "texts": [sent],
        "images": [PIXEL],
        "structured_messages": [user([text(sent), IMAGE])],
    }
    bare = litellm(texts=[words], images=["https://example.org/a.png"])
    unnamed = rail.answer(bare, replace(screened, original=chat.with_message("user", "x")), "r1")
    assert unnamed["action"] == ("NONE" if words == "hello" else "BLOCKED")


@pytest.mark.parametrize(
    "body",
    [
        litellm(texts=["risky"], input_type="response"),
        litellm(user("risky"), texts=["risky"], input_type="response", images=[PIXEL]),
        litellm(texts=[]),
        {},
    ],
)
def test_an_answer_or_nothing_is_not_judged(body: dict[str, Any]) -> None:
    rail = GUARDRAILS[LITELLM]
    assert rail.read(body) is None
    assert rail.answer(body, None, "r1") == {"action": "NONE"}


@pytest.mark.parametrize("kind", ["Response", "", None, 1])
def test_what_is_not_plainly_an_answer_is_judged(kind: Any) -> None:
    assert GUARDRAILS[LITELLM].read(litellm(texts=["risky"], input_type=kind)) is not None


@pytest.mark.parametrize(
    "body",
    [
        litellm(texts=["a"], images="data:,x"),  # F043
        litellm(texts="a"),  # type: ignore[arg-type]
        litellm(texts=[None]),  # type: ignore[list-item]
        litellm(texts=["a"], structured_messages="hostile"),
        litellm(user([{"type": "input_audio", "input_audio": {"data": "AA"}}]), texts=["a"]),
        litellm(user([{"type": "file", "file": {"file_id": "f"}, "text": "a"}]), texts=["a"]),
    ],
)
def test_what_cannot_be_read_is_blocked(body: dict[str, Any]) -> None:
    rail = GUARDRAILS[LITELLM]
    with pytest.raises(BadRequest) as error:
        rail.read(body)
    assert rail.refused is not None
    assert rail.refused(error.value) == {"action": "BLOCKED", "blocked_reason": str(error.value)}


# The webhook


async def test_the_webhook_allows_blocks_and_modifies() -> None:
    allowed = await answer(WEBHOOK, {"text": "hello"})
    assert allowed == {"request_id": "r1", "risk": 0.1, "category": None, "action": "allow"}
    verdict = {"request_id": "r1", "risk": 0.9, "category": "fraud"}
    assert await answer(WEBHOOK, {"text": "risky"}, Policy("shadow")) == {**verdict, "action": "allow"}
    blocked = await answer(WEBHOOK, {"text": "risky"}, Policy("block"))
    assert blocked == {**verdict, "action": "block", "reason": REFUSAL}
    changed = {**verdict, "action": "modify", "text": "Safely: risky"}
    assert await answer(WEBHOOK, {"text": "risky", "images": [PIXEL]}) == changed
    assert await answer(WEBHOOK, {"text": "risky", "images": [PIXEL]}, WITHHOLD) == {**changed, "images": []}


async def test_the_webhook_takes_a_conversation_and_gives_it_back_changed() -> None:
    messages = [{"role": "system", "content": "kind"}, user([text("risky"), IMAGE])]
    got = await answer(WEBHOOK, {"messages": messages, "model": "m"}, WITHHOLD)
    assert (got["action"], got["text"]) == ("modify", "Safely: risky")
    assert got["messages"] == [messages[0], user([text("Safely: risky")])]


async def test_f002_the_webhook_sees_a_picture_without_a_text() -> None:
    seen, got = await told(WEBHOOK, {"text": None, "images": [PIXEL]})
    assert [image.url for image in seen.images] == [PIXEL]
    assert got["action"] == "allow"


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": ""},
        {"text": 1},
        {"text": "a", "images": "data:,x"},  # F043
        {"images": [IMAGE]},
        {"messages": []},
        {"messages": [user("kind")], "text": "hostile"},  # F008
        {"messages": [user("kind")], "images": [PIXEL]},
        {"messages": [user([{"type": "input_audio"}])]},
    ],
)
def test_what_the_webhook_cannot_read_is_an_error(body: dict[str, Any]) -> None:
    assert GUARDRAILS[WEBHOOK].refused is None
    with pytest.raises(BadRequest):
        GUARDRAILS[WEBHOOK].read(body)


# The guard alone


async def test_the_guard_tells_its_verdict_and_what_to_send() -> None:
    body = {"model": "m", "messages": [user("earlier"), user([text("risky"), IMAGE])]}
    got = await answer(GUARD, body)
    assert (got["action"], got["risk"], got["category"], got["threshold"]) == ("rewrote", 0.9, "fraud", 0.5)
    assert (got["prompt"], got["original"]) == ("Safely: risky", "risky")
    assert got["messages"] == [user("earlier"), user([text("Safely: risky"), IMAGE])]
    assert set(got["analysis"]) == {"text", "image", "together"}
    passed = await answer(GUARD, {"messages": [user("hello")]})
    assert (passed["action"], passed["prompt"], passed["analysis"]) == ("passed", "hello", None)
    assert "messages" not in passed
    refused = await answer(GUARD, body, Policy("block"))
    assert (refused["action"], refused["prompt"]) == ("refused", None)
    assert "messages" not in refused


# Through the gateway


@pytest.fixture
async def gateway() -> AsyncIterator[Running]:
    async with Upstream() as upstream, running(upstream) as gateway:
        yield gateway
        assert upstream.asked == []  # the target is never asked


async def test_the_routes_answer_and_are_recorded(gateway: Running) -> None:
    for path, body, action, word in (
        (GUARD, {"messages": [user("risky")]}, "rewrote", "rewrote"),
        (WEBHOOK, {"text": "hello"}, "passed", "allow"),
        (LITELLM, litellm(user("risky"), texts=["risky"]), "rewrote", "GUARDRAIL_INTERVENED"),
        (LITELLM, litellm(texts=["risky"], input_type="response"), "passed", "NONE"),
    ):
        got = await gateway.ask(path, body)
        assert (got.status, got.json["action"]) == (200, word)
        record = gateway.record(got)
        assert (record.route, record.action, record.status) == (path, action, 200)
        assert got.headers["x-vlmguard-action"] == action


async def test_what_cannot_be_read_is_an_error_or_blocked(gateway: Running) -> None:
    audio = user([{"type": "input_audio", "input_audio": {"data": "AA"}}])
    remote = user([{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}])  # F060
    for message in (audio, remote):
        for path in (GUARD, WEBHOOK):
            got = await gateway.ask(path, {"messages": [message]})
            assert got.status == 400
            assert got.json["error"]["type"] == "invalid_request_error"
        got = await gateway.ask(LITELLM, litellm(message, texts=[]))
        assert (got.status, got.json["action"]) == (200, "BLOCKED")
        assert gateway.record(got).action == "refused"
    twice = await gateway.ask(GUARD, b'{"messages": [{"role": "user", "content": "kind", "content": "hostile"}]}')
    assert twice.status == 400


class Fetching:
    """In place of what fetches remote pictures: every one is the pixel."""

    async def fetched(self, chat: Chat) -> Chat:
        return chat.with_images([PIXEL] * len(chat.images))


async def test_f061_a_picture_that_was_fetched_is_given_back(gateway: Running) -> None:
    """So that the target sees the bytes that the guard saw, whatever the address says by then."""
    gateway.gateway.fetcher = Fetching()  # type: ignore[assignment]
    messages = [user([text("hello"), {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}])]
    for path, body in (
        (GUARD, {"messages": messages}),
        (WEBHOOK, {"messages": messages}),
        (LITELLM, litellm(*messages, texts=["hello"])),
    ):
        got = await gateway.ask(path, body)
        assert got.json.get("messages", got.json.get("structured_messages")) == [user([text("hello"), IMAGE])]
