"""OpenAI's /v1/responses."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from tests.gateway.wire.wires import (
    NEW,
    OLD,
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
from vlmguard.chat import Chat, Response, parse_json
from vlmguard.errors import BadRequest, ConfigError
from vlmguard.gateway.wire.problem import Problem
from vlmguard.gateway.wire.responses import Responses

WIRE = Responses()
CALL = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Paris"}'}
SHOT: dict[str, Any] = {"type": "computer_screenshot", "image_url": OLD}


def ask(given: Any, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "input": given, **extra}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(said: str, **fields: Any) -> dict[str, Any]:
    return {"type": "input_text", "text": said, **fields}


def image(url: str = OLD, **fields: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url, **fields}


def output(content: Any, kind: str = "function_call_output", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "call_id": "c1", "output": content, **fields}


pictures = st.builds(
    lambda data, rest: image(f"data:image/png;base64,{data}", **rest),
    datas,
    st.fixed_dictionaries(
        {}, optional={"detail": st.sampled_from(["low", "auto"]), "file_id": st.none(), "x": json_values}
    ),
) | st.just(image("https://example.org/a.png"))
texts = st.builds(lambda said, rest: text(said, **rest), words, more)
parts = st.lists(texts | pictures, max_size=4)
users = st.builds(
    lambda kind, content, rest: {**kind, "role": "user", "content": content, **rest},
    st.sampled_from([{}, {"type": "message"}, {"type": None}]),
    words | parts,
    more,
)
others = st.builds(
    lambda role, content: {"role": role, "content": content}, st.sampled_from(["system", "developer"]), words
)
answers = st.builds(
    lambda content: {"type": "message", "id": "m1", "role": "assistant", "status": "completed", "content": content},
    st.lists(
        st.builds(lambda said: {"type": "output_text", "text": said, "annotations": []}, words)
        | st.just({"type": "refusal", "refusal": "no"}),
        max_size=2,
    ),
)
outputs = st.builds(
    output, words | parts, st.sampled_from(["function_call_output", "custom_tool_call_output"])
) | st.just(output(SHOT, "computer_call_output", acknowledged_safety_checks=[]))
models = st.sampled_from(
    [
        CALL,
        {"type": "custom_tool_call", "call_id": "c1", "name": "shell", "input": "ls"},
        {
            "type": "reasoning",
            "id": "r1",
            "summary": [{"type": "summary_text", "text": "so"}],
            "encrypted_content": "e",
        },
        {
            "type": "computer_call",
            "call_id": "c1",
            "id": "i",
            "action": {"type": "type", "text": "a"},
            "status": "completed",
        },
        {"type": "web_search_call", "id": "w1", "status": "completed", "action": {"type": "search", "query": "q"}},
    ]
)
requests = st.builds(
    lambda before, given, after: {**before, "input": given, **after},
    st.fixed_dictionaries({"model": words}, optional={"instructions": st.none() | words}),
    words | st.lists(users | others | answers | outputs | models, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["tools", "reasoning", "text", "metadata", "x", "include"]), json_values),
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
    assert same({**new, "input": 0}, {**body, "input": 0})
    if isinstance(body["input"], str):
        assert new["input"] == REWRITTEN
        return
    users = [at for at, item in enumerate(body["input"]) if item.get("role") == "user"]
    if not users:
        assert new["input"] == [*body["input"], {"role": "user", "content": REWRITTEN}]
        return
    at, old_items, new_items = users[-1], body["input"], new["input"]
    assert same([*old_items[:at], *old_items[at + 1 :]], [*new_items[:at], *new_items[at + 1 :]])
    only_the_text_changed(old_items[at], new_items[at], ["input_text"])


@given(requests)
def test_a_changed_picture_keeps_its_part(body: dict[str, Any]) -> None:
    asked = WIRE.read(body)
    new = WIRE.write(asked, asked.chat.with_images([NEW] * len(asked.chat.images)))
    told = json.dumps(body)
    for url in (OLD, "https://example.org/a.png"):
        told = told.replace(url, NEW)
    assert json.dumps(new) == told


def test_a_picture_that_is_spelled_otherwise_is_changed_to_this_apis_part() -> None:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": OLD.partition(",")[2]}}
    chat_part = {"type": "image_url", "image_url": {"url": OLD, "detail": "low"}}
    asked = WIRE.read(ask([user(block, chat_part)]))
    assert same(WIRE.write(asked, asked.chat), ask([user(block, chat_part)]))
    assert same(WIRE.write(asked, asked.chat.with_text("hi"))["input"], [user(block, chat_part, text("hi"))])
    (item,) = WIRE.write(asked, asked.chat.with_images([NEW, NEW]))["input"]
    assert item["content"] == [image(NEW), image(NEW, detail="low")]


def test_a_part_that_a_guard_adds_is_this_apis() -> None:
    asked = WIRE.read(ask([user(image())]))
    assert WIRE.write(asked, asked.chat.with_text("hi"))["input"] == [user(image(), text("hi"))]
    asked = WIRE.read(ask("hello"))
    assert WIRE.write(asked, asked.chat.with_images([NEW]))["input"] == [user(image(NEW), text("hello"))]


def test_a_screenshot_is_a_picture_and_stays_a_screenshot() -> None:
    asked = WIRE.read(ask([output(SHOT, "computer_call_output")]))
    assert [picture.url for picture in asked.chat.images] == [OLD]
    (item,) = WIRE.write(asked, asked.chat.with_images([NEW]))["input"]
    assert item == output({**SHOT, "image_url": NEW}, "computer_call_output")


async def test_f010_f011_the_guard_sees_all_that_a_model_may_read() -> None:
    body = ask(
        [
            {"role": "developer", "content": "developing words"},
            user(text("first words"), image()),
            {"type": "reasoning", "id": "r1", "summary": [{"type": "summary_text", "text": "thinking words"}]},
            CALL,
            output([text("tool words"), image(NEW)]),
            output("bare words"),
            {"type": "custom_tool_call", "call_id": "c2", "name": "shell", "input": "typed words"},
            {"type": "computer_call", "call_id": "c3", "action": {"type": "type", "text": "keyed words"}},
            {"type": "web_search_call", "action": {"type": "search", "query": "sought words"}},
            {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "refusing words"}]},
            {"role": "user", "content": "last words"},
        ],
        instructions="system words",
    )
    seen, _ = await guarded(WIRE, body)
    assert [picture.url for picture in seen.images] == [OLD, NEW]
    told = await shown(WIRE, body)
    for said in (
        "developing",
        "first",
        "thinking",
        "tool",
        "bare",
        "typed",
        "keyed",
        "sought",
        "refusing",
        "last",
        "system",
    ):
        assert f"{said} words" in told
    for said in ("get_weather", "Paris"):
        assert said in told


async def test_f008_no_field_of_a_tools_call_hides_another() -> None:
    assert "hostile" in await shown(WIRE, ask([{**CALL, "input": "kind", "arguments": "hostile"}]))


async def test_f010_a_bare_input_is_guarded() -> None:
    seen, written = await guarded(WIRE, ask("risky", instructions="kind", stream=True))
    assert seen.text == "risky"
    assert written == ask(REWRITTEN, instructions="kind", stream=True)


def test_instructions_can_be_changed() -> None:
    asked = WIRE.read(ask("hello", instructions="kind"))
    assert WIRE.write(asked, asked.chat.with_system("careful")) == ask("hello", instructions="kind\n\ncareful")


def test_a_guard_that_moves_messages_is_told_so() -> None:
    asked = WIRE.read(ask([*ask("")["input"], user(text("hi")), CALL]))
    for chat in (asked.chat.with_system("careful"), Chat(asked.chat.messages[1:])):
        with pytest.raises(ConfigError, match="moved or removed"):
            WIRE.write(asked, chat)


@pytest.mark.parametrize(
    ("item", "place"),
    [
        (user({"type": "input_file", "file_id": "file-1"}), ".content[0]"),
        (user({"type": "input_audio", "input_audio": {"data": "AA"}}), ".content[0]"),
        (user({"type": "input_image", "detail": "low"}), ".content[0]"),
        (user({"type": "input_file", "text": "kind", "file_data": "AA"}), ".content[0]"),
        (user({**text("kind"), "file_url": "https://example.org"}), ".content[0].file_url"),
        (user({"type": "refusal", "refusal": "no"}), ".content[0]"),
        (output([text("kind"), {"type": "input_file", "file_id": "file-1"}]), ".output[1]"),
        (output(SHOT | {"image_url": None, "file_id": "file-1"}, "computer_call_output"), ".output[0]"),
        (output(1), ".output"),
        (output("kind") | {"content": [text("hostile")]}, ".content"),
        (output("kind", input="hostile"), ".input"),
        ({"role": "user", "content": "kind", "parts": ["hostile"]}, ".parts"),
        ({"type": "item_reference", "id": "i1"}, ""),
        ({"id": "i1"}, ".role"),
        ({"type": "image_generation_call", "result": "AA"}, ""),
        ({"type": "file_search_call", "results": [{"text": "a"}]}, ""),
        ({"type": "mcp_call", "output": "a"}, ""),
        ({"type": "compaction", "encrypted_content": "a"}, ""),
        ({"type": ["message"]}, ""),
        ("hello", ""),
        (None, ""),
    ],
)
def test_an_item_that_no_guard_can_read_is_refused_by_its_place(item: Any, place: str) -> None:
    with pytest.raises(BadRequest) as refused:
        WIRE.read(ask([user(text("hello")), item], instructions="kind"))
    assert refused.value.param == f"input[1]{place}"


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"previous_response_id": "r1"}, "previous_response_id"),
        ({"conversation": {"id": "c1"}}, "conversation"),
        ({"prompt": {"id": "p1"}}, "prompt"),
        ({"messages": [{"role": "user", "content": "hostile"}]}, "messages"),
        ({"images": [NEW]}, "images"),
        ({"extra_body": {"input": "hostile"}}, "extra_body"),
        ({"fallbacks": [{"model": "m", "input": "hostile"}]}, "fallbacks"),
        ({"instructions": ["hostile"]}, "instructions"),
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": {"role": "user"}}, "input"),
        ({"model": 1}, "model"),
        ({"stream": 1}, "stream"),
    ],
)
def test_f008_f010_what_the_gateway_never_saw_is_refused(extra: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        WIRE.read(ask("hello") | extra)
    assert refused.value.param == param
    assert (
        WIRE.read(ask("hello", **{name: None for name in extra if name != "input" and name != "model"})).chat.text
        == "hello"
    )


def test_a_model_in_this_process_gets_the_conversation_and_the_limit() -> None:
    chat = WIRE.read(ask("hello", instructions="kind", max_output_tokens=5)).chat
    assert [(turn.role, turn.text) for turn in chat.messages] == [("system", "kind"), ("user", "hello")]
    assert chat.extra == {"model": "m", "max_output_tokens": 5, "max_tokens": 5}


ECHOED = {"tools": [{"type": "code_interpreter"}], "metadata": {"a": "b"}, "temperature": 0.5}  # F029


def test_an_answer_is_one_to_the_sdk() -> None:
    transport = answered(WIRE, ask("hello", **ECHOED), Response("Kind words.", "stop", USAGE))
    got = openai_client(transport).responses.create(model="m", input="hello")
    OpenAIResponse.model_validate(got.to_dict() | {"tools": []})
    assert (got.status, got.output_text, got.model, got.id) == ("completed", "Kind words.", "m", "resp_r1")
    assert got.usage is not None
    assert (got.usage.input_tokens, got.usage.output_tokens, got.usage.total_tokens) == (7, 3, 10)
    assert (got.metadata, got.temperature) == ({"a": "b"}, 0.5)


def test_an_answer_that_ended_at_the_limit_says_so() -> None:
    transport = answered(WIRE, ask("hello"), Response("Kind", "length", USAGE))
    got = openai_client(transport).responses.create(model="m", input="hello")
    assert got.status == "incomplete"
    assert got.incomplete_details is not None
    assert got.incomplete_details.reason == "max_output_tokens"
    assert got.output[0].type == "message"
    assert (got.output[0].status, got.output_text) == ("incomplete", "Kind")


@pytest.mark.parametrize(("finish", "status"), [("stop", "completed"), ("length", "incomplete")])
async def test_a_stream_is_one_to_the_sdk(finish: str, status: str) -> None:
    body, said = ask("hello", stream=True), Response("Kind words.", finish, USAGE)
    told = data_of(await events(WIRE, WIRE.read(body), said, *SAID))
    for data in told:
        TypeAdapter(ResponseStreamEvent).validate_python(data, strict=True)
    assert [data["sequence_number"] for data in told] == list(range(len(told)))
    assert told[-1]["type"] == f"response.{status}"
    with openai_client(await streamed(WIRE, body, said, *SAID)).responses.stream(model="m", input="hello") as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert deltas == list(SAID)
        if status == "completed":
            final = stream.get_final_response()
            assert (final.output_text, final.status) == ("Kind words.", "completed")


@pytest.mark.parametrize(
    ("status", "kind"), [(400, openai.BadRequestError), (429, openai.RateLimitError), (504, openai.InternalServerError)]
)
def test_an_error_is_of_the_sdks_own_class(status: int, kind: type[openai.APIStatusError]) -> None:
    error = raised(WIRE, status, lambda transport: openai_client(transport).responses.create(model="m", input="hello"))
    assert type(error) is kind


def test_an_error_in_a_stream_is_an_error_event_to_the_sdk() -> None:
    told = WIRE.error_event(Problem(504, "too late. Ask again.", "input"))
    stream = openai_client(replied(told, "text/event-stream")).responses.create(model="m", input="hello", stream=True)
    (event,) = stream
    assert event.type == "error"
    assert (event.message, event.code, event.param) == ("too late. Ask again.", "server_error", "input")
