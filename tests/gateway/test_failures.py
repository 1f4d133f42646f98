"""What the gateway answers where something is wrong: in the caller's shape, with the right status."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.gateway.running import (
    CHAT,
    KEY,
    MESSAGES,
    PATIENCE_SECONDS,
    RESPONSES,
    ROUTES,
    Answered,
    Reply,
    Running,
    Upstream,
    ask,
    completion,
    error_of,
    key,
    picture,
    running,
    until,
    whole,
)
from vlmguard.gateway import web

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Errors, each in the caller's shape


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"{}",
        b'{"model":"m","model":"n","messages":[{"role":"user","content":"hi"}],"input":"hi","max_tokens":5}',
        b'{"model":7,"messages":[{"role":"user","content":"hi"}],"max_tokens":5}',
        b'{"model":"m","stream":"yes","messages":[{"role":"user","content":"hi"}],"max_tokens":5}',
        b"[" * 100_000,
    ],
)
async def test_a_request_that_cannot_be_read_is_a_400(
    path: str, body: bytes, gateway: Running, upstream: Upstream
) -> None:
    answer = await gateway.ask(path, body)
    assert answer.status == 400
    assert error_of(path, answer)["type"] == "invalid_request_error"
    assert upstream.asked == []
    record = gateway.record(answer)
    assert (record.action, record.status, record.note, record.route) == ("error", 400, "BadRequest", path)


@pytest.mark.parametrize("path", ROUTES)
async def test_keys(path: str, upstream: Upstream) -> None:
    async with running(upstream, keys=key(routes=[CHAT, RESPONSES, MESSAGES])) as gateway:
        without = await gateway.ask(path, ask(path))
        assert without.status == 401
        assert error_of(path, without)["type"] == "authentication_error"
        assert without.headers["www-authenticate"] == "Bearer"
        wrong = await gateway.ask(path, ask(path), x_api_key=f"{KEY}x")
        assert wrong.status == 401
        assert KEY not in wrong.body.decode()
        for header in ({"authorization": f"Bearer {KEY}"}, {"x_api_key": KEY}, {"api_key": KEY}):
            assert (await gateway.ask(path, ask(path), **header)).status == 200
        assert len(upstream.asked) == 3
        assert gateway.record(without).status == 401
    async with running(upstream, keys=key(routes=["/v1/models"])) as gateway:
        forbidden = await gateway.ask(path, ask(path), x_api_key=KEY)
        assert forbidden.status == 403
        assert error_of(path, forbidden)["type"] == "permission_error"


@pytest.mark.parametrize("path", ROUTES)
async def test_a_key_has_so_many_requests_a_minute(path: str, upstream: Upstream) -> None:
    async with running(upstream, keys=key(requests_per_minute=2)) as gateway:
        for _ in range(2):
            assert (await gateway.ask(path, ask(path), x_api_key=KEY)).status == 200
        answer = await gateway.ask(path, ask(path), x_api_key=KEY)
        assert answer.status == 429
        assert error_of(path, answer)["type"] == "rate_limit_error"
        assert 1 <= int(answer.headers["retry-after"]) <= 30


async def test_a_key_has_so_many_pictures_and_pixels(upstream: Upstream, png: bytes) -> None:
    part = {"type": "image_url", "image_url": {"url": picture(png)}}
    async with running(upstream, keys=key(images=2, pixels=100)) as gateway:

        async def answered(count: int) -> Answered:
            body = {"model": "m", "messages": [{"role": "user", "content": [part] * count}]}
            return await gateway.ask(CHAT, body, x_api_key=KEY)

        assert (await answered(2)).status == 200  # 48 pixels each
        assert "3 pictures" in error_of(CHAT, await answered(3))["message"]
    async with running(upstream, keys=key(pixels=90)) as gateway:
        answer = await gateway.ask(CHAT, {"messages": [{"role": "user", "content": [part] * 2}]}, x_api_key=KEY)
        assert answer.status == 413
        assert "96 pixels" in error_of(CHAT, answer)["message"]


@pytest.mark.parametrize(
    ("path", "shape"),
    [("/", CHAT), ("/v1/completions", CHAT), ("/v1/chat/completions/", CHAT), ("/v1/messages/count_tokens", MESSAGES)],
)
async def test_a_path_that_is_not_served_is_a_404(path: str, shape: str, gateway: Running, upstream: Upstream) -> None:
    for method in ("GET", "POST", "DELETE"):
        answer = await gateway.ask(path, ask(CHAT) if method == "POST" else None, method)
        assert answer.status == 404
        assert error_of(shape, answer)["type"] == "not_found_error"
    assert upstream.asked == []


@pytest.mark.parametrize("path", ROUTES)
async def test_a_method_that_is_not_known_is_a_405(path: str, gateway: Running) -> None:
    answer = await gateway.ask(path, None, "GET")
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    assert "GET" in error_of(path, answer)["message"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_that_does_not_come_is_a_408(path: str, gateway: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "BODY_SECONDS", 0.1)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{{"
    async with gateway.connection() as (reader, writer):
        writer.write(head.encode())
        answer = await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)  # to the end: the connection is closed
    first, _, rest = answer.partition(b"\r\n")
    assert first == b"HTTP/1.1 408 Request Timeout"
    assert b"did not arrive in 0.1 s" in rest


@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_that_is_too_large_is_a_413_before_it_is_read(path: str, upstream: Upstream) -> None:
    async with running(upstream, server={"max_body_bytes": 1000}) as gateway:
        declared = await gateway.ask(path, ask(path, "x" * 1000))
        assert declared.status == 413
        assert "1,000 bytes" in error_of(path, declared)["message"]

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        url, headers = gateway.root + path, {"content-type": "application/json"}
        async with gateway.session.post(url, data=pieces(), headers=headers) as answer:  # no length is declared
            assert answer.status == 413
        exact = json.dumps(ask(path)).encode().ljust(1000)
        assert (await gateway.ask(path, exact)).status == 200
        assert len(upstream.asked) == 1


@pytest.mark.parametrize("path", ROUTES)
async def test_a_body_that_is_not_called_json_is_a_415(path: str, gateway: Running) -> None:
    body = json.dumps(ask(path)).encode()
    for headers in ({"content_type": "text/plain"}, {"content_encoding": "gzip"}):
        answer = await gateway.ask(path, body, **headers)
        assert answer.status == 415
        error_of(path, answer)
    assert (await gateway.ask(path, body, content_type="application/JSON; charset=utf-8")).status == 200


@pytest.mark.parametrize("path", ROUTES)
async def test_errors_of_the_targets_own_are_passed_on(path: str, gateway: Running, upstream: Upstream) -> None:
    told = b'{"error": {"message": "No such model.", "type": "x"}}'
    for status in (400, 404, 413, 422, 429, 500, 503, 529):
        upstream.says(Reply((told,), status if status != 529 else 503, headers={"Retry-After": "60"}))
        answer = await gateway.ask(path, ask(path))
        assert answer.status == (status if status != 529 else 503)
        assert (answer.body, answer.headers["retry-after"]) == (told, "60")
        assert len(upstream.asked) == 1  # who called has retries of its own (F033)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("status", "becomes"),
    [(302, 502), (307, 502), (404, 502), (429, 429), (500, 502), (502, 502), (503, 502), (504, 504)],
)
async def test_a_page_of_a_proxys_becomes_an_error_of_the_apis(
    path: str, status: int, becomes: int, gateway: Running, upstream: Upstream
) -> None:
    headers = {"Retry-After": "30", "Location": "http://127.0.0.1:1/"}
    upstream.says(Reply((b"<html>Bad gateway</html>",), status, "text/html", headers))
    answer = await gateway.ask(path, ask(path))
    assert answer.status == becomes
    assert "html" not in error_of(path, answer)["message"]
    assert len(upstream.asked) == 1
    if becomes == 429:
        assert answer.headers["retry-after"] == "30"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "reply",
    [
        Reply((b"<html>Welcome</html>",), kind="text/html"),
        Reply((b'{"choices": [',)),
        Reply((b"",)),
        Reply((b"complete nonsense\r\n\r\n",), raw=True),
        Reply((b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\nContent-Type: application/json\r\n\r\n{", 0.05), raw=True),
        Reply((b"",), raw=True),
    ],
    ids=["a page", "half of a JSON", "nothing", "no HTTP", "half of an answer", "no answer"],
)
async def test_garbage_is_a_502(path: str, reply: Reply, gateway: Running, upstream: Upstream) -> None:
    upstream.says(reply)
    answer = await gateway.ask(path, ask(path))
    assert answer.status == 502
    error_of(path, answer)
    assert gateway.record(answer).note in ("BadAnswer", "Upstream")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("status", [401, 403])
async def test_our_key_that_the_target_refuses_is_a_502(
    path: str, status: int, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGET_KEY", "the-gateways-key")
    upstream.says(whole({"error": {"message": "the-gateways-key is wrong"}}, status))
    async with running(upstream, target={"api_key_env": "TARGET_KEY"}) as gateway:
        answer = await gateway.ask(path, ask(path), authorization="Bearer mine")
        assert answer.status == 502
        assert "the-gateways-key" not in json.dumps(error_of(path, answer))
        assert upstream.last.headers["authorization"] == "Bearer the-gateways-key"
        assert upstream.last.headers["x-api-key"] == "the-gateways-key"


async def test_the_callers_key_is_passed_on_where_the_operator_says_so(upstream: Upstream) -> None:
    told = {"error": {"message": "Your key is wrong."}}
    async with running(upstream, target={"pass_key": True}) as gateway:
        await gateway.ask(MESSAGES, ask(MESSAGES), x_api_key="mine")
        assert upstream.last.headers["x-api-key"] == "mine"
        upstream.says(whole(told, 401))
        answer = await gateway.ask(CHAT, ask(CHAT), authorization="Bearer mine")
        assert (answer.status, answer.json) == (401, told)
        assert upstream.last.headers["authorization"] == "Bearer mine"


# Waiting


@pytest.mark.parametrize("path", ROUTES)
async def test_a_target_that_is_not_there_is_a_502(path: str, upstream: Upstream) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        async with running(upstream, target={"url": f"http://127.0.0.1:{free.getsockname()[1]}/v1"}) as gateway:
            answer = await gateway.ask(path, ask(path))
            assert answer.status == 502
            assert "could not be reached" in error_of(path, answer)["message"]
            assert gateway.record(answer).note == "Upstream"


async def test_a_target_that_takes_no_connection_is_a_504(upstream: Upstream) -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for one in (first, second):  # its queue is full: the next one waits
            one.setblocking(False)
            one.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        async with running(upstream, target={"url": url, "connect_seconds": 0.2}) as gateway:
            answer = await gateway.ask(MESSAGES, ask(MESSAGES))
            assert answer.status == 504
            assert "in 0.2 s" in error_of(MESSAGES, answer)["message"]


@pytest.mark.parametrize("path", ROUTES)
async def test_a_target_that_says_nothing_is_a_504(path: str, upstream: Upstream) -> None:
    upstream.says(Reply((60.0,)), Reply((b"HTTP/1.1 200 OK\r\n", 60.0), raw=True))
    async with running(upstream, target={"first_byte_seconds": 0.15}) as gateway:
        for _ in range(2):
            answer = await gateway.ask(path, ask(path))
            assert answer.status == 504
            assert "0.15 s" in error_of(path, answer)["message"]
        assert gateway.record(answer).note == "Timeout"


async def test_one_deadline_covers_guard_and_target(upstream: Upstream) -> None:
    upstream.says(Reply((60.0,)))
    async with running(upstream, target={"total_seconds": 0.4}) as gateway:
        gateway.rewriter.slow_seconds = 0.25
        answer = await gateway.ask(CHAT, ask(CHAT, "slow"))
        assert answer.status == 504
        assert "0.4 s" in error_of(CHAT, answer)["message"]
        record = gateway.record(answer)
        assert record.total_ms is not None
        assert record.total_ms > 390


@pytest.mark.parametrize(("failure", "action"), [("closed", "rewrote"), ("open", "flagged"), ("refuse", "refused")])
async def test_a_guard_that_takes_too_long_is_treated_by_the_policy(
    failure: str, action: str, upstream: Upstream
) -> None:
    async with running(upstream, guard={"seconds": 0.1}, policy={"timeout": failure}) as gateway:
        gateway.rewriter.slow_seconds = 30.0
        answer = await gateway.ask(CHAT, ask(CHAT, "slow"))
        assert (answer.status, answer.headers["x-vlmguard-action"]) == (200, action)
        sent = [asked.json["messages"][0]["content"] for asked in upstream.asked]
        if failure == "closed":
            assert sent[0].startswith("Someone sent the request quoted below")
        else:
            assert sent == (["slow"] if failure == "open" else [])
        note = gateway.record(answer).note
        assert note is not None
        assert "Timeout" in note


async def test_a_rewriter_that_fails_again_and_again_is_left_alone_for_a_while(upstream: Upstream) -> None:
    async with running(
        upstream, guard={"seconds": 0.1}, breaker={"failures": 2, "seconds": 0.5}, policy={"failure": "refuse"}
    ) as gateway:
        gateway.rewriter.slow_seconds = 30.0
        for _ in range(2):
            await gateway.ask(CHAT, ask(CHAT, "slow"))
        assert _state(gateway) == "open"
        judged = len(gateway.rewriter.judged)
        answer = await gateway.ask(CHAT, ask(CHAT))
        assert answer.headers["x-vlmguard-action"] == "refused"
        assert len(gateway.rewriter.judged) == judged
        assert b"vlmguard_breaker_open 1.0" in (await gateway.ask("/metrics", None, "GET")).body
        await until(lambda: _state(gateway) == "half-open")
        answer = await gateway.ask(CHAT, ask(CHAT))
        assert answer.headers["x-vlmguard-action"] == "passed"
        assert _state(gateway) == "closed"


def _state(gateway: Running) -> str:
    return gateway.gateway.rewriter.breaker.state


async def test_who_comes_to_a_full_gateway_is_told_at_once(upstream: Upstream) -> None:
    upstream.says(Reply((60.0,)))
    admission = {"concurrent": 1, "waiting": 1, "wait_seconds": 1.0}
    async with running(upstream, admission=admission) as gateway:
        working = asyncio.create_task(gateway.ask(CHAT, ask(CHAT)))
        await until(lambda: gateway.gateway.admission.running == 1)
        waiting = asyncio.create_task(gateway.ask(MESSAGES, ask(MESSAGES)))
        await until(lambda: gateway.gateway.admission.waiting == 1)
        full = await gateway.ask(CHAT, ask(CHAT))
        assert not waiting.done()
        late = await waiting
        for path, answer in ((CHAT, full), (MESSAGES, late)):
            assert answer.status == 429
            assert error_of(path, answer)["type"] == "rate_limit_error"
            assert int(answer.headers["retry-after"]) >= 1
            assert gateway.record(answer).note == "RateLimited"
        assert len(upstream.asked) == 1
        working.cancel()


async def test_without_its_audit_log_the_gateway_answers_nothing(upstream: Upstream, tmp_path: Path) -> None:
    async with running(upstream) as gateway:
        assert (await gateway.ask(CHAT, ask(CHAT))).status == 200
        kept = tmp_path / "kept"
        gateway.log.rename(kept)
        upstream.says(whole(completion("What nobody may see.")))
        for path in ROUTES:
            answer = await gateway.ask(path, ask(path))
            assert answer.status == 503
            assert "nobody" not in error_of(path, answer)["message"]
        upstream.says()
        for path in ROUTES:
            streamed = await gateway.ask(path, ask(path, stream=True))
            assert streamed.status == 503
            error_of(path, streamed)
        assert upstream.asked == []  # after the first nobody is asked any more
        assert (await gateway.ask("/health/ready", None, "GET")).status == 503
        kept.rename(gateway.log)
        await until(lambda: gateway.gateway.audit_log is not None and gateway.gateway.audit_log.healthy)
        assert (await gateway.ask(CHAT, ask(CHAT))).status == 200


async def test_a_stream_whose_beginning_cannot_be_recorded_does_not_begin(upstream: Upstream, tmp_path: Path) -> None:
    async with running(upstream) as gateway:
        gateway.log.rename(tmp_path / "kept")
        answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
        assert answer.status == 503
        assert b"Hello" not in answer.body
        (tmp_path / "kept").rename(gateway.log)


async def test_a_fault_of_ours_is_a_500_that_tells_nothing(
    gateway: Running, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(chat: object) -> None:
        raise ZeroDivisionError("with a user's words in it")

    monkeypatch.setattr(gateway.rewriter, "judge", broken)
    for path in ROUTES:
        answer = await gateway.ask(path, ask(path))
        assert answer.status == 500
        message = error_of(path, answer)["message"]
        assert answer.headers["x-request-id"] in message
        assert "words" not in message
    assert upstream.asked == []
