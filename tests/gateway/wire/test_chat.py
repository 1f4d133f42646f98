"""/v1/chat/completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.gateway.wire.wires import (
    CACHED,
    NEW,
    OLD,
    PNG,
    REWRITTEN,
    SAID,
    USAGE,
    answered,
    data_of,
    datas,
    events,
    guarded,
    json_values,
    more,
    only_the_text_changed,
    openai_client,
    raised,
    replied,
    same,
    shown,
    streamed,
    words,
)
from vlmguard.chat import Response, parse_json
from vlmguard.errors import BadRequest
from vlmguard.gateway.wire import CHAT
from vlmguard.gateway.wire.problem import Problem

IMAGE: dict[str, Any] = {"type": "image_url", "image_url": {"url": OLD}}
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]


def ask(*messages: Any, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **extra}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": said, **fields}


pictures = st.builds(
    lambda data, detail, rest: {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{data}", **detail},
        **rest,
    },
    datas,
    st.fixed_dictionaries({}, optional={"detail": st.sampled_from(["low", "high"])}),
    more,
)
remote = st.just({"type": "image_url", "image_url": {"url": "https://example.org/a.png"}})
inputs = st.builds(lambda data: {"type": "input_image", "image_url": f"data:image/png;base64,{data}"}, datas)
texts = st.builds(lambda said, rest: {"type": "text", "text": said, **rest}, words, more)
parts = st.lists(texts | pictures | remote | inputs, max_size=4)
users = st.builds(lambda content, rest: {"role": "user", "content": content, **rest}, words | parts, more)
systems = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["system", "developer"]),
    words | st.lists(texts, min_size=1, max_size=2),
)
assistants = st.builds(
    lambda content, calls, rest: {"role": "assistant", **content, **calls, **rest},
    st.sampled_from([{}, {"content": None}, {"content": "so"}, {"content": [{"type": "refusal", "refusal": "no"}]}]),
    st.sampled_from([{}, {"tool_calls": [CALL]}, {"refusal": None, "audio": None}]),
    more,
)
tools = st.builds(lambda content: {"role": "tool", "tool_call_id": "c1", "content": content}, words | parts)
requests = st.builds(
    lambda before, turns, after: {**before, "messages": turns, **after},
    st.fixed_dictionaries({"model": words}, optional={"seed": st.integers(0, 9), "n": st.integers(1, 3)}),
    st.lists(users | systems | assistants | tools, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["tools", "response_format", "logprobs", "stream_options", "x"]), json_values),
)


@given(requests)
def test_what_is_not_changed_is_written_as_it_was_read(body: dict[str, Any]) -> None:
    before = json.dumps(body)
    asked = CHAT.read(parse_json(before.encode()))
    assert json.dumps(CHAT.write(asked, asked.chat)) == before
    assert same(CHAT.write(asked, asked.chat.with_images(asked.chat.images)), body)


@given(requests)
def test_a_rewrite_changes_the_text_of_the_last_user_turn_alone(body: dict[str, Any]) -> None:
    asked = CHAT.read(body)
    new = CHAT.write(asked, asked.chat.with_text(REWRITTEN))
    assert same({**new, "messages": 0}, {**body, "messages": 0})
    at = asked.chat.last_user
    if at is None:
        assert new["messages"] == [*body["messages"], {"role": "user", "content": REWRITTEN}]
        return
    old_turns, new_turns = body["messages"], new["messages"]
    assert same([*old_turns[:at], *old_turns[at + 1 :]], [*new_turns[:at], *new_turns[at + 1 :]])
    only_the_text_changed(old_turns[at], new_turns[at], ["text"])


@given(requests)
def test_a_changed_picture_keeps_its_part(body: dict[str, Any]) -> None:
    asked = CHAT.read(body)
    new = CHAT.write(asked, asked.chat.with_images([NEW] * len(asked.chat.images)))
    told = json.dumps(body)
    for url in (OLD, "https://example.org/a.png"):
        told = told.replace(url, NEW)
    assert json.dumps(new) == told


def test_a_picture_that_came_as_a_block_of_anthropics_is_written_as_openais() -> None:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG[0]}, **CACHED}
    asked = CHAT.read(ask(user(block)))
    assert same(CHAT.write(asked, asked.chat), ask(user(block)))
    (part,) = CHAT.write(asked, asked.chat.with_images([NEW]))["messages"][0]["content"]
    assert part == {"type": "image_url", "image_url": {"url": NEW}, **CACHED}


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, "input_audio"),
        ({"type": "video_url", "video_url": {"url": "https://example.org/a.mp4"}}, "video_url"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "file"),
        ({"type": "image_embeds", "image_embeds": "AA"}, "image_embeds"),
        ({"type": "document", "source": {"type": "text", "data": "a"}}, "document"),
        ({"type": "hologram"}, "hologram"),
        ({"type": "refusal", "refusal": "no"}, "refusal"),  # in a user's turn
        ({"type": "thinking", "thinking": "so"}, "thinking"),
        ({"type": "input_audio", "text": "a kind text", "input_audio": {"data": "AA"}}, "input_audio"),
        ({"type": "video_url", "image_url": {"url": OLD}, "video_url": {"url": "a"}}, "video_url"),
        ({"type": "file", "content": [text("a kind text")], "file": {"file_id": "file-1"}}, "file"),
        ({}, "''"),
    ],
)
def test_a_part_that_no_guard_can_read_is_refused_by_its_place(part: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named) as refused:
        CHAT.read(ask({"role": "system", "content": "kind"}, user(text("hello"), part)))
    assert refused.value.param == "messages[1].content[1]"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"text": "hi", "input_audio": {"data": "AA"}}, ".input_audio"),
        ({"type": "text", "text": "hi", "audio_url": {"url": "a"}, "uuid": "1"}, ".audio_url"),
        ({"type": "text", "text": "hi", "file_id": "file-1"}, ".file_id"),
        ({"type": "text", "text": "hi", "content": [text("a hostile text")]}, ".content"),
        ({"image_url": {"url": OLD}, "video_url": {"url": "a"}}, ".video_url"),
        ({"type": "image", "source": {"type": "base64", "data": PNG[0], "url": NEW}}, ""),
        ({"type": "image_url", "image_url": {"url": OLD}, "image": NEW}, ""),
        ({"type": "image_url", "image_url": {"url": OLD}, "text": "hi"}, ""),
        ({"type": "image_url", "image_url": {"url": OLD, "file_id": "file-1"}}, ""),
    ],
)
def test_f008_a_part_that_one_server_reads_otherwise_is_refused(part: dict[str, Any], place: str) -> None:
    with pytest.raises(BadRequest) as refused:
        CHAT.read(ask(user(text("hello"), part)))
    assert refused.value.param == f"messages[0].content[1]{place}"


@pytest.mark.parametrize("rival", ["content_blocks", "parts", "audio", "documents", "input_audio", "file_ids", "video"])
def test_f008_content_beside_content_is_refused(rival: str) -> None:
    with pytest.raises(BadRequest, match=rival) as refused:
        CHAT.read(ask({"role": "user", "content": "kind", rival: ["hostile"]}))
    assert refused.value.param == f"messages[0].{rival}"
    assert CHAT.read(ask({"role": "user", "content": "kind", rival: None})).chat.text == "kind"


@pytest.mark.parametrize(
    "rival",
    [
        "extra_body",
        "prompt_id",
        "system",
        "instructions",
        "input",
        "prompt",
        "documents",
        "chat_template",
        "input_ids",
        "multi_modal_data",
    ],
)
def test_f008_content_beside_messages_is_refused(rival: str) -> None:
    with pytest.raises(BadRequest, match=rival) as refused:
        CHAT.read(ask(*HELLO, **{rival: ["hostile"]}))
    assert refused.value.param == rival


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"fallbacks": [{"model": "m", "messages": [{"role": "user", "content": "hostile"}]}]}, "fallbacks"),
        ({"content_policy_fallbacks": [{"model": "m", "messages": []}]}, "content_policy_fallbacks"),
        ({"chat_template_kwargs": {"documents": ["hostile"]}}, "chat_template_kwargs.documents"),
        ({"chat_template_kwargs": {"chat_template": "hostile"}}, "chat_template_kwargs.chat_template"),
        ({"chat_template_kwargs": {"messages": ["hostile"]}}, "chat_template_kwargs.messages"),
    ],
)
def test_f008_content_inside_what_servers_unpack_is_refused(extra: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        CHAT.read(ask(*HELLO, **extra))
    assert refused.value.param == param
    harmless = {"fallbacks": ["other", {"m": ["another"]}], "chat_template_kwargs": {"enable_thinking": False}}
    assert CHAT.read(ask(*HELLO, **harmless)).chat.text == "hello"


@pytest.mark.parametrize(
    "told",
    [
        {"tool_calls": [{"id": "c1", "type": "custom", "custom": {"name": "shell", "input": "hidden words"}}]},
        {"tool_calls": [{"function": {"name": "f", "arguments": "kind", "input": "hidden words"}}]},
        {"thinking": "hidden words"},
        {"thinking_blocks": [{"type": "thinking", "thinking": "hidden words"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "hidden words"}]},
        {"reasoning": {"text": "hidden words"}},
        {"tool_responses": [{"name": "search", "response": "hidden words"}]},
    ],
)
async def test_f010_what_a_model_or_tool_told_beside_the_content_is_seen(told: dict[str, Any]) -> None:
    assert "hidden words" in await shown(CHAT, ask({"role": "assistant", "content": None, **told}, *HELLO))


def test_f008_a_key_twice_never_gets_to_the_wire() -> None:
    with pytest.raises(BadRequest, match="twice"):
        CHAT.read(parse_json(b'{"messages": [{"role": "user", "content": "kind", "content": "hostile"}]}'))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (None, "the request"),
        ([], "the request"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "model": 1}, "model"),
        ({"messages": HELLO, "stream": "yes"}, "stream"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": 1}]}]}, "messages[0].content[0].type"),
    ],
)
def test_what_is_no_request_is_refused_by_its_place(body: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        CHAT.read(body)
    assert refused.value.param == param


async def test_f010_f011_f036_the_guard_sees_all_that_a_model_may_read() -> None:
    body = ask(
        {"role": "system", "content": [text("system words")]},
        user(text("first words"), IMAGE),
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [text("tool words"), IMAGE]},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "refusing words"}, {"type": "thinking", "thinking": "thoughts"}],
        },
        {"role": "user", "content": "last words"},
    )
    seen, _ = await guarded(CHAT, body)
    assert [image.url for image in seen.images] == [OLD, OLD]
    told = await shown(CHAT, body)
    for said in ("system", "first", "tool", "refusing", "last"):
        assert f"{said} words" in told
    assert "thoughts" in told
    assert "get_weather" in told
    assert "Paris" in told


async def test_f031_f041_f042_a_rewrite_keeps_cache_control_and_adds_no_message() -> None:
    body = ask({"role": "system", "content": "kind"}, user(text("risky <image>", **CACHED), IMAGE, text("more", x=1)))
    _, written = await guarded(CHAT, body)
    assert written["messages"][0] == body["messages"][0]
    assert written["messages"][1:] == [user(text(REWRITTEN, **CACHED, x=1), IMAGE)]


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}, {"content": []}])
def test_f036_f037_f038_a_turn_without_content_is_kept(content: dict[str, Any]) -> None:
    body = ask(*HELLO, {"role": "assistant", **content, "tool_calls": [CALL]})
    asked = CHAT.read(body)
    assert asked.chat.messages[1].text == ""
    assert same(CHAT.write(asked, asked.chat), body)


def test_f029_tools_of_any_shape_go_on_as_they_came() -> None:
    body = ask(*HELLO, tools=[{"type": "code_interpreter"}, {"type": "function"}, None, 1], tool_choice={"type": "x"})
    asked = CHAT.read(body)
    assert same(CHAT.write(asked, asked.chat.with_text("hello")), body)


@pytest.mark.parametrize("spelling", [f"DATA:Image/PNG;charset=utf-8;base64,{PNG[0]}", f"data:;base64,{PNG[0]}"])
async def test_f055_f056_f057_a_picture_in_any_spelling_is_a_picture(spelling: str) -> None:
    body = parse_json(json.dumps(ask(user({"image_url": {"url": spelling}}))).encode())
    seen, written = await guarded(CHAT, body)
    assert [image.url for image in seen.images] == [spelling]
    assert written["messages"][0]["content"] == [{"image_url": {"url": spelling}}, text(REWRITTEN)]


def test_an_answer_is_one_to_the_sdk() -> None:
    body = ask(*HELLO, n=3)
    transport = answered(CHAT, body, Response("Kind words.", "length", USAGE))
    got = openai_client(transport).chat.completions.create(model="m", messages=HELLO, n=3)
    ChatCompletion.model_validate(got.to_dict(), strict=True)
    assert [(choice.index, choice.message.content, choice.finish_reason) for choice in got.choices] == [
        (at, "Kind words.", "length") for at in range(3)
    ]
    assert got.usage is not None
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (7, 3, 10)
    assert (got.model, got.id) == ("m", "chatcmpl-r1")


@pytest.mark.parametrize(("asked_for", "given_back"), [(True, 1), (0, 1), (None, 1), ("2", 1), (10**9, 128)])
def test_a_strange_number_of_choices_makes_no_more_than_a_server_would(asked_for: Any, given_back: int) -> None:
    asked = CHAT.read(ask(*HELLO, n=asked_for))
    assert len(CHAT.answer(Response("a"), asked, "r1", 1)["choices"]) == given_back


@pytest.mark.parametrize("include_usage", [True, False])
async def test_a_stream_is_one_to_the_sdk(include_usage: bool) -> None:
    options: Any = {"include_usage": True} if include_usage else None
    body = ask(*HELLO, stream=True, n=2, stream_options=options)
    said = Response("Kind words.", "length", USAGE)
    told = await events(CHAT, CHAT.read(body), said, *SAID)
    assert told[-1] == CHAT.ending == b"data: [DONE]\n\n"
    chunks = [ChatCompletionChunk.model_validate(chunk, strict=True) for chunk in data_of(told)]
    got = list(
        openai_client(await streamed(CHAT, body, said, *SAID)).chat.completions.create(
            model="m", messages=HELLO, stream=True
        )
    )
    assert got == chunks
    by_choice = ["".join(chunk.choices[at].delta.content or "" for chunk in got if chunk.choices) for at in range(2)]
    assert by_choice == ["Kind words.", "Kind words."]
    ends = [choice.finish_reason for chunk in got for choice in chunk.choices if choice.finish_reason]
    assert ends == ["length", "length"]
    usages = [chunk.usage for chunk in got if chunk.usage]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(7, 3)] * include_usage
    assert (got[-1].choices == []) is include_usage  # F023: the usage comes last, without choices


def served(content: str | None, *others: str, **message: Any) -> dict[str, Any]:
    """A server's own answer."""
    messages = [{"role": "assistant", "content": content, **message}, *({"content": other} for other in others)]
    choices = [{"index": at, "message": one, "finish_reason": "stop"} for at, one in enumerate(messages)]
    return {"id": "theirs", "object": "chat.completion", "created": 2, "model": "m", "choices": choices, "system": 1}


async def test_a_servers_own_answer_keeps_its_tool_calls_in_both_forms() -> None:
    raw = served(None, tool_calls=[CALL])
    said = Response("", "tool_calls", USAGE, raw=raw)
    assert CHAT.answer(said, CHAT.read(ask(*HELLO)), "r1", 1)["choices"] == raw["choices"]
    assert CHAT.answer(said, CHAT.read(ask(*HELLO)), "r1", 1)["system"] == 1
    transport = await streamed(CHAT, ask(*HELLO, stream=True), said)
    with openai_client(transport).chat.completions.stream(model="m", messages=HELLO) as stream:
        final = stream.get_final_completion()
    (call,) = final.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("get_weather", '{"city": "Paris"}')
    assert final.choices[0].finish_reason == "tool_calls"


async def test_f019_what_a_guard_changed_or_never_read_in_an_answer_is_not_sent() -> None:
    raw = served("hostile", "another hostile one", tool_calls=[CALL])
    changed = CHAT.answer(Response("Sorry.", raw=raw), CHAT.read(ask(*HELLO, n=2)), "r1", 1)
    told = b"".join(await events(CHAT, CHAT.read(ask(*HELLO, stream=True)), Response("Sorry.", raw=raw), "Sorry."))
    for one in (json.dumps(changed), told.decode()):
        assert "hostile" not in one
        assert "get_weather" not in one
    kept = CHAT.answer(Response("hostile", raw=raw), CHAT.read(ask(*HELLO, n=2)), "r1", 1)
    assert [choice["message"]["content"] for choice in kept["choices"]] == ["hostile", "hostile"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (413, openai.APIStatusError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (502, openai.InternalServerError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
    ],
)
def test_an_error_is_of_the_sdks_own_class(status: int, kind: type[openai.APIStatusError]) -> None:
    error = raised(CHAT, status, lambda transport: openai_client(transport).models.list())
    assert type(error) is kind
    assert isinstance(error, openai.APIStatusError)
    assert error.status_code == status
    body = error.body
    assert isinstance(body, Mapping)
    assert (body["message"], body["param"]) == ("what happened. What to do.", "messages[0]")


def test_an_error_in_a_stream_is_raised_by_the_sdk() -> None:
    told = CHAT.error_event(Problem(504, "too late. Ask again."))
    transport = replied(told + CHAT.ending, "text/event-stream")
    stream = openai_client(transport).chat.completions.create(model="m", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="too late"):
        list(stream)


def test_a_chat_may_grow_by_any_message() -> None:
    asked = CHAT.read(ask(*HELLO))
    new = CHAT.write(asked, asked.chat.with_system("careful"))
    assert new["messages"] == [{"role": "system", "content": "careful"}, *HELLO]
