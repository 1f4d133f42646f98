"""Streams through a gateway that serves, from an upstream that does what upstreams do."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.gateway.running import (
    CHAT,
    DONE,
    DROP,
    MESSAGES,
    ORDINARY,
    PATIENCE_SECONDS,
    RESPONSES,
    ROUTES,
    Reply,
    Running,
    Upstream,
    ask,
    chunk,
    completion,
    completion_chunks,
    error_of,
    message_events,
    response_events,
    running,
    stream,
    until,
    usage_chunk,
    whole,
)
from vlmguard.gateway.audit_record import Record
from vlmguard.guards.policy import REFUSAL

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVENTS: dict[str, Callable[..., list[bytes]]] = {
    CHAT: completion_chunks,
    RESPONSES: response_events,
    MESSAGES: message_events,
}


def events_in(body: bytes) -> list[Any]:
    """The data of each event, as an SDK reads it."""
    lines = [line.partition(b":")[2].strip() for line in body.splitlines() if line.startswith(b"data:")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


async def begun(answer: aiohttp.ClientResponse) -> bytes:
    """The first that arrives of an answer."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await answer.content.readany()


async def only_record(gateway: Running, request_id: str) -> Record:
    """Of a request that has ended."""

    def of_it() -> list[Record]:
        return [one for one in gateway.records() if one.request_id == request_id and one.action != "begun"]

    await until(lambda: bool(of_it()))
    (record,) = of_it()
    return record


# Bytes and time


@pytest.mark.parametrize("path", ROUTES)
async def test_a_piece_arrives_while_the_target_is_still_thinking(
    path: str, gateway: Running, upstream: Upstream
) -> None:
    first, *rest = EVENTS[path]("Hello ", "world.")
    thinking = asyncio.Event()
    upstream.says(stream(first, thinking, *rest))
    async with gateway.asking(path, ask(path, stream=True)) as answer:
        assert await begun(answer) == first
        assert upstream.replying == 1
        thinking.set()
        assert await answer.read() == b"".join(rest)


async def test_each_piece_arrives_before_the_next_is_sent(gateway: Running, upstream: Upstream) -> None:
    gates = [asyncio.Event() for _ in range(5)]
    pieces = [it for at, gate in enumerate(gates) for it in (chunk(f"word {at} "), gate)]
    upstream.says(stream(*pieces, DONE))
    async with gateway.asking(CHAT, ask(CHAT, stream=True)) as answer:
        for at, gate in enumerate(gates):
            assert await begun(answer) == chunk(f"word {at} ")
            gate.set()
        assert await begun(answer) == DONE


async def test_no_piece_waits_for_a_packet_to_be_acknowledged(gateway: Running, upstream: Upstream) -> None:
    """As Nagle's algorithm would have it: 40 ms in every stream of a connection but its first. The best of ten is looked at."""
    upstream.says(stream(chunk("Hel"), 0.001, chunk("lo."), DONE))
    times = []
    for _ in range(10):
        asked = time.perf_counter()
        await gateway.ask(CHAT, ask(CHAT, stream=True))
        times.append(time.perf_counter() - asked)
    assert min(times[1:]) < 0.035


@pytest.mark.parametrize("path", ROUTES)
async def test_a_stream_is_passed_on_byte_for_byte(path: str, gateway: Running, upstream: Upstream) -> None:
    odd = [b": keep-alive\n\n", b'event:odd\r\ndata:  {"b" : 1,"a":"\\u00e9 \xc3\xa9"}\r\nid: 7\r\n\r\n']
    pieces = [*odd, *EVENTS[path]("Grüße ", "世界")]
    upstream.says(stream(*pieces))
    answer = await gateway.ask(path, ask(path, stream=True))
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.body == b"".join(pieces)


async def test_characters_torn_between_packets_arrive_whole(gateway: Running, upstream: Upstream) -> None:
    torn = 'data: {"choices": [{"index": 0, "delta": {"content": "Grüße 😀 世界"}}]}\n\n'.encode()
    upstream.says(stream(*(it for byte in torn for it in (bytes([byte]), 0.0)), DONE))
    async with gateway.asking(CHAT, ask(CHAT, stream=True)) as answer:
        async for piece in answer.content.iter_any():
            piece.decode()  # each by itself
            assert piece.endswith(b"\n\n")


async def test_a_line_that_keeps_the_connection_alive_is_not_kept(gateway: Running, upstream: Upstream) -> None:
    gate = asyncio.Event()
    upstream.says(stream(b": thinking\n", gate, b"\n", DONE))
    async with gateway.asking(CHAT, ask(CHAT, stream=True)) as answer:
        assert await begun(answer) == b": thinking\n"
        gate.set()
        assert await answer.read() == b"\n" + DONE


async def test_a_usage_chunk_without_choices_is_passed_on(gateway: Running, upstream: Upstream) -> None:
    body = ask(CHAT, stream=True, stream_options={"include_usage": True})
    answer = await gateway.ask(CHAT, body)
    assert upstream.last.json == body
    assert answer.body.endswith(usage_chunk() + DONE)


@pytest.mark.parametrize("end", [DONE, b"data:[DONE]\n\n", b"data: [DONE]\r\n\r\n", b"data: [DONE]\n", b"data: [DONE]"])
async def test_an_end_that_is_there_is_not_doubled(end: bytes, gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(chunk("Hi."), end))
    answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
    assert answer.body == chunk("Hi.") + end


async def test_a_stream_that_was_asked_for_and_comes_whole_is_passed_on(gateway: Running, upstream: Upstream) -> None:
    upstream.says(whole(completion("Not streamed.")))
    answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
    assert answer.json == completion("Not streamed.")
    assert answer.headers["content-type"] == "application/json"


async def test_many_streams_at_once_keep_apart(gateway: Running, upstream: Upstream) -> None:
    upstream.says(*(stream(chunk(f"for {at}"), 0.05, DONE) for at in range(30)))
    answers = await asyncio.gather(*(gateway.ask(CHAT, ask(CHAT, stream=True)) for _ in range(30)))
    assert {answer.body for answer in answers} == {chunk(f"for {at}") + DONE for at in range(30)}


# What goes wrong on the way


def error_in(path: str, body: bytes) -> dict[str, Any]:
    """The error that ends a stream in the API's own shape."""
    last: dict[str, Any] = events_in(body)[-1]
    if path == CHAT:
        assert body.endswith(DONE)
        return dict(last["error"])
    assert b"event: error\n" in body
    assert last["type"] == "error"
    return dict(last["error"]) if path == MESSAGES else last


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("half", [b"", b'data: {"choices": [{"delta": {"cont'], ids=["between events", "in an event"])
async def test_a_target_that_breaks_off_ends_the_stream_with_an_error(
    path: str, half: bytes, gateway: Running, upstream: Upstream
) -> None:
    first, gate = EVENTS[path]("Hel")[0], asyncio.Event()
    upstream.says(stream(first + half, gate, DROP))
    async with gateway.asking(
        path, ask(path, stream=True), x_request_id=f"broken-{ROUTES.index(path)}-{len(half)}"
    ) as answer:
        assert answer.status == 200
        assert await begun(answer) == first
        gate.set()
        rest = await answer.read()
    assert half not in rest or not half
    assert "broke off" in error_in(path, rest)["message"]
    record = await only_record(gateway, answer.headers["x-request-id"])
    assert (record.action, record.note, record.status) == ("error", "Upstream", 200)


async def test_half_an_event_at_the_end_is_no_end(gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(chunk("Hel"), b'data: {"choices": [{"del'))
    answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
    assert "broke off" in error_in(CHAT, answer.body)["message"]


async def test_garbage_in_the_stream_of_packets_is_an_error(gateway: Running, upstream: Upstream) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    first, gate = chunk("Hel"), asyncio.Event()
    upstream.says(Reply((head, b"%x\r\n%b\r\n" % (len(first), first), gate, b"zzzz\r\nnonsense"), raw=True))
    async with gateway.asking(CHAT, ask(CHAT, stream=True)) as answer:
        assert await begun(answer) == first
        gate.set()
        assert error_in(CHAT, await answer.read())["type"] == "server_error"


@pytest.mark.parametrize("path", ROUTES)
async def test_a_target_that_falls_silent_in_mid_stream(path: str, upstream: Upstream) -> None:
    first = EVENTS[path]("Hel")[0]
    upstream.says(stream(first, 60.0))
    async with running(upstream, target={"first_byte_seconds": 0.2}) as gateway:
        answer = await gateway.ask(path, ask(path, stream=True))
        assert "said nothing for 0.2 s" in error_in(path, answer.body)["message"]
        await until(upstream.hung_up.is_set)


async def test_a_stream_that_never_ends_meets_the_deadline(upstream: Upstream) -> None:
    upstream.says(stream(*(it for _ in range(1000) for it in (chunk("and "), 0.02))))
    async with running(upstream, target={"total_seconds": 0.5}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
        assert len(answer.body) > 3 * len(chunk("and "))
        assert "over 0.5 s" in error_in(CHAT, answer.body)["message"]
        await until(upstream.hung_up.is_set)
        assert gateway.record(answer).note == "Timeout"


@pytest.mark.parametrize("path", ROUTES)
async def test_an_error_before_the_first_piece_has_a_status_of_its_own(
    path: str, gateway: Running, upstream: Upstream
) -> None:
    upstream.says(Reply((b'{"error": {"message": "busy"}}',), 503, headers={"Retry-After": "7"}))
    answer = await gateway.ask(path, ask(path, stream=True))
    assert (answer.status, answer.json, answer.headers["retry-after"]) == (503, {"error": {"message": "busy"}}, "7")


# Clients that leave


@pytest.mark.parametrize("pieces", [(30.0,), (chunk("Hel"), 30.0)], ids=["before the first piece", "in mid-stream"])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_client_that_leaves_ends_the_work_within_a_second(
    pieces: tuple[Any, ...], streamed: bool, gateway: Running, upstream: Upstream
) -> None:
    upstream.says(stream(*pieces) if streamed else Reply(pieces))
    name = f"leaving-{len(pieces)}-{streamed}"
    asking = asyncio.create_task(_left_open(gateway, streamed, name))
    await asyncio.wait_for(upstream.was_asked.wait(), PATIENCE_SECONDS)
    await asyncio.sleep(0.1)
    left = time.perf_counter()
    asking.cancel()
    await asyncio.wait_for(upstream.hung_up.wait(), PATIENCE_SECONDS)
    assert time.perf_counter() - left < 1.0
    await until(lambda: gateway.gateway.admission.running == 0)
    record = await only_record(gateway, name)
    assert (record.action, record.note) == ("error", "the client left")


async def _left_open(gateway: Running, streamed: bool, request_id: str) -> None:
    async with gateway.asking(CHAT, ask(CHAT, stream=streamed), x_request_id=request_id) as answer:
        await answer.read()


async def test_a_client_that_leaves_while_the_guard_thinks(gateway: Running, upstream: Upstream) -> None:
    gateway.rewriter.slow_seconds = 30.0
    body = ask(CHAT, "slow and risky", stream=True)
    asking = asyncio.create_task(gateway.ask(CHAT, body, x_request_id="thinking"))
    await until(lambda: bool(gateway.rewriter.judged))
    asking.cancel()
    await until(lambda: gateway.gateway.admission.running == 0)
    assert (await only_record(gateway, "thinking")).note == "the client left"
    assert upstream.asked == []
    gateway.rewriter.slow_seconds = 0.2


async def test_nothing_is_left_over() -> None:
    """After clients that left, targets that broke off, and answers that came to their end."""
    async with Upstream() as upstream, running(upstream) as gateway:
        await gateway.ask(CHAT, ask(CHAT, stream=True))
        tasks = len(asyncio.all_tasks())
        upstream.says(stream(chunk("Hel"), 30.0))
        asking = [asyncio.create_task(_left_open(gateway, True, f"left-{at}")) for at in range(10)]
        await until(lambda: upstream.replying == 10)
        for one in asking:
            one.cancel()
        await until(lambda: upstream.replying == 0)
        upstream.says(stream(chunk("Hel"), DROP))
        await asyncio.gather(*(gateway.ask(CHAT, ask(CHAT, stream=True)) for _ in range(10)))
        upstream.says()
        await asyncio.gather(*(gateway.ask(CHAT, ask(CHAT, stream=True)) for _ in range(10)))
        assert gateway.gateway.admission.running == 0
        await until(lambda: upstream.connections <= 12)
        connections = upstream.connections
        await until(lambda: len(asyncio.all_tasks()) <= tasks + connections)  # the upstream's own
        await gateway.gateway.target.aclose()
        await until(lambda: upstream.connections == 0)


async def test_a_client_that_leaves_after_the_last_event_has_its_answer(gateway: Running, upstream: Upstream) -> None:
    """As the SDKs do, which don't wait for the end of the connection."""
    upstream.says(stream(*completion_chunks("Hello."), 30.0))
    async with gateway.asking(CHAT, ask(CHAT, stream=True), x_request_id="enough") as answer:
        async for piece in answer.content.iter_any():
            if piece.endswith(DONE):
                break
    await until(upstream.hung_up.is_set)
    await until(lambda: gateway.gateway.admission.running == 0)
    assert (await only_record(gateway, "enough")).action == "passed"


async def _counted(gateway: Running, action: str) -> float:
    content = (await gateway.ask("/metrics", method="GET")).body.decode()
    lines = [line for line in content.splitlines() if line.startswith("vlmguard_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if f'action="{action}"' in line)


async def test_what_is_counted_is_what_was_answered(upstream: Upstream) -> None:
    async with running(upstream) as gateway:
        for _ in range(5):
            async with gateway.openai() as client:
                async for _ in await client.chat.completions.create(**ask(CHAT), stream=True):
                    pass
                await client.chat.completions.create(**ask(CHAT))
        await until(lambda: gateway.gateway.admission.running == 0)
        assert await _counted(gateway, "passed") == 10
        assert await _counted(gateway, "error") == 0


# The record of a stream


async def test_a_stream_is_on_record_as_soon_as_it_begins(gateway: Running, upstream: Upstream) -> None:
    gate = asyncio.Event()
    upstream.says(stream(chunk("Hel"), gate, DONE))
    async with gateway.asking(CHAT, ask(CHAT, stream=True), x_request_id="running") as answer:
        await begun(answer)
        (record,) = (one for one in gateway.records() if one.request_id == "running")
        assert (record.action, record.risk) == ("begun", 0.1)
        gate.set()
        await answer.read()
    assert (await only_record(gateway, "running")).action == "passed"
    assert len([one for one in gateway.records() if one.request_id == "running"]) == 1


async def test_the_record_is_whole_before_the_last_event_is_sent(gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(chunk("Hello."), DONE, 30.0))
    async with gateway.asking(CHAT, ask(CHAT, stream=True), x_request_id="whole") as answer:
        async for piece in answer.content.iter_any():
            if piece.endswith(DONE):
                (record,) = (one for one in gateway.records() if one.request_id == "whole")
                assert record.action == "passed"
                return


# Answers that the gateway makes


@pytest.mark.parametrize("path", ROUTES)
async def test_a_refusal_is_streamed_in_the_apis_shape(path: str, upstream: Upstream) -> None:
    async with running(upstream, policy={"mode": "block"}) as gateway:
        answer = await gateway.ask(path, ask(path, "risky", stream=True))
        assert answer.status == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["x-vlmguard-action"] == "refused"
        assert REFUSAL in answer.body.decode()
        assert upstream.asked == []
        ordinary = b"".join(piece for piece in ORDINARY[path, True].pieces if isinstance(piece, bytes))
        assert _kinds(path, answer.body) >= _kinds(path, ordinary)


def _kinds(path: str, body: bytes) -> set[str]:
    """What kinds of events are in a stream."""
    return {str(one.get("type") or one["object"]) for one in events_in(body)}


@pytest.mark.parametrize("path", ROUTES)
async def test_a_model_in_this_process_streams_word_by_word(path: str) -> None:
    async with running("scripted:One two three.") as gateway:
        answer = await gateway.ask(path, ask(path, stream=True))
        assert answer.headers["x-vlmguard-action"] == "passed"
        said = [json.dumps(one) for one in events_in(answer.body)]
        assert sum('"One"' in one for one in said) == 1
        assert sum('" two"' in one for one in said) == 1
        refused = await gateway.ask(path, ask(path, "risky", stream=True))
        assert refused.headers["x-vlmguard-action"] == "rewrote"


async def test_the_usage_of_a_model_in_this_process_comes_where_it_was_asked_for() -> None:
    async with running("scripted:One two.") as gateway:
        without = events_in((await gateway.ask(CHAT, ask(CHAT, stream=True))).body)
        assert all(one["choices"] for one in without)
        asked = ask(CHAT, stream=True, stream_options={"include_usage": True})
        *others, usage = events_in((await gateway.ask(CHAT, asked)).body)
        assert all(one["usage"] is None for one in others)
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 2)


MODELS = '''
import asyncio
from vlmguard.chat import Response
from vlmguard.errors import ContextTooLong
from vlmguard.vlms.scripted import Scripted

class Told(Scripted):
    """Says a word, then what the last word of the request says."""

    closed = False

    def __init__(self):
        super().__init__("Hello.")

    async def stream(self, chat):
        if "nothing" in chat.text:
            return
        if "at once" in chat.text:
            raise ContextTooLong("the request is too long")
        try:
            yield "Hel"
            if "late" in chat.text:
                raise ContextTooLong("the request is too long")
            if "fault" in chat.text:
                raise ZeroDivisionError(chat.text)
            await asyncio.sleep(60)
        finally:
            Told.closed = True
'''


@pytest.fixture
def told(tmp_path: Path) -> str:
    (tmp_path / "models.py").write_text(MODELS)
    return f"{tmp_path / 'models.py'}:Told"


@pytest.mark.parametrize("path", ROUTES)
async def test_a_model_in_this_process_that_fails(path: str, told: str) -> None:
    async with running(told) as gateway:
        for words, status in (("at once", 400), ("nothing", 502)):
            answer = await gateway.ask(path, ask(path, words, stream=True))
            assert answer.status == status
            error_of(path, answer)
        for words, said in (("late", "too long"), ("fault", "a fault in the gateway")):
            answer = await gateway.ask(path, ask(path, words, stream=True))
            assert answer.status == 200
            assert b'"Hel"' in answer.body
            assert said in error_in(path, answer.body)["message"]
            assert gateway.record(answer).action == "error"


async def test_a_client_that_leaves_ends_the_work_of_a_model_in_this_process(told: str) -> None:
    async with running(told) as gateway:
        async with gateway.asking(CHAT, ask(CHAT, stream=True), x_request_id="left") as answer:
            await begun(answer)
        left = time.perf_counter()
        model = gateway.gateway.target.vlm  # type: ignore[attr-defined]
        await until(lambda: type(model).closed)
        assert time.perf_counter() - left < 1.0
        assert (await only_record(gateway, "left")).note == "the client left"


GUARD = '''
from dataclasses import replace
from vlmguard.chat import Step

class Moderator:
    """Reads the answer and takes back what is in it of a secret."""

    def __init__(self, target):
        self.target, self.name, self.can = target, f"moderator({target.name})", target.can

    async def __call__(self, chat):
        answer = await self.target(chat)
        if "secret" in answer.text:
            return replace(answer, text="Taken back.").with_step(Step("moderator", "refused", category="privacy"))
        return answer.with_step(Step("moderator", "passed"))

    async def stream(self, chat):
        response = await self(chat)
        yield response.text
        yield response

    async def aclose(self):
        await self.target.aclose()

class Silent(Moderator):
    async def __call__(self, chat):
        return await self.target(chat)
'''


@pytest.fixture(scope="module")
def guard_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("guard") / "moderator.py"
    path.write_text(GUARD)
    return str(path)


@pytest.mark.parametrize("path", ROUTES)
async def test_a_guard_that_sees_the_answer_holds_the_stream_and_says_so(
    path: str, upstream: Upstream, guard_file: str
) -> None:
    chosen = {"guard": {"name": f"{guard_file}:Moderator"}, "target": {"model": "m"}}
    gate = asyncio.Event()
    upstream.says(Reply((gate, json.dumps(completion("Hello.")).encode())), whole(completion("The secret is 42.")))
    async with running(upstream, **chosen) as gateway:
        asking = asyncio.create_task(gateway.ask(path, ask(path, stream=True)))
        await asyncio.wait_for(upstream.was_asked.wait(), PATIENCE_SECONDS)
        assert not asking.done()
        gate.set()
        answer = await asking
        assert answer.headers["x-vlmguard-stream"] == "held"
        assert answer.headers["x-vlmguard-action"] == "passed"
        assert "Hello." in answer.body.decode()
        for streamed in (True, False):
            answer = await gateway.ask(path, ask(path, stream=streamed))
            assert answer.status == 200
            assert "Taken back." in answer.body.decode()
            assert b"secret" not in answer.body
            assert answer.headers["x-vlmguard-action"] == "refused"
            assert answer.headers.get("x-vlmguard-stream") == ("held" if streamed else None)
            assert gateway.record(answer).category == "privacy"


async def test_of_several_choices_none_gets_round_a_guard_that_sees_one(upstream: Upstream, guard_file: str) -> None:
    told = completion("Hello.")
    told["choices"].append({**completion("The secret is 42.")["choices"][0], "index": 1})
    upstream.says(whole(told))
    async with running(upstream, guard={"name": f"{guard_file}:Moderator"}, target={"model": "m"}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, n=2))
        assert [choice["message"]["content"] for choice in answer.json["choices"]] == ["Hello."] * 2


async def test_a_holding_guard_that_leaves_no_step_has_let_it_pass(upstream: Upstream, guard_file: str) -> None:
    async with running(upstream, guard={"name": f"{guard_file}:Silent"}, target={"model": "m"}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT))
        assert (answer.status, answer.headers["x-vlmguard-action"]) == (200, "passed")


async def test_a_holding_guards_target_that_fails_is_an_error_of_the_apis(upstream: Upstream, guard_file: str) -> None:
    upstream.says(whole({"error": {"message": "busy"}}, 429, retry_after="9"))
    async with running(upstream, guard={"name": f"{guard_file}:Moderator"}, target={"model": "m"}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
        assert (answer.status, answer.headers["retry-after"]) == (429, "9")
        assert answer.json["error"]["type"] == "rate_limit_error"


async def test_an_allowed_route_streams_too(upstream: Upstream) -> None:
    first = b"data: {}\n\n"
    gate = asyncio.Event()
    upstream.says(stream(first, gate, b"data: half"))
    async with (
        running(upstream, routes={"allow": ["/v1/completions"]}) as gateway,
        gateway.asking("/v1/completions", {"stream": True}) as answer,
    ):
        assert await begun(answer) == first
        gate.set()
        assert await answer.read() == b"data: half"
