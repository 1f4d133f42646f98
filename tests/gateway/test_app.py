"""What the gateway does with a request, over real connections: bytes, policy, routes."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.running import (
    CHAT,
    KEY,
    MESSAGES,
    PATIENCE_SECONDS,
    RESPONSES,
    ROUTES,
    Reply,
    Running,
    Upstream,
    ask,
    completion,
    error_of,
    key,
    picture,
    running,
    whole,
)
from tests.gateway.test_streams import GUARD
from vlmguard.guards.policy import REFUSAL

pytestmark = pytest.mark.asyncio(loop_scope="module")

# Bytes

ODD = {
    CHAT: '{"messages" : [ {"content":"Gr\\u00fc\\u00dfe, 世界","role":"user", "x":null} ],\n\t"seed":7, "n":1,"zz":{"b":1,"a":[1.50,1e3]},"model":"m" , "logprobs":true}',  # noqa: E501
    RESPONSES: '{"input" : [ {"role":"user","content":[{"text":"Gr\\u00fc\\u00dfe, 世界","type":"input_text"}]} ],\n "store":false,"model":"m", "zz":{"b":1,"a":[1.50]}}',  # noqa: E501
    MESSAGES: '{"max_tokens":5,"messages" : [ {"content":[{"text":"Gr\\u00fc\\u00dfe, 世界","type":"text"}],"role":"user"} ],\n"model":"m" , "system":"","zz":{"b":1.0}}',  # noqa: E501
}


@pytest.mark.parametrize("path", ROUTES)
async def test_a_harmless_request_arrives_byte_for_byte(path: str, gateway: Running, upstream: Upstream) -> None:
    body = ODD[path].encode()
    answer = await gateway.ask(path, body)
    assert answer.status == 200
    assert upstream.last.body == body
    assert upstream.last.path == path
    assert upstream.last.headers["content-length"] == str(len(body))
    assert upstream.last.headers["content-type"] == "application/json"


async def test_an_answer_comes_back_byte_for_byte(gateway: Running, upstream: Upstream) -> None:
    odd = b'{"choices" :[ ],"x": "\\u00e9 \xc3\xa9",\n "usage":null}'
    upstream.says(
        Reply((odd[:7], 0.01, odd[7:]), headers={"X-Ratelimit-Remaining": "9", "Set-Cookie": "a=b", "X-Own": "1"})
    )
    answer = await gateway.ask(CHAT, ask(CHAT))
    assert answer.body == odd
    assert answer.headers["x-ratelimit-remaining"] == "9"
    assert not {"set-cookie", "x-own"} & answer.headers.keys()


@pytest.mark.parametrize(
    ("usage", "counts"),
    [
        ({"prompt_tokens": 7, "completion_tokens": 3}, (7, 3)),
        ({"input_tokens": 7, "output_tokens": 3}, (7, 3)),
        ({"prompt_tokens": "many"}, (None, None)),
        ("free", (None, None)),
    ],
)
async def test_the_record_has_what_the_answer_cost(
    usage: object, counts: tuple[int | None, int | None], gateway: Running, upstream: Upstream
) -> None:
    upstream.says(whole({**completion(), "usage": usage}))
    record = gateway.record(await gateway.ask(CHAT, ask(CHAT)))
    assert (record.prompt_tokens, record.completion_tokens) == counts


async def test_only_the_models_name_is_replaced_where_the_operator_names_one(upstream: Upstream) -> None:
    async with running(upstream, target={"model": "other"}) as gateway:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hi."}], "zz": [1, None]}
        await gateway.ask(CHAT, body)
        assert upstream.last.json == {**body, "model": "other"}
        same = b'{"model":  "other","messages":[{"role":"user","content":"Hi."}]}'
        await gateway.ask(CHAT, same)
        assert upstream.last.body == same


async def test_a_rewrite_changes_the_text_and_nothing_else(gateway: Running, upstream: Upstream, png: bytes) -> None:
    image = {"type": "image_url", "image_url": {"url": picture(png), "detail": "low"}, "cache_control": {"type": "e"}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "user", "content": [image, {"type": "text", "text": "First."}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "{}"},
        {"role": "user", "content": [{"type": "text", "text": "risky", "cache_control": {"type": "ephemeral"}}, image]},
    ]
    body = {"temperature": 0.3, "messages": messages, "model": "m", "tools": [{"type": "code_interpreter"}], "n": 2}
    answer = await gateway.ask(CHAT, body)
    assert answer.headers["x-vlmguard-action"] == "rewrote"
    messages[-1]["content"][0]["text"] = "Safely: risky"
    assert upstream.last.json == body
    assert list(upstream.last.json) == list(body)


async def test_a_rewrite_of_anthropics_messages(gateway: Running, upstream: Upstream, png: bytes) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(png).decode()}
    image = {"type": "image", "source": source, "cache_control": {"type": "ephemeral"}}
    content: list[dict[str, Any]] = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "Found."}, image]},
        image,
        {"type": "text", "text": "risky", "cache_control": {"type": "ephemeral"}},
    ]
    body = {
        "model": "m",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "messages": [
            {"role": "user", "content": "First."},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
            {"role": "user", "content": content},
        ],
        "stop_sequences": ["x"],
    }
    answer = await gateway.ask(MESSAGES, body, anthropic_version="2023-06-01", anthropic_beta="b")
    assert answer.headers["x-vlmguard-action"] == "rewrote"
    content[-1]["text"] = "Safely: risky"
    assert upstream.last.json == body
    assert upstream.last.headers["anthropic-version"] == "2023-06-01"
    assert upstream.last.headers["anthropic-beta"] == "b"


async def test_a_rewrite_of_responses(gateway: Running, upstream: Upstream, png: bytes) -> None:
    content = [
        {"type": "input_image", "image_url": picture(png), "detail": "low"},
        {"type": "input_text", "text": "risky"},
    ]
    items: list[dict[str, Any]] = [
        {"role": "user", "content": "First."},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "Found."},
        {"type": "message", "role": "user", "content": content},
    ]
    body = {"model": "m", "instructions": "Be brief.", "input": items, "tools": [], "metadata": {"a": "b"}}
    answer = await gateway.ask(RESPONSES, body)
    assert answer.headers["x-vlmguard-action"] == "rewrote"
    content[-1]["text"] = "Safely: risky"
    assert upstream.last.json == body
    await gateway.ask(RESPONSES, {"model": "m", "input": "risky"})
    assert upstream.last.json == {"model": "m", "input": "Safely: risky"}


async def test_what_goes_on_of_the_callers_headers(gateway: Running, upstream: Upstream) -> None:
    await gateway.ask(
        CHAT,
        ask(CHAT),
        authorization="Bearer secret",
        x_api_key="secret",
        cookie="secret=1",
        x_forwarded_for="10.0.0.1",
    )
    assert "secret" not in str(upstream.last.headers)
    assert "x-forwarded-for" not in upstream.last.headers
    context = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate": "a=b"}
    await gateway.ask(CHAT, ask(CHAT), user_agent="app/1", **context)
    assert upstream.last.headers.items() >= {"user-agent": "app/1", **context}.items()


# Policy


@pytest.mark.parametrize("path", ROUTES)
async def test_a_blocked_request_gets_a_refusal_in_the_apis_shape(path: str, upstream: Upstream) -> None:
    async with running(upstream, policy={"mode": "block"}) as gateway:
        answer = await gateway.ask(path, ask(path, "risky"))
        assert answer.status == 200
        assert answer.headers["x-vlmguard-action"] == "refused"
        told = answer.json
        said = {
            CHAT: lambda: told["choices"][0]["message"]["content"],
            RESPONSES: lambda: told["output"][0]["content"][0]["text"],
            MESSAGES: lambda: told["content"][0]["text"],
        }[path]()
        assert said == REFUSAL
        assert upstream.asked == []
        record = gateway.record(answer)
        assert (record.action, record.category, record.status) == ("refused", "fraud", 200)


async def test_shadow_changes_nothing_and_records(upstream: Upstream) -> None:
    async with running(upstream, policy={"mode": "shadow"}) as gateway:
        body = json.dumps(ask(CHAT, "risky")).encode() + b"  \n"
        answer = await gateway.ask(CHAT, body)
        assert upstream.last.body == body
        assert answer.headers["x-vlmguard-action"] == "flagged"
        record = gateway.record(answer)
        assert (record.action, record.risk, record.category, record.mode) == ("flagged", 0.9, "fraud", "shadow")


async def test_off_asks_no_rewriter(upstream: Upstream) -> None:
    async with running(upstream, policy={"mode": "off"}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, "risky"))
        assert upstream.last.json == ask(CHAT, "risky")
        assert gateway.rewriter.judged == []
        assert (answer.headers["x-vlmguard-action"], answer.headers["x-vlmguard-policy"]) == ("passed", "off")


async def test_the_policy_of_a_route_a_key_and_a_category(upstream: Upstream) -> None:
    other = {"id": "trusted", "sha256": sha256(b"trusted").hexdigest(), "mode": "shadow"}
    policy = {"mode": "rewrite", "routes": {MESSAGES: "block"}}
    async with running(upstream, policy=policy, keys=[*key(), other]) as gateway:

        async def action(path: str, token: str) -> str:
            answer = await gateway.ask(path, ask(path, "risky"), authorization=f"Bearer {token}")
            return str(answer.headers["x-vlmguard-action"])

        assert await action(CHAT, KEY) == "rewrote"
        assert await action(MESSAGES, KEY) == "refused"
        assert await action(MESSAGES, "trusted") == "flagged"
        assert {record.key_id for record in gateway.records()} == {"app", "trusted"}
    async with running(upstream, policy={"mode": "shadow", "categories": {"fraud": "block"}}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, "risky"))
        assert answer.headers["x-vlmguard-action"] == "refused"


async def test_the_headers_of_an_answer_and_how_to_turn_them_off(gateway: Running, upstream: Upstream) -> None:
    told = (await gateway.ask(CHAT, ask(CHAT, "risky"), x_request_id="mine-1")).headers
    assert told["x-request-id"] == "mine-1"
    assert (told["x-vlmguard-action"], told["x-vlmguard-policy"]) == ("rewrote", "rewrite")
    assert float(told["x-vlmguard-risk"]) == 0.9
    assert float(told["x-vlmguard-latency-ms"]) > 0
    async with running(upstream, policy={"response_headers": False}) as quiet:
        told = (await quiet.ask(CHAT, ask(CHAT, "risky"))).headers
        assert told["x-request-id"].startswith("req_")
        assert not [name for name in told if name.startswith("x-vlmguard")]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "<script>"])
async def test_a_request_id_that_is_not_plain_is_replaced(given: str, gateway: Running) -> None:
    told = (await gateway.ask(CHAT, ask(CHAT), x_request_id=given)).headers["x-request-id"]
    assert told.startswith("req_")
    assert len(told) == 28


# Other routes


async def test_the_models_of_a_server_with_what_they_take(gateway: Running, upstream: Upstream) -> None:
    listed = {"object": "list", "data": [{"id": "a", "x": 1}, {"id": "b", "input_modalities": ["audio"]}]}
    upstream.says(whole(listed))
    answer = await gateway.ask("/v1/models", None, "GET")
    assert upstream.last.path == "/v1/models"
    first, second = answer.json["data"]
    assert first == {
        "id": "a",
        "x": 1,
        "input_modalities": ["text", "image"],
        "output_modalities": ["text"],
    }
    assert second["input_modalities"] == ["audio"]
    upstream.says(whole({"error": {"message": "busy"}}, 503))
    assert (await gateway.ask("/v1/models", None, "GET")).status == 503


async def test_the_model_in_this_process() -> None:
    async with running("scripted:Hello.") as gateway:
        (model,) = (await gateway.ask("/v1/models", None, "GET")).json["data"]
        assert model["object"] == "model"
        assert model["input_modalities"] == ["text", "image"]


async def test_a_route_that_the_operator_allows_is_passed_on_unguarded(upstream: Upstream) -> None:
    upstream.says(whole(b"\x00\x01 anything", 201))
    allow = ["/v1/embeddings", "/v1/files", "/tokenize"]
    async with running(upstream, routes={"allow": allow}) as gateway:
        answer = await gateway.ask("/v1/embeddings?a=1&b=%20", b"\xff not JSON", content_type="text/plain")
        assert (answer.status, answer.body) == (201, b"\x00\x01 anything")
        assert (upstream.last.method, upstream.last.path) == ("POST", "/v1/embeddings?a=1&b=%20")
        assert upstream.last.body == b"\xff not JSON"
        assert upstream.last.headers["content-type"] == "text/plain"
        assert gateway.record(answer).action == "unguarded"
        await gateway.ask("/v1/files", None, "DELETE")
        assert (upstream.last.method, upstream.last.path) == ("DELETE", "/v1/files")
        await gateway.ask("/tokenize", {"prompt": "hi"})  # beside the API, as at the target
        assert upstream.last.path == "/tokenize"
        upstream.says(whole(completion()))
        assert (await gateway.ask("/v1/completions", {"prompt": "hi"})).status == 404
        assert (await gateway.ask("/v1/embeddings/x", {})).status == 404
        assert upstream.asked == []
        assert gateway.rewriter.judged == []


async def test_health(gateway: Running) -> None:
    assert (await gateway.ask("/health/live", None, "GET")).json == {"status": "live"}
    assert (await gateway.ask("/health/ready", None, "GET")).json == {"status": "ready"}


async def test_metrics_count_and_can_be_off(upstream: Upstream, png: bytes) -> None:
    part = {"type": "image_url", "image_url": {"url": picture(png)}}
    async with running(upstream, audit_log={"enabled": False}) as gateway:
        await gateway.ask(CHAT, {"messages": [{"role": "user", "content": [part, part]}]})
        await gateway.ask(CHAT, ask(CHAT, "risky"))
        await gateway.ask(CHAT, b"{")
        told = (await gateway.ask("/metrics", None, "GET")).body.decode()
        for action, status in (("passed", "2xx"), ("rewrote", "2xx"), ("error", "4xx")):
            labels = f'action="{action}",route="{CHAT}",status_class="{status}"'
            assert f"vlmguard_requests_total{{{labels}}} 1.0" in told
        assert "vlmguard_images_total 2.0" in told
        assert "vlmguard_in_flight 0.0" in told
    async with running(upstream, telemetry={"metrics": False}) as gateway:
        assert (await gateway.ask("/metrics", None, "GET")).status == 404


async def test_one_connection_serves_many_requests(gateway: Running) -> None:
    body = json.dumps(ask(CHAT)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    async with gateway.connection() as (reader, writer):
        for _ in range(5):
            writer.write(head.encode() + body)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE_SECONDS)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            length = int(answer.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            await reader.readexactly(length)


async def test_many_requests_at_once_keep_apart(gateway: Running, upstream: Upstream) -> None:
    bodies = [ask(CHAT, f"Question {at}.", seed=at) for at in range(100)]
    answers = await asyncio.gather(*(gateway.ask(CHAT, body) for body in bodies))
    assert {answer.status for answer in answers} == {200}
    assert sorted(asked.json["seed"] for asked in upstream.asked) == list(range(100))
    assert len({answer.headers["x-request-id"] for answer in answers}) == 100
    assert (
        len(
            [
                record
                for record in gateway.records()
                if record.request_id in {a.headers["x-request-id"] for a in answers}
            ]
        )
        == 100
    )


# A guard that asks the target itself


async def test_a_holding_guard_asks_in_the_spelling_of_chat_completions(
    upstream: Upstream, png: bytes, tmp_path: Path
) -> None:
    (tmp_path / "guard.py").write_text(GUARD)
    upstream.says(whole(completion("Seen.")))
    data = base64.b64encode(png).decode()
    source = {"type": "base64", "media_type": "image/png", "data": data}
    bodies: Mapping[str, dict[str, Any]] = {
        MESSAGES: {
            "model": "m",
            "max_tokens": 9,
            "system": [{"type": "text", "text": "Be brief."}],
            "messages": [
                {"role": "user", "content": [{"type": "image", "source": source}, {"type": "text", "text": "What?"}]}
            ],
        },
        RESPONSES: {
            "model": "m",
            "max_output_tokens": 9,
            "instructions": "Be brief.",
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": picture(png)},
                        {"type": "input_text", "text": "What?"},
                    ],
                }
            ],
        },
    }
    guard = {"name": f"{tmp_path / 'guard.py'}:Moderator"}
    async with running(upstream, guard=guard, target={"model": "m"}) as gateway:
        for path, body in bodies.items():
            answer = await gateway.ask(path, body)
            assert answer.status == 200
            assert "Seen." in answer.body.decode()
            asked = upstream.last.json
            assert upstream.last.path == CHAT
            assert asked["max_tokens"] == 9
            assert asked["messages"] == [
                {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": picture(png)}},
                        {"type": "text", "text": "What?"},
                    ],
                },
            ]
            refused = await gateway.ask(
                path, {**body, "tools": [{"name": "f", "type": "function", "input_schema": {}}]}
            )
            assert refused.status == 400
            assert "tools" in error_of(path, refused)["message"]
