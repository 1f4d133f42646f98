"""The official SDKs as clients, which change one base URL and nothing else."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable
from hashlib import sha256
from typing import Any

import anthropic
import openai
import pytest
import pytest_asyncio
from anthropic import Anthropic, AsyncAnthropic
from openai import AsyncOpenAI, OpenAI

from tests.gateway.running import (
    CHAT,
    DROP,
    HASH,
    KEY,
    MESSAGES,
    PATIENCE_SECONDS,
    Reply,
    Running,
    Upstream,
    chunk,
    completion,
    event,
    message,
    message_events,
    picture,
    response,
    response_events,
    running,
    stream,
    whole,
)
from vlmguard.guards.policy import REFUSAL

pytestmark = pytest.mark.asyncio(loop_scope="module")

HI: Any = [{"role": "user", "content": "What is the tide table?"}]
RISKY: Any = [{"role": "user", "content": "risky"}]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def oai(shared_gateway: Running) -> Any:
    async with shared_gateway.openai() as client:
        yield client


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def ant(shared_gateway: Running) -> Any:
    async with shared_gateway.anthropic() as client:
        yield client


# openai: chat completions


async def test_a_chat_completion(oai: AsyncOpenAI, gateway: Running) -> None:
    answer = await oai.chat.completions.create(model="m", messages=HI, seed=7, logprobs=True)
    assert answer.choices[0].message.content == "Hello from upstream."
    assert answer.usage is not None
    assert answer.usage.total_tokens == 13


async def test_a_streamed_chat_completion(oai: AsyncOpenAI, gateway: Running) -> None:
    pieces = await oai.chat.completions.create(
        model="m", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    chunks = [piece async for piece in pieces]
    assert "".join(one.choices[0].delta.content or "" for one in chunks if one.choices) == "Hello from upstream."
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


async def test_pictures_and_a_rewrite(oai: AsyncOpenAI, gateway: Running, upstream: Upstream, png: bytes) -> None:
    parts: Any = [
        {"type": "text", "text": "risky"},
        {"type": "image_url", "image_url": {"url": picture(png), "detail": "low"}},
    ]
    told = await oai.chat.completions.with_raw_response.create(model="m", messages=[{"role": "user", "content": parts}])
    assert told.headers["x-vlmguard-action"] == "rewrote"
    assert told.parse().choices[0].message.content == "Hello from upstream."
    sent = upstream.last.json["messages"][0]["content"]
    assert sent == [{"type": "text", "text": "Safely: risky"}, parts[1]]
    assert len(gateway.rewriter.judged[0].images) == 1


async def test_tools(oai: AsyncOpenAI, gateway: Running, upstream: Upstream) -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "tides", "arguments": '{"port": "Cuxhaven"}'}}]
    upstream.says(whole(completion(None, "tool_calls", tool_calls=calls)), whole(completion("High at noon.")))
    tools: Any = [{"type": "function", "function": {"name": "tides", "parameters": {"type": "object"}}}]
    first = await oai.chat.completions.create(model="m", messages=HI, tools=tools)
    asked = first.choices[0].message
    assert asked.content is None
    assert asked.tool_calls is not None
    result: Any = [*HI, asked, {"role": "tool", "tool_call_id": asked.tool_calls[0].id, "content": "12:00"}]
    second = await oai.chat.completions.create(model="m", messages=result, tools=tools)
    assert second.choices[0].message.content == "High at noon."
    sent = upstream.last.json["messages"]
    assert sent[1]["content"] is None
    assert sent[1]["tool_calls"][0]["function"]["name"] == "tides"


async def test_streamed_tools(oai: AsyncOpenAI, gateway: Running, upstream: Upstream) -> None:
    def piece(**function: Any) -> bytes:
        delta = {"tool_calls": [{"index": 0, "function": function}]}
        return event({"id": "1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})

    upstream.says(
        stream(
            piece(name="tides", arguments=""),
            piece(arguments='{"po'),
            piece(arguments='rt":1}'),
            chunk(None, "tool_calls"),
        )
    )
    arguments = ""
    async for one in await oai.chat.completions.create(model="m", messages=HI, stream=True):
        for call in one.choices[0].delta.tool_calls or ():
            assert call.function is not None
            arguments += call.function.arguments or ""
    assert json.loads(arguments) == {"port": 1}


# openai: responses


async def test_a_response(oai: AsyncOpenAI, gateway: Running, upstream: Upstream, png: bytes) -> None:
    content: Any = [
        {"type": "input_text", "text": "risky"},
        {"type": "input_image", "image_url": picture(png), "detail": "low"},
    ]
    answer = await oai.responses.create(model="m", input=[{"role": "user", "content": content}], instructions="Brief.")
    assert answer.output_text == "Hello from upstream."
    assert answer.status == "completed"
    sent = upstream.last.json
    assert sent["input"][0]["content"] == [{"type": "input_text", "text": "Safely: risky"}, content[1]]
    assert sent["instructions"] == "Brief."


async def test_a_streamed_response(oai: AsyncOpenAI, gateway: Running) -> None:
    kinds, said = [], ""
    async for one in await oai.responses.create(model="m", input="Hi.", stream=True):
        kinds.append(one.type)
        said += one.delta if one.type == "response.output_text.delta" else ""
    assert said == "Hello from upstream."
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")


async def test_tools_of_responses(oai: AsyncOpenAI, gateway: Running, upstream: Upstream) -> None:
    call = {
        "type": "function_call",
        "id": "f1",
        "call_id": "c1",
        "name": "tides",
        "arguments": "{}",
        "status": "completed",
    }
    upstream.says(whole({**response(), "output": [call]}), whole(response("High at noon.")))
    tools: Any = [{"type": "function", "name": "tides", "parameters": {"type": "object"}, "strict": False}]
    first = await oai.responses.create(model="m", input="Hi.", tools=tools)
    (asked,) = first.output
    assert asked.type == "function_call"
    result: Any = [
        *HI,
        asked.to_dict(),
        {"type": "function_call_output", "call_id": asked.call_id, "output": "12:00"},
    ]
    second = await oai.responses.create(model="m", input=result, tools=tools)
    assert second.output_text == "High at noon."
    assert upstream.last.json["input"][1]["name"] == "tides"


# anthropic: messages


async def test_a_message(ant: AsyncAnthropic, gateway: Running, upstream: Upstream, png: bytes) -> None:
    content: Any = [
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()},
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "text", "text": "risky", "cache_control": {"type": "ephemeral"}},
    ]
    answer = await ant.messages.create(
        model="m", max_tokens=9, system="Brief.", messages=[{"role": "user", "content": content}]
    )
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == "Hello from upstream."
    assert answer.stop_reason == "end_turn"
    sent = upstream.last.json
    assert sent["messages"][0]["content"] == [content[0], {**content[1], "text": "Safely: risky"}]
    assert sent["system"] == "Brief."
    assert upstream.last.headers["anthropic-version"]


async def test_a_streamed_message(ant: AsyncAnthropic, gateway: Running) -> None:
    async with ant.messages.stream(model="m", max_tokens=9, messages=HI) as pieces:
        texts = [text async for text in pieces.text_stream]
        final = await pieces.get_final_message()
    assert texts == ["Hello ", "from upstream."]
    assert final.stop_reason == "end_turn"
    assert final.usage.output_tokens == 4


async def test_tools_of_messages(ant: AsyncAnthropic, gateway: Running, upstream: Upstream, png: bytes) -> None:
    call = {"type": "tool_use", "id": "t1", "name": "look", "input": {"where": "harbour"}}
    upstream.says(whole(message("Let me look.", call, reason="tool_use")), whole(message("Ships.")))
    tools: Any = [{"name": "look", "input_schema": {"type": "object"}}]
    first = await ant.messages.create(model="m", max_tokens=9, messages=HI, tools=tools)
    asked = first.content[1]
    assert asked.type == "tool_use"
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()}
    result = {"type": "tool_result", "tool_use_id": asked.id, "content": [{"type": "image", "source": source}]}
    messages: Any = [*HI, {"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
    second = await ant.messages.create(model="m", max_tokens=9, messages=messages, tools=tools)
    assert second.content[0].type == "text"
    assert len(gateway.rewriter.judged[-1].images) == 1  # the guard saw what the tool gave
    assert upstream.last.json["messages"][2]["content"] == [result]


# The same, not asynchronous


async def test_the_synchronous_clients(gateway: Running) -> None:
    def asked() -> list[str]:
        with (
            OpenAI(base_url=f"{gateway.root}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as oai,
            Anthropic(base_url=gateway.root, api_key="none", max_retries=0, timeout=PATIENCE_SECONDS) as ant,
        ):
            said = [oai.chat.completions.create(model="m", messages=HI).choices[0].message.content or ""]
            pieces = oai.chat.completions.create(model="m", messages=HI, stream=True)
            said.append("".join(one.choices[0].delta.content or "" for one in pieces if one.choices))
            said.append(oai.responses.create(model="m", input="Hi.").output_text)
            events = oai.responses.create(model="m", input="Hi.", stream=True)
            said.append("".join(one.delta for one in events if one.type == "response.output_text.delta"))
            block = ant.messages.create(model="m", max_tokens=9, messages=HI).content[0]
            said.append(block.text if block.type == "text" else "")
            with ant.messages.stream(model="m", max_tokens=9, messages=HI) as told:
                said.append("".join(told.text_stream))
            return said

    assert await asyncio.to_thread(asked) == ["Hello from upstream."] * 6


# Refusals and a model in this process


@pytest.mark.parametrize("target", ["upstream", "in process"])
async def test_a_refusal_reads_like_an_answer(target: str, upstream: Upstream) -> None:
    chosen = upstream if target == "upstream" else "scripted:Never said."
    async with running(chosen, policy={"mode": "block"}) as gateway:
        assert await _said(gateway, "risky") == [REFUSAL] * 6
    assert upstream.asked == []


async def test_a_model_in_this_process() -> None:
    async with running("scripted:One two three.") as gateway:
        assert await _said(gateway, "What?") == ["One two three."] * 6
        async with gateway.openai() as client:
            (model,) = [model async for model in client.models.list()]
            assert model.to_dict()["input_modalities"] == ["text", "image"]


async def _said(gateway: Running, text: str) -> list[str]:
    """What the three APIs answer, whole and streamed."""
    turns: Any = [{"role": "user", "content": text}]
    async with gateway.openai() as oai, gateway.anthropic() as ant:
        whole_chat = await oai.chat.completions.create(model="m", messages=turns)
        chat = ""
        async for one in await oai.chat.completions.create(model="m", messages=turns, stream=True):
            chat += one.choices[0].delta.content or ""
        whole_response = await oai.responses.create(model="m", input=text)
        told = ""
        async for piece in await oai.responses.create(model="m", input=text, stream=True):
            if piece.type == "response.completed":
                told = piece.response.output_text
        block = (await ant.messages.create(model="m", max_tokens=9, messages=turns)).content[0]
        async with ant.messages.stream(model="m", max_tokens=9, messages=turns) as pieces:
            final = (await pieces.get_final_message()).content[0]
    blocks = [one.text if one.type == "text" else "" for one in (block, final)]
    return [whole_chat.choices[0].message.content or "", chat, whole_response.output_text, told, *blocks]


async def test_the_models_of_a_server(oai: AsyncOpenAI, gateway: Running, upstream: Upstream) -> None:
    upstream.says(whole({"object": "list", "data": [{"id": "qwen", "object": "model", "created": 1, "owned_by": "x"}]}))
    (model,) = [model async for model in oai.models.list()]
    assert model.id == "qwen"
    assert model.to_dict()["input_modalities"] == ["text", "image"]


# Errors and their classes

TOLD = {"error": {"message": "What the target says.", "type": "x", "code": "y"}}


@pytest.mark.parametrize(
    ("reply", "of_openai", "of_anthropic"),
    [
        (whole(TOLD, 400), openai.BadRequestError, anthropic.BadRequestError),
        (whole(TOLD, 404), openai.NotFoundError, anthropic.NotFoundError),
        (whole(TOLD, 422), openai.UnprocessableEntityError, anthropic.UnprocessableEntityError),
        (whole(TOLD, 429, retry_after="60"), openai.RateLimitError, anthropic.RateLimitError),
        (whole(TOLD, 500), openai.InternalServerError, anthropic.InternalServerError),
        (whole(TOLD, 401), openai.InternalServerError, anthropic.InternalServerError),
        (Reply((b"<html>",), 503, "text/html"), openai.InternalServerError, anthropic.InternalServerError),
        (Reply((b"nonsense",), raw=True), openai.InternalServerError, anthropic.InternalServerError),
    ],
    ids=["400", "404", "422", "429", "500", "our key refused", "a page", "garbage"],
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_errors_of_the_target(
    reply: Reply,
    of_openai: type[openai.APIStatusError],
    of_anthropic: type[anthropic.APIStatusError],
    streamed: bool,
    oai: AsyncOpenAI,
    ant: AsyncAnthropic,
    gateway: Running,
    upstream: Upstream,
) -> None:
    upstream.says(reply)
    with pytest.raises(of_openai) as chat:
        await oai.chat.completions.create(model="m", messages=HI, stream=streamed)
    with pytest.raises(of_openai):
        await oai.responses.create(model="m", input="Hi.", stream=streamed)
    with pytest.raises(of_anthropic) as messages:
        await ant.messages.create(model="m", max_tokens=9, messages=HI, stream=streamed)
    for error in (chat.value, messages.value):
        assert error.response.headers["x-request-id"]
        if reply.status == 429:
            assert error.response.headers["retry-after"] == "60"


async def test_errors_of_the_gateways_own(upstream: Upstream) -> None:
    forbidden = {"id": "other", "sha256": sha256(b"other").hexdigest(), "routes": ["/v1/models"]}
    keys = [{"id": "app", "sha256": HASH, "requests_per_minute": 5}, forbidden]
    big: Any = [{"role": "user", "content": "x" * 5000}]
    async with running(upstream, keys=keys, server={"max_body_bytes": 2000}) as gateway:

        async def chat(key: str, error: type[Exception], messages: Any = HI) -> None:
            async with gateway.openai(key) as client:
                with pytest.raises(error):
                    await client.chat.completions.create(model="m", messages=messages)

        async def told(key: str, error: type[Exception], messages: Any = HI) -> None:
            async with gateway.anthropic(key) as client:
                with pytest.raises(error):
                    await client.messages.create(model="m", max_tokens=9, messages=messages)

        await chat("wrong", openai.AuthenticationError)
        await told("wrong", anthropic.AuthenticationError)
        await chat("other", openai.PermissionDeniedError)
        await told("other", anthropic.PermissionDeniedError)
        await chat(KEY, openai.BadRequestError, messages=[])
        await told(KEY, anthropic.BadRequestError, messages=[])
        await chat(KEY, openai.APIStatusError, messages=big)
        await told(KEY, anthropic.RequestTooLargeError, messages=big)
        async with gateway.openai(KEY) as client:
            await client.chat.completions.create(model="m", messages=HI)
            with pytest.raises(openai.RateLimitError) as limited:
                await client.chat.completions.create(model="m", messages=HI)
            assert int(limited.value.response.headers["retry-after"]) >= 1
    assert len(upstream.asked) == 1


async def test_a_route_that_is_not_served(oai: AsyncOpenAI, ant: AsyncAnthropic, gateway: Running) -> None:
    with pytest.raises(openai.NotFoundError):
        await oai.embeddings.create(model="m", input="Hi.", encoding_format="float")
    with pytest.raises(anthropic.NotFoundError):
        await ant.messages.count_tokens(model="m", messages=HI)


async def test_a_target_that_breaks_off_in_mid_stream(
    oai: AsyncOpenAI, ant: AsyncAnthropic, gateway: Running, upstream: Upstream
) -> None:
    gate = asyncio.Event()
    half = b'data: {"choices": [{"del'

    async def broken(replied: list[bytes], read: Callable[[], Any]) -> None:
        gate.clear()
        upstream.says(stream(*replied[:2], half, gate, DROP))
        async for _ in await read():
            gate.set()

    with pytest.raises(openai.APIError, match="broke off"):
        await broken(
            [chunk("Hel"), chunk("lo")], lambda: oai.chat.completions.create(model="m", messages=HI, stream=True)
        )
    with pytest.raises(anthropic.APIStatusError, match="broke off"):
        await broken(
            message_events("Hel"), lambda: ant.messages.create(model="m", max_tokens=9, messages=HI, stream=True)
        )
    kinds = []
    gate.clear()
    upstream.says(stream(*response_events("Hel")[:2], half, gate, DROP))
    async for one in await oai.responses.create(model="m", input="Hi.", stream=True):
        gate.set()
        kinds.append(one.type)
    assert kinds[-1] == "error"


async def test_an_sdks_own_retries_wait_as_long_as_the_target_asks(gateway: Running, upstream: Upstream) -> None:
    """There is one layer of retries, the caller's."""
    upstream.says(whole(TOLD, 429, retry_after="1"), whole(completion()))
    async with AsyncOpenAI(base_url=f"{gateway.root}/v1", api_key="none", max_retries=1) as client:
        begun = asyncio.get_running_loop().time()
        answer = await client.chat.completions.create(model="m", messages=HI)
        assert asyncio.get_running_loop().time() - begun >= 1.0
    assert answer.choices[0].message.content == "Hello from upstream."
    assert [asked.path for asked in upstream.asked] == [CHAT] * 2


async def test_a_thousand_tokens_arrive_in_order(oai: AsyncOpenAI, gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(*(chunk(f"{at} ") for at in range(1000)), chunk(None, "stop")))
    pieces = await oai.chat.completions.create(model="m", messages=HI, stream=True)
    said = "".join([one.choices[0].delta.content or "" async for one in pieces])
    assert said.split() == [str(at) for at in range(1000)]
    assert upstream.last.path != MESSAGES
