import asyncio
from email.utils import formatdate
from time import perf_counter, time
from typing import Any

import pytest

from tests.chat_server import ChatServer, Reply, event, said, streamed
from vlmguard.chat import Chat, Response
from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    ConfigError,
    ContextTooLong,
    RateLimited,
    TargetError,
    Timeout,
    Upstream,
)
from vlmguard.vlms.endpoint import Endpoint

pytestmark = pytest.mark.asyncio
CHAT = Chat.of("hello", temperature=0.2, model="theirs", metadata={"id": 1})


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLMGUARD_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


async def ask(server: ChatServer, chat: Chat = CHAT, *, stream: bool = False, **options: Any) -> Response:
    endpoint = Endpoint(server.url, "ours", retry_wait_seconds=0.001, **options)
    try:
        if not stream:
            return await endpoint(chat)
        *texts, response = [piece async for piece in endpoint.stream(chat)]
        assert isinstance(response, Response)
        assert "".join(map(str, texts)) == response.text
        return response
    finally:
        await endpoint.aclose()


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])


async def test_sends_the_request_as_it_came_with_our_model() -> None:
    async with ChatServer(said("hi")) as server:
        response = await ask(server, api_key="secret")
    assert response.text == "hi"
    assert (response.usage.calls, response.usage.prompt_tokens, response.usage.completion_tokens) == (1, 7, 3)
    assert response.usage.seconds > 0
    assert response.raw["id"] == "1"
    assert server.requests == [{**CHAT.to_wire(), "model": "ours", "stream": False}]
    assert server.keys == ["Bearer secret"]


async def test_streams_pieces_then_the_response() -> None:
    async with ChatServer(streamed("Hel", "lo ", "wörld")) as server:
        endpoint = Endpoint(server.url, "ours")
        pieces = [piece async for piece in endpoint.stream(CHAT)]
        await endpoint.aclose()
    assert pieces[:3] == ["Hel", "lo ", "wörld"]
    response = pieces[3]
    assert isinstance(response, Response)
    assert len(pieces) == 4
    assert (response.text, response.finish_reason) == ("Hello wörld", "stop")
    assert response.usage.prompt_tokens == 7
    assert server.requests[0]["stream_options"] == {"include_usage": True}
    assert response.raw["choices"][0]["message"] == {"role": "assistant", "content": "Hello wörld"}


async def test_a_stream_in_odd_pieces_without_usage_and_with_comments() -> None:
    body = b": keep-alive\n\n" + b"".join(streamed("Grü", "ße", usage=False)).replace(b"\n", b"\r\n")
    pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
    async with ChatServer(pieces) as server:
        response = await ask(server, stream=True)
    assert response.text == "Grüße"
    assert (response.usage.calls, response.usage.prompt_tokens) == (1, 0)


async def test_a_server_that_does_not_stream() -> None:
    async with ChatServer(said("whole")) as server:
        assert (await ask(server, stream=True)).text == "whole"


async def test_no_usage_is_one_call_and_no_tokens() -> None:
    answer = said("hi") | {"usage": None}
    async with ChatServer(answer) as server:
        usage = (await ask(server)).usage
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (1, 0, 0)


async def test_logprobs() -> None:
    safe, risky = {"token": "safe", "logprob": -0.1}, {"token": "risky", "logprob": -2.4}
    logprobs = {"content": [{**safe, "top_logprobs": [safe, risky]}]}
    answer = said("safe")
    answer["choices"][0]["logprobs"] = logprobs
    choice = {"index": 0, "delta": {"content": "safe"}, "logprobs": logprobs, "finish_reason": "stop"}
    async with ChatServer(answer, [event({"choices": [choice]}), b"data: [DONE]\n\n"]) as server:
        for response in (await ask(server), await ask(server, stream=True)):
            (only,) = response.logprobs
            assert (only.token, only.logprob, dict(only.top)) == ("safe", -0.1, {"safe": -0.1, "risky": -2.4})


async def test_tool_calls_arrive_whole() -> None:
    deltas: list[dict[str, Any]] = [
        {"tool_calls": [{"index": 0, "id": "c1", "type": "function", "function": {"name": "look", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"at":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"cat"}'}}]},
    ]
    chunks = [event({"choices": [{"index": 0, "delta": delta}]}) for delta in deltas]
    end = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
    async with ChatServer([*chunks, end, b"data: [DONE]\n\n"]) as server:
        response = await ask(server, stream=True)
    (call,) = response.raw["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "look", "arguments": '{"at":"cat"}'}
    assert call["id"] == "c1"
    assert response.finish_reason == "tool_calls"


@both
@pytest.mark.parametrize("status", [500, 502, 503, 429])
async def test_passing_failures_are_tried_again(status: int, stream: bool) -> None:
    good = streamed("hi") if stream else said("hi")
    async with ChatServer(Reply({"error": "busy"}, status), Reply({"error": "busy"}, status), good) as server:
        assert (await ask(server, stream=stream)).text == "hi"
    assert len(server.requests) == 3


@both
async def test_lasting_failures_end_in_an_error_that_says_where(stream: bool) -> None:
    async with ChatServer(Reply("<html>bad gateway</html>", 502)) as server:
        with pytest.raises(Upstream, match="502") as caught:
            await ask(server, stream=stream, retries=1, api_key="secret")
    assert server.url in str(caught.value)
    assert "secret" not in str(caught.value)
    assert caught.value.status == 502
    assert len(server.requests) == 2


@both
@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_key_is_not_tried_again(status: int, stream: bool) -> None:
    reply = Reply({"error": {"message": "bad key sk-12345"}}, status)
    async with ChatServer(reply) as server:
        with pytest.raises(AuthenticationFailed, match="VLMGUARD_API_KEY") as caught:
            await ask(server, stream=stream, api_key="sk-12345")
    assert "sk-12345" not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 404, 422])
async def test_wrong_requests_are_not_tried_again(status: int) -> None:
    async with ChatServer(Reply({"error": {"message": "no such field"}}, status)) as server:
        with pytest.raises(Upstream, match="no such field") as caught:
            await ask(server)
    assert caught.value.status == status
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (413, "too large"),
        (400, {"error": {"message": "no", "code": "context_length_exceeded"}}),
        (400, {"error": {"message": "This model's maximum context length is 4096 tokens."}}),
        (422, {"detail": "The decoder prompt is longer than the maximum model length of 512."}),
        (400, {"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}),
    ],
)
async def test_context_too_long(status: int, body: Any) -> None:
    async with ChatServer(Reply(body, status)) as server:
        with pytest.raises(ContextTooLong):
            await ask(server)
    assert len(server.requests) == 1


@both
async def test_nobody_there(stream: bool) -> None:
    async with ChatServer(said("hi")) as server:
        pass
    with pytest.raises(Upstream, match="could not be reached") as caught:
        await ask(server, stream=stream, retries=1)
    assert server.url in str(caught.value)
    assert caught.value.status is None


@both
async def test_silence(stream: bool) -> None:
    async with ChatServer(Reply(said("hi"), delay=5)) as server:
        with pytest.raises(Timeout, match=r"said nothing for 0\.1 s"):
            await ask(server, stream=stream, first_byte_seconds=0.1, retries=1)
        assert len(server.requests) == 2


@both
async def test_the_total_covers_retries(stream: bool) -> None:
    started = perf_counter()
    async with ChatServer(Reply(said("hi"), delay=5)) as server:
        with pytest.raises(Timeout, match="took over"):
            await ask(server, stream=stream, first_byte_seconds=0.2, total_seconds=0.5, retries=9)
    assert perf_counter() - started < 2


async def test_a_stall_within_a_stream() -> None:
    async with ChatServer(Reply(streamed("a", "b"), gap=5)) as server:
        with pytest.raises(Timeout):
            await ask(server, stream=True, first_byte_seconds=0.2, retries=0)


async def test_nothing_is_tried_again_once_text_came() -> None:
    failure = event({"error": {"message": "engine died", "code": 500}})
    beginning = streamed("par", "tial", finish_reason=None, usage=False, done=False)
    async with ChatServer([*beginning, failure]) as server:
        endpoint = Endpoint(server.url, "ours")
        stream = endpoint.stream(CHAT)
        assert [await anext(stream), await anext(stream)] == ["par", "tial"]
        with pytest.raises(Upstream, match="engine died"):
            await anext(stream)
        await endpoint.aclose()
    assert len(server.requests) == 1


async def test_an_error_event_first_is_tried_again_only_if_it_may_pass() -> None:
    async with ChatServer([event({"message": "bad field", "code": 400}, "error")]) as server:
        with pytest.raises(Upstream, match="bad field"):
            await ask(server, stream=True)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(streamed("par", finish_reason=None, done=False), id="cut off"),
        pytest.param([b"data: [DONE]\n\n"], id="empty"),
        pytest.param([b"data: {not json\n\n"], id="not JSON"),
        pytest.param([b'data: {"choices":[{"delta":"text"}]}\n\n'], id="odd shape"),
    ],
)
async def test_a_broken_stream_is_a_bad_answer(body: list[bytes]) -> None:
    async with ChatServer(body) as server:
        with pytest.raises(BadAnswer):
            await ask(server, stream=True)


async def test_closing_a_stream_hangs_up() -> None:
    async with ChatServer(Reply(streamed(*"abcdefgh"), gap=0.2)) as server:
        endpoint = Endpoint(server.url, "ours")
        stream = endpoint.stream(CHAT)
        assert await anext(stream) == "a"
        await stream.aclose()
        await asyncio.wait_for(server.hung_up.wait(), 5)
        await endpoint.aclose()


async def test_cancelling_a_call_hangs_up() -> None:
    async with ChatServer(Reply(said("hi"), delay=30)) as server:
        endpoint = Endpoint(server.url, "ours")
        call = asyncio.create_task(endpoint(CHAT))
        await server.asked.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(server.hung_up.wait(), 5)
        await endpoint.aclose()


async def test_connections_are_used_again() -> None:
    async with ChatServer(said("hi")) as server:
        endpoint = Endpoint(server.url, "ours")
        for _ in range(5):
            await endpoint(CHAT)
        assert len(server.connections) == 1
        await endpoint.aclose()


async def test_the_openai_key_goes_to_openai_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    async with ChatServer(said("hi")) as server:
        await ask(server)
        monkeypatch.setenv("VLMGUARD_API_KEY", "ours")
        await ask(server)
    assert server.keys == [None, "Bearer ours"]
    assert "theirs" not in repr(Endpoint("https://api.openai.com/v1", "gpt"))


async def test_specs() -> None:
    endpoint = Endpoint.from_spec("http://127.0.0.1:8000/v1/#org/model")
    assert (endpoint.model, endpoint.name) == ("org/model", "http://127.0.0.1:8000/v1#org/model")
    for wrong in ("http://127.0.0.1/v1", "ftp://host/v1#m", "http://user:key@host/v1#m"):
        with pytest.raises(ConfigError):
            Endpoint.from_spec(wrong)


async def test_an_error_holds_no_picture() -> None:
    picture = "data:image/png;base64," + "A" * 5000
    async with ChatServer(Reply({"error": {"message": f"bad input {picture} in messages"}}, 400)) as server:
        with pytest.raises(TargetError) as caught:
            await ask(server)
    assert "AAAA" not in str(caught.value)
    assert "in messages" in str(caught.value)


async def test_retry_after_is_waited_for() -> None:
    async with ChatServer(Reply({"error": "slow"}, 429, {"Retry-After": "0.3"}), said("hi")) as server:
        started = perf_counter()
        assert (await ask(server)).text == "hi"
    assert perf_counter() - started >= 0.3


@pytest.mark.parametrize("dated", [False, True], ids=["seconds", "date"])
async def test_a_long_retry_after_fails_at_once(dated: bool) -> None:
    stamp = formatdate(time() + 86400, usegmt=True) if dated else "86400"
    async with ChatServer(Reply({"error": "slow"}, 429, {"Retry-After": stamp})) as server:
        with pytest.raises(RateLimited) as caught:
            await ask(server)
    assert caught.value.retry_after == pytest.approx(86400, abs=5)
    assert len(server.requests) == 1
