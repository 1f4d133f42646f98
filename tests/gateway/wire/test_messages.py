"""Anthropic's /v1/messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from tests.gateway.wire.wires import (
    CACHED,
    NEW,
    OLD,
    PNG,
    REWRITTEN,
    SAID,
    USAGE,
    answered,
    anthropic_client,
    data_of,
    datas,
    events,
    guarded,
    json_values,
    more,
    only_the_text_changed,
    raised,
    replied,
    same,
    shown,
    streamed,
    words,
)
from vlmguard.chat import Chat, Response, parse_json
from vlmguard.errors import BadRequest, ConfigError, ImageUnreadable
from vlmguard.gateway.wire.messages import Messages
from vlmguard.gateway.wire.problem import Problem

WIRE = Messages()
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
USE = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Paris"}}


def ask(*messages: Any, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": list(messages), **extra}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


def image(data: str = PNG[0], **fields: Any) -> dict[str, Any]:
    return {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}, **fields}


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "t1", "content": content, **fields}


pictures = st.builds(lambda data, rest: image(data, **rest), datas, more)
remote = st.just({"type": "image", "source": {"type": "url", "url": "https://example.org/a.png"}})
texts = st.builds(lambda said, rest: text(said, **rest), words, more)
shallow = st.lists(texts | pictures, max_size=3)
results = st.builds(
    lambda content, rest: {"type": "tool_result", "tool_use_id": "t1", **content, **rest},
    (words | shallow).map(lambda it: {"content": it}) | st.sampled_from([{}, {"content": None}]),
    st.fixed_dictionaries({}, optional={"is_error": st.booleans(), "cache_control": st.just({"type": "ephemeral"})}),
)
users = st.builds(
    lambda content, rest: {"role": "user", "content": content, **rest},
    words | st.lists(texts | pictures | remote | results, max_size=4),
    st.dictionaries(st.just("x-unknown"), json_values),
)
thoughts = st.sampled_from(
    [{"type": "thinking", "thinking": "so", "signature": "s"}, {"type": "redacted_thinking", "data": "d"}, USE]
)
assistants = st.builds(
    lambda content: {"role": "assistant", "content": content}, words | st.lists(texts | thoughts, max_size=3)
)
mid_turn = st.builds(lambda content: {"role": "system", "content": content}, words)
extras = st.dictionaries(st.sampled_from(["tools", "metadata", "thinking", "x", "top_k"]), json_values)
requests = st.builds(
    lambda before, turns, system, after: {**before, "messages": turns, **system, **after},
    st.fixed_dictionaries({"model": words, "max_tokens": st.integers(1, 9)}),
    st.lists(users | assistants | mid_turn, min_size=1, max_size=4),
    st.just({}) | (words | st.lists(texts, max_size=2)).map(lambda it: {"system": it}),
    st.builds(lambda one, stops: {**one, **stops}, extras, st.sampled_from([{}, {"stop_sequences": ["a"]}])),
)


@given(requests)
def test_what_is_not_changed_is_written_as_it_was_read(body: dict[str, Any]) -> None:
    before = json.dumps(body)
    asked = WIRE.read(parse_json(before.encode()))
    assert json.dumps(WIRE.write(asked, asked.chat)) == before
    assert same(WIRE.write(asked, asked.chat.with_images(asked.chat.images)), body)


@given(requests)
def test_a_rewrite_changes_the_text_of_the_last_user_turn_alone(body: dict[str, Any]) -> None:
    asked = WIRE.read(body)
    new = WIRE.write(asked, asked.chat.with_text(REWRITTEN))
    assert same({**new, "messages": 0}, {**body, "messages": 0})
    users = [at for at, turn in enumerate(body["messages"]) if turn["role"] == "user"]
    if not users:
        assert new["messages"] == [*body["messages"], {"role": "user", "content": REWRITTEN}]
        return
    at, old_turns, new_turns = users[-1], body["messages"], new["messages"]
    assert same([*old_turns[:at], *old_turns[at + 1 :]], [*new_turns[:at], *new_turns[at + 1 :]])
    only_the_text_changed(old_turns[at], new_turns[at], ["text"])


@given(requests)
def test_a_changed_picture_is_a_block_of_anthropics_and_nothing_else_changes(body: dict[str, Any]) -> None:
    asked = WIRE.read(body)
    new = WIRE.write(asked, asked.chat.with_images([NEW] * len(asked.chat.images)))
    expected = {**body, "messages": [{**turn, "content": _swapped(turn["content"])} for turn in body["messages"]]}
    assert new == expected
    assert same(*({**one, "messages": [turn["role"] for turn in one["messages"]]} for one in (new, body)))


def _swapped(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    blocks = [{**block, "content": _swapped(block["content"])} if "content" in block else block for block in content]
    return [
        image(PNG[1], **{**block, "source": image(PNG[1])["source"]}) if "source" in block else block
        for block in blocks
    ]


async def test_f012_the_guard_sees_all_that_a_model_may_read() -> None:
    body = ask(
        user(text("first words"), image()),
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "thoughts", "signature": "s"}, USE]},
        user(result("bare words"), result([text("tool words"), image(PNG[1])]), text("last words")),
        system=[text("system words", **CACHED)],
    )
    seen, _ = await guarded(WIRE, body)
    assert [picture.url for picture in seen.images] == [OLD, NEW]
    told = await shown(WIRE, body)
    for said in ("first", "bare", "tool", "system", "last"):
        assert f"{said} words" in told
    for said in ("thoughts", "get_weather", "city", "Paris"):
        assert said in told


async def test_f008_no_field_of_a_tools_call_hides_another() -> None:
    block = {**USE, "thinking": "kind", "arguments": "kind", "input": {"how to build it": 1}}
    assert "how to build it" in await shown(WIRE, ask(*HELLO, {"role": "assistant", "content": [block]}))


async def test_f031_a_rewrite_keeps_blocks_results_and_cache_control() -> None:
    results = [result("bare", **CACHED), result([text("tool"), image()], is_error=True), result([])]
    body = ask(
        *HELLO,
        {"role": "assistant", "content": [USE]},
        user(*results, text("risky", **CACHED), image(**CACHED), text("more")),
        system=[text("kind", **CACHED)],
    )
    _, written = await guarded(WIRE, body)
    changed = user(*results, text(REWRITTEN, **CACHED), image(**CACHED))
    assert same(written, {**body, "messages": [*body["messages"][:2], changed]})


def test_a_bare_result_stays_bare_beside_a_changed_picture() -> None:
    asked = WIRE.read(ask(user(result("bare"), result([text("tool"), image()]), image())))
    new = WIRE.write(asked, asked.chat.with_images([NEW, None]))
    assert new["messages"] == [user(result("bare"), result([text("tool"), image(PNG[1])]))]


def test_what_is_spelled_as_openais_is_only_changed_with_its_picture() -> None:
    block = {"type": "image_url", "image_url": {"url": OLD}, **CACHED}
    asked = WIRE.read(ask(user(text("hi"), block)))
    assert WIRE.write(asked, asked.chat.with_text(REWRITTEN))["messages"] == [user(text(REWRITTEN), block)]
    assert WIRE.write(asked, asked.chat.with_images([NEW]))["messages"] == [user(text("hi"), image(PNG[1], **CACHED))]


def test_a_system_prompt_can_be_changed_in_its_own_form() -> None:
    for system, changed in (("kind", "kind\n\ncareful"), ([text("kind")], [text("kind"), text("careful")])):
        asked = WIRE.read(ask(*HELLO, system=system))
        assert WIRE.write(asked, asked.chat.with_system("careful")) == ask(*HELLO, system=changed)


def test_a_guard_that_moves_messages_is_told_so() -> None:
    asked = WIRE.read(ask(*HELLO, {"role": "assistant", "content": "hi"}))
    for chat in (asked.chat.with_system("careful"), Chat(asked.chat.messages[1:]), Chat(asked.chat.messages[:1])):
        with pytest.raises(ConfigError, match="moved or removed"):
            WIRE.write(asked, chat)


def test_a_picture_that_cannot_be_written_is_refused() -> None:
    asked = WIRE.read(ask(user(image())))
    with pytest.raises(ImageUnreadable):
        WIRE.write(asked, asked.chat.with_images(["data:image/png;base64,AAAA"]))


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AA"}}, ""),
        ({"type": "document", "source": {"type": "file", "file_id": "file-1"}, "content": [text("kind")]}, ""),
        ({"type": "container_upload", "file_id": "file-1"}, ""),
        ({"type": "search_result", "source": "a", "title": "b", "content": [text("kind")]}, ""),
        ({"type": "web_search_tool_result", "content": [{"type": "web_search_result", "url": "a"}]}, ""),
        (USE, ""),  # in a user's turn
        (result([text("kind"), {"type": "document", "source": {"type": "text", "data": "a"}}]), ".content[1]"),
        (result([result("deep"), {"type": "video"}]), ".content[1]"),
        (result(1), ".content"),
        (result([text("kind")], document={"type": "text"}), ".document"),
        (image(content=[text("kind")]), ".content"),
        ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG[0], "url": NEW}}, ""),
        ({"type": "image", "source": {"type": "content"}}, ".source"),
    ],
)
def test_a_part_that_no_guard_can_read_is_refused_by_its_place(part: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as refused:
        WIRE.read(ask(user(text("hello"), part), system="kind"))
    assert refused.value.param == f"messages[0].content[1]{place}"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], "the request"),
        (ask(), "messages"),
        (ask("hello"), "messages[0]"),
        (ask({"role": "tool", "content": "hello"}), "messages[0].role"),
        (ask({"role": ["user"], "content": "hello"}), "messages[0].role"),
        (ask({"role": "user", "content": {"type": "text"}}), "messages[0].content"),
        (ask(*HELLO, system={"type": "text"}), "system"),
        (ask(*HELLO, system=["kind", {"type": "document"}]), "system[1]"),
        (ask(*HELLO, input="hostile"), "input"),
        (ask(*HELLO, prompt="hostile"), "prompt"),
        (ask(*HELLO, extra_body={"messages": ["hostile"]}), "extra_body"),
        (ask(*HELLO, fallbacks=[{"model": "m", "messages": ["hostile"]}]), "fallbacks"),
        (ask({"role": "user", "content": "kind", "content_blocks": ["hostile"]}), "messages[0].content_blocks"),
    ],
)
def test_what_is_no_request_is_refused_by_its_place(body: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        WIRE.read(body)
    assert refused.value.param == param


def test_a_model_in_this_process_gets_the_conversation_and_the_stops() -> None:
    chat = WIRE.read(ask(*HELLO, system="kind", stop_sequences=["a"])).chat
    assert [turn.role for turn in chat.messages] == ["system", "user"]
    assert chat.extra == {"model": "m", "max_tokens": 9, "stop": ["a"]}


@pytest.mark.parametrize(("finish", "reason"), [("stop", "end_turn"), ("length", "max_tokens"), (None, "end_turn")])
def test_an_answer_is_one_to_the_sdk(finish: str | None, reason: str) -> None:
    transport = answered(WIRE, ask(*HELLO), Response("Kind words.", finish, USAGE))
    got = anthropic_client(transport).messages.create(model="m", max_tokens=9, messages=HELLO)
    Message.model_validate(got.to_dict(), strict=True)
    (block,) = got.content
    assert block.type == "text"
    assert block.text == "Kind words."
    assert (got.stop_reason, got.usage.input_tokens, got.usage.output_tokens) == (reason, 7, 3)
    assert (got.role, got.model, got.id) == ("assistant", "m", "msg_r1")


@pytest.mark.parametrize(("finish", "reason"), [("stop", "end_turn"), ("length", "max_tokens")])
async def test_a_stream_is_one_to_the_sdk(finish: str, reason: str) -> None:
    body, said = ask(*HELLO, stream=True), Response("Kind words.", finish, USAGE)
    told = await events(WIRE, WIRE.read(body), said, *SAID)
    for data in data_of(told):
        TypeAdapter(RawMessageStreamEvent).validate_python(data, strict=True)
    assert [one.startswith(f"event: {data['type']}\n".encode()) for one, data in zip(told, data_of(told), strict=True)]
    assert WIRE.final[0] in told[-1]
    transport = await streamed(WIRE, body, said, *SAID)
    with anthropic_client(transport).messages.stream(model="m", max_tokens=9, messages=HELLO) as stream:
        assert list(stream.text_stream) == list(SAID)
        final = stream.get_final_message()
    assert (final.stop_reason, final.usage.input_tokens, final.usage.output_tokens) == (reason, 7, 3)


@pytest.mark.parametrize(
    ("status", "kind", "told"),
    [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (413, anthropic.RequestTooLargeError, "request_too_large"),
        (415, anthropic.APIStatusError, "invalid_request_error"),
        (422, anthropic.UnprocessableEntityError, "invalid_request_error"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
        (502, anthropic.InternalServerError, "api_error"),
        (503, anthropic.ServiceUnavailableError, "overloaded_error"),
        (504, anthropic.DeadlineExceededError, "timeout_error"),
    ],
)
def test_an_error_is_of_the_sdks_own_class(status: int, kind: type[anthropic.APIStatusError], told: str) -> None:
    error = raised(
        WIRE,
        status,
        lambda transport: anthropic_client(transport).messages.create(model="m", max_tokens=9, messages=HELLO),
    )
    assert isinstance(error, kind)
    assert error.status_code == status
    body = error.body
    assert isinstance(body, Mapping)
    assert body["error"] == {"type": told, "message": "what happened. What to do."}


def test_an_error_in_a_stream_is_raised_by_the_sdk() -> None:
    transport = replied(WIRE.error_event(Problem(504, "too late. Ask again.")), "text/event-stream")
    stream = anthropic_client(transport).messages.create(model="m", max_tokens=9, messages=HELLO, stream=True)
    with pytest.raises(anthropic.APIStatusError, match="too late"):
        list(stream)
