"""Faults that users of neighbouring projects have reported, looked for in a gateway that serves, by their numbers.

Those of remote pictures are in tests/gateway/test_fetch.py, those of the records in tests/gateway/test_audit_log.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.audit_logs import raw
from tests.gateway.running import (
    CHAT,
    DONE,
    MESSAGES,
    RESPONSES,
    ROUTES,
    Reply,
    Running,
    Upstream,
    ask,
    chunk,
    completion,
    picture,
    running,
    stream,
    usage_chunk,
    whole,
)
from tests.gateway.test_streams import GUARD, events_in
from vlmguard.chat import Chat
from vlmguard.guards.policy import REFUSAL

pytestmark = pytest.mark.asyncio(loop_scope="module")


def turn(path: str, *parts: Any, role: str = "user") -> dict[str, Any]:
    """A request of one turn with these parts, spelled as chat completions does."""
    spelled = [_part(path, part) for part in parts]
    message = {"role": role, "content": spelled}
    limit = {"max_tokens": 9} if path == MESSAGES else {}
    return {"model": "m", **limit, ("input" if path == RESPONSES else "messages"): [message]}


def _part(path: str, part: Any) -> Any:
    if part["type"] == "text":
        return {**part, "type": "input_text"} if path == RESPONSES else part
    url = part["image_url"]["url"]
    if path == CHAT:
        return part
    if path == RESPONSES:
        return {"type": "input_image", "image_url": url, "detail": "auto"}
    head, _, data = url.partition(";base64,")
    source = {"type": "base64", "media_type": head[5:], "data": data} if data else {"type": "url", "url": url}
    return {"type": "image", "source": source}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def judged(gateway: Running) -> Chat:
    """What the rewriter saw of the only request."""
    (chat,) = gateway.rewriter.judged
    return chat


# The guard sees the wrong thing


@pytest.mark.parametrize("path", ROUTES)
async def test_f001_f002_f007_f012_a_picture_is_judged_with_and_without_text(
    path: str, gateway: Running, upstream: Upstream, png: bytes
) -> None:
    for parts in ((text("What is this?"), image(picture(png))), (image(picture(png)),)):
        gateway.rewriter.judged.clear()
        body = turn(path, *parts)
        answer = await gateway.ask(path, body)
        assert answer.status == 200
        assert [one.url for one in judged(gateway).images] == [picture(png)]
        assert upstream.last.json == body
        assert len(gateway.record(answer).images) == 1


@pytest.mark.parametrize("path", ROUTES)
async def test_f004_f006_parts_are_read_as_their_words(path: str, gateway: Running, png: bytes) -> None:
    await gateway.ask(path, turn(path, text("first words"), image(picture(png)), text("second words")))
    assert judged(gateway).text == "first words\nsecond words"


async def test_f004_a_second_turn_of_parts_is_read_too(gateway: Running) -> None:
    turns = [{"role": role, "content": [text(f"by the {role}")]} for role in ("user", "assistant", "user")]
    assert (await gateway.ask(CHAT, {"messages": turns})).status == 200
    assert [one.full_text for one in judged(gateway).messages] == ["by the user", "by the assistant", "by the user"]


@pytest.mark.parametrize("path", ROUTES)
async def test_f005_f057_a_large_picture_is_no_text_and_arrives_whole(
    path: str, gateway: Running, upstream: Upstream
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(bytes(300_000)).decode()}"
    body = json.dumps(turn(path, text("What is this?"), image(url))).encode()
    await gateway.ask(path, body)
    assert judged(gateway).text == "What is this?"
    assert upstream.last.body == body


@pytest.mark.parametrize("rival", ["content_blocks", "parts", "images", "text"])
async def test_f008_content_beside_content_is_refused(rival: str, gateway: Running, upstream: Upstream) -> None:
    for path, name in ((CHAT, "messages"), (MESSAGES, "messages"), (RESPONSES, "input")):
        message = {"role": "user", "content": "What is the tide table?", rival: [text("hostile")]}
        answer = await gateway.ask(path, {"model": "m", "max_tokens": 9, name: [message]})
        assert answer.status == 400
        assert rival in answer.body.decode()
    assert upstream.asked == []


@pytest.mark.parametrize("path", ROUTES)
async def test_f008_a_key_twice_is_refused(path: str, gateway: Running, upstream: Upstream) -> None:
    name = "input" if path == RESPONSES else "messages"
    body = f'{{"model":"m","max_tokens":9,"{name}":[{{"role":"user","content":"a","content":"hostile"}}]}}'
    assert (await gateway.ask(path, body.encode())).status == 400
    assert upstream.asked == []


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/v1/completions",
            "/v1/images/generations",
            "/v1/rerank",
            "/v1/embeddings",
            "/v1/audio/speech",
            "/completions",
        ),
        *(
            "/v1/chat/completions/",
            "/v1//chat/completions",
            "/v1/Chat/Completions",
            "/V1/chat/completions",
            "/api/chat",
        ),
    ],
)
async def test_f009_no_route_is_unguarded(path: str, gateway: Running, upstream: Upstream) -> None:
    answer = await gateway.ask(path, {"prompt": "risky", **ask(CHAT, "risky")})
    assert answer.status == 404
    assert answer.json["error"]["type"] == "not_found_error"
    assert upstream.asked == []


async def test_f010_the_input_of_responses_is_judged(gateway: Running, upstream: Upstream) -> None:
    for given in ("risky", [{"role": "user", "content": "risky"}]):
        answer = await gateway.ask(RESPONSES, {"model": "m", "input": given})
        assert answer.headers["x-vlmguard-action"] == "rewrote"
        assert "Safely: risky" in upstream.last.body.decode()


async def test_f010_what_the_gateway_never_saw_is_refused(gateway: Running, upstream: Upstream) -> None:
    for stored in ({"previous_response_id": "resp_1"}, {"conversation": "c"}, {"prompt": {"id": "p"}}):
        assert (await gateway.ask(RESPONSES, {"model": "m", "input": "Hi.", **stored})).status == 400
    assert upstream.asked == []


async def test_f011_a_picture_in_a_tools_message_is_judged_and_arrives(
    gateway: Running, upstream: Upstream, png: bytes
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": [image(picture(png))]},
    ]
    answer = await gateway.ask(CHAT, {"messages": turns})
    assert len(judged(gateway).images) == 1
    assert upstream.last.json == {"messages": turns}
    assert len(gateway.record(answer).images) == 1


@pytest.mark.parametrize("path", ROUTES)
async def test_f014_an_earlier_turn_is_judged_too(path: str, gateway: Running) -> None:
    turns = [
        {"role": "user", "content": "the hostile wish"},
        {"role": "assistant", "content": "I see."},
        {"role": "user", "content": "continue"},
    ]
    name = "input" if path == RESPONSES else "messages"
    await gateway.ask(path, {"model": "m", "max_tokens": 9, name: turns})
    assert "the hostile wish" in [one.full_text for one in judged(gateway).messages]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "words", ["data:image/png;base64,aGVsbG8=", "/etc/hostname", "file:///etc/passwd", "https://x.invalid/a.png"]
)
async def test_f015_f016_a_text_is_only_ever_text(path: str, words: str, gateway: Running, upstream: Upstream) -> None:
    answer = await gateway.ask(path, ask(path, words))
    assert answer.status == 200
    assert judged(gateway).text == words
    assert judged(gateway).images == ()
    assert upstream.last.json == ask(path, words)


# Streaming, errors, policy


@pytest.mark.parametrize("path", ROUTES)
async def test_f018_a_stream_is_guarded_as_anything_else(path: str, gateway: Running, upstream: Upstream) -> None:
    answer = await gateway.ask(path, ask(path, "risky", stream=True))
    assert "Safely: risky" in upstream.last.body.decode()
    assert upstream.last.json["stream"] is True
    assert gateway.record(answer).action == "rewrote"
    async with running(upstream, policy={"mode": "block"}) as blocking:
        upstream.says()
        answer = await blocking.ask(path, ask(path, "risky", stream=True))
        assert REFUSAL in answer.body.decode()
        assert upstream.asked == []


async def test_f019_f020_an_answers_guard_sees_a_stream_before_its_first_byte_is_sent(
    upstream: Upstream, tmp_path: Path
) -> None:
    (tmp_path / "guard.py").write_text(GUARD)
    upstream.says(whole(completion("The secret is 42.")))
    guard = {"name": f"{tmp_path / 'guard.py'}:Moderator"}
    async with running(upstream, guard=guard, target={"model": "m"}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
        assert upstream.last.json["stream"] is False
        assert answer.headers["x-vlmguard-stream"] == "held"
        assert b"secret" not in answer.body
        assert b"Taken back." in answer.body
        assert gateway.record(answer).action == "refused"


@pytest.mark.parametrize("last", [b"", chunk(None, "stop"), chunk("lo.").rstrip(b"\n") + b"\n"])
async def test_f022_done_is_supplied_where_it_lacks(last: bytes, gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(chunk("Hel"), *([last] if last else [])))
    answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
    assert answer.body == chunk("Hel") + last + (b"\n" if last[-2:] not in (b"", b"\n\n") else b"") + DONE


async def test_f022_a_model_that_writes_of_done_is_not_done(gateway: Running, upstream: Upstream) -> None:
    upstream.says(stream(chunk("A stream ends with data: [DONE]")))
    answer = await gateway.ask(CHAT, ask(CHAT, stream=True))
    assert answer.body.endswith(b"\n\n" + DONE)


async def test_f023_the_usage_comes_after_the_last_word_and_before_the_end(
    gateway: Running, upstream: Upstream
) -> None:
    body = ask(CHAT, stream=True, stream_options={"include_usage": True})
    answer = await gateway.ask(CHAT, body)
    assert answer.body.endswith(chunk(None, "stop") + usage_chunk() + DONE)
    async with running("scripted:Hello.") as own:
        *_, last, usage = events_in((await own.ask(CHAT, body)).body)
        assert last["choices"][0]["finish_reason"] == "stop"
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("words", ["unreadable", "locked", "slow"])
async def test_f025_by_default_a_guard_that_fails_stays_closed(words: str, upstream: Upstream) -> None:
    async with running(upstream, guard={"seconds": 0.05}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, words))
        assert answer.headers["x-vlmguard-action"] == "rewrote"
        assert upstream.last.json["messages"][0]["content"].startswith("Someone sent the request quoted below")


@pytest.mark.parametrize("mode", ["rewrite", "shadow", "block"])
async def test_f026_a_refused_key_never_opens_the_guard(mode: str, upstream: Upstream) -> None:
    async with running(upstream, policy={"mode": mode, "failure": "open"}, breaker={"failures": 1}) as gateway:
        for _ in range(3):
            answer = await gateway.ask(CHAT, ask(CHAT, "locked"))
            assert answer.headers["x-vlmguard-action"] in ("rewrote", "refused")
        assert all(asked.json != ask(CHAT, "locked") for asked in upstream.asked)


class Wrapped(TimeoutError):
    """As a library's own class of it."""


@pytest.mark.parametrize("error", [TimeoutError("late"), Wrapped("late"), TimeoutError()])
async def test_f027_every_class_of_timeout_is_one(
    error: Exception, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(chat: Chat) -> None:
        raise error

    async with running(upstream, policy={"timeout": "refuse"}) as gateway:
        monkeypatch.setattr(gateway.rewriter, "judge", late)
        answer = await gateway.ask(CHAT, ask(CHAT))
        assert answer.headers["x-vlmguard-action"] == "refused"
        assert gateway.record(answer).note == "Timeout"


async def test_f028_an_operator_can_let_a_failing_guard_open(upstream: Upstream) -> None:
    async with running(upstream, policy={"unreadable": "open"}) as gateway:
        body = json.dumps(ask(CHAT, "unreadable")).encode()
        answer = await gateway.ask(CHAT, body)
        assert answer.headers["x-vlmguard-action"] == "flagged"
        assert upstream.last.body == body


@pytest.mark.parametrize("path", ROUTES)
async def test_f029_a_tool_without_a_function_is_no_fault(path: str, gateway: Running, upstream: Upstream) -> None:
    for tools in ([{"type": "code_interpreter"}], [], None, [{"type": "web_search", "name": "s"}]):
        for words in ("What is the tide table?", "risky"):
            answer = await gateway.ask(path, ask(path, words, tools=tools))
            assert answer.status == 200
            assert upstream.last.json["tools"] == tools


async def test_f030_no_answer_is_kept_for_another(upstream: Upstream) -> None:
    keys = [{"id": mode, "sha256": sha256(mode.encode()).hexdigest(), "mode": mode} for mode in ("off", "block")]
    async with running(upstream, keys=keys) as gateway:
        primed = await gateway.ask(CHAT, ask(CHAT, "risky"), x_api_key="off")
        assert primed.headers["x-vlmguard-action"] == "passed"
        read = await gateway.ask(CHAT, ask(CHAT, "risky"), x_api_key="block")
        assert read.json["choices"][0]["message"]["content"] == REFUSAL


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
async def test_f031_a_rewrite_keeps_cache_control(path: str, gateway: Running, upstream: Upstream) -> None:
    mark = {"cache_control": {"type": "ephemeral"}}
    body = turn(path, {**text("A long document."), **mark}, {**text("risky"), **mark})
    body["messages"].insert(0, {"role": "user", "content": [{**text("Earlier."), **mark}]})
    body["messages"].insert(1, {"role": "assistant", "content": [{**text("Yes."), **mark}]})
    await gateway.ask(path, body)
    sent = upstream.last.json["messages"]
    assert sent[:2] == body["messages"][:2]
    assert sent[2]["content"] == [{**text("Safely: A long document.\nrisky"), **mark}]


@pytest.mark.parametrize("after", ["60", "259200", "Fri, 31 Dec 2100 23:59:59 GMT"])
@pytest.mark.parametrize("path", ROUTES)
async def test_f032_f033_f034_the_target_is_asked_once_and_retry_after_is_passed_on(
    after: str, path: str, gateway: Running, upstream: Upstream
) -> None:
    told = {"error": {"message": "Slow down."}}
    upstream.says(whole(told, 429, retry_after=after))
    answer = await gateway.ask(path, ask(path))
    assert (answer.status, answer.headers["retry-after"], answer.json) == (429, after, told)
    upstream.says(*(whole(told, status) for status in (500, 503)), Reply((b"",), raw=True))
    assert [(await gateway.ask(path, ask(path))).status for _ in range(3)] == [500, 503, 502]
    assert len(upstream.asked) == 3


# Null and shape


@pytest.mark.parametrize("content", [None, [], "", [text("")]])
async def test_f036_f037_f038_an_empty_content_is_passed_on_in_its_place(
    content: Any, gateway: Running, upstream: Upstream
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    for words in ("Go on.", "risky"):
        turns = [
            {"role": "user", "content": "Look."},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": content},
            {"role": "user", "content": words},
        ]
        answer = await gateway.ask(CHAT, {"messages": turns})
        assert answer.status == 200
        assert upstream.last.json["messages"][:3] == turns[:3]
        assert len(upstream.last.json["messages"]) == 4


async def test_f040_an_answer_without_a_message_is_no_fault_of_ours(
    gateway: Running, upstream: Upstream, tmp_path: Path
) -> None:
    told = {"id": "1", "choices": [{"index": 0, "message": None, "finish_reason": "stop"}]}
    upstream.says(whole(told))
    answer = await gateway.ask(CHAT, ask(CHAT))
    assert (answer.status, answer.json) == (200, told)  # it is the target's, as without us
    (tmp_path / "guard.py").write_text(GUARD)
    guard = {"name": f"{tmp_path / 'guard.py'}:Moderator"}
    async with running(upstream, guard=guard, target={"model": "m"}) as holding:
        for streamed in (True, False):
            answer = await holding.ask(CHAT, ask(CHAT, stream=streamed))
            assert answer.status == 502
            assert holding.record(answer).note == "BadAnswer"


@pytest.mark.parametrize("path", ROUTES)
async def test_f041_a_guarded_request_gets_no_system_message(path: str, gateway: Running, upstream: Upstream) -> None:
    await gateway.ask(path, ask(path, "risky"))
    assert upstream.last.json == ask(path, "Safely: risky")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("words", ["What does <image> mean?", "<|im_start|>system", "<|image_pad|>", "[INST] <s>"])
async def test_f042_special_tokens_that_a_user_types_are_text(
    path: str, words: str, gateway: Running, upstream: Upstream
) -> None:
    await gateway.ask(path, ask(path, words))
    assert judged(gateway).images == ()
    assert upstream.last.json == ask(path, words)


# Network and privacy

ADDRESSES = [
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1:1/a.png",
    "https://example.com/a.png",
    "file:///etc/passwd",
    "/etc/passwd",
    "ftp://example.com/a.png",
    "//example.com/a.png",
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("url", ADDRESSES)
async def test_f060_f063_f064_f065_no_route_fetches_or_opens_what_is_not_allowed(
    path: str, url: str, gateway: Running, upstream: Upstream
) -> None:
    answer = await gateway.ask(path, turn(path, text("What is this?"), image(url)))
    assert answer.status == 400
    assert "root:" not in answer.body.decode()
    assert gateway.record(answer).note == "ImageNotAllowed"
    assert upstream.asked == []


async def test_f060_not_even_the_target_gets_the_address(upstream: Upstream) -> None:
    """With the guard off, too: a target that fetches would do it in our name."""
    async with running(upstream, policy={"mode": "off"}) as gateway:
        answer = await gateway.ask(CHAT, turn(CHAT, image("http://169.254.169.254/")))
        assert answer.status == 400
        assert upstream.asked == []


@pytest.mark.parametrize("path", ROUTES)
async def test_f061_f064_an_allowed_hosts_private_address_is_refused_on_every_route(
    path: str, upstream: Upstream
) -> None:
    async with running(upstream, images={"hosts": ["localhost"], "ports": [80, upstream.port]}) as gateway:
        url = f"http://localhost:{upstream.port}/a.png"
        answer = await gateway.ask(path, turn(path, image(url)))
        assert answer.status == 400
        assert upstream.asked == []


async def test_f066_f067_f068_a_failed_request_leaves_no_picture_behind(upstream: Upstream) -> None:
    noise = sha256(b"picture").digest() * 10_000
    data = base64.b64encode(noise).decode()
    replies: Mapping[int, Reply] = {500: whole({"error": {"message": data[:500]}}, 500), 502: Reply((b"",), raw=True)}
    async with running(upstream, audit_log={"texts": True}) as gateway:
        for status, reply in replies.items():
            upstream.says(reply)
            answer = await gateway.ask(CHAT, turn(CHAT, text("What is this?"), image(f"data:image/png;base64,{data}")))
            assert answer.status == status
            (found,) = gateway.record(answer).images
            assert (found.sha256, found.bytes) == (sha256(noise).hexdigest(), len(noise))
        kept = raw(gateway.log)
        assert b"What is this?" in kept  # texts are recorded here, pictures never
        assert data[:40].encode() not in kept
        assert noise[:16] not in kept
