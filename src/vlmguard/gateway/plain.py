"""Routes without a guard: the list of models, and what an operator lets through by name."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import orjson

from vlmguard.gateway.exchange import Exchange
from vlmguard.gateway.upstream import JSON, InProcess, Server

if TYPE_CHECKING:
    from vlmguard.gateway.config import Key

MODALITIES: Final = {"input_modalities": ["text", "image"], "output_modalities": ["text"]}


async def models(exchange: Exchange, key: Key) -> None:
    """The target's models, each with what it takes and gives where the target does not say so itself."""
    target = exchange.gateway.target
    exchange.facts.action = "passed"
    async with exchange.while_connected():
        if isinstance(target, InProcess):
            told = {"id": target.name, "object": "model", "created": int(time.time()), "owned_by": "vlmguard"}
            await exchange.answer(200, orjson.dumps({"object": "list", "data": [{**told, **MODALITIES}]}), JSON)
            return
        assert isinstance(target, Server)
        async with target.request("GET", exchange.path, exchange.headers, None) as answer:
            body = b"".join([piece async for piece in answer.chunks])
            await exchange.answer(answer.status, _with_modalities(body), *answer.headers)


async def unguarded(exchange: Exchange, key: Key) -> None:
    """Passes the request on as it is: [routes] allow names the path."""
    target = exchange.gateway.target
    assert isinstance(target, Server)  # the settings allow it for a server alone
    exchange.facts.action = "unguarded"
    method = exchange.scope["method"]
    body = None if method in ("GET", "HEAD", "DELETE") else await exchange.body(json=False)
    path = exchange.path
    if query := exchange.scope["query_string"]:
        path = f"{path}?{query.decode('latin-1')}"
    async with exchange.while_connected(), target.request(method, path, exchange.headers, body) as answer:
        await exchange.pass_on(answer)


def _with_modalities(body: bytes) -> bytes:
    try:
        listed = orjson.loads(body)
    except ValueError:
        return body
    if not isinstance(listed, dict) or not isinstance(listed.get("data"), list):
        return body
    return orjson.dumps({**listed, "data": [_told(one) for one in listed["data"]]})


def _told(model: Any) -> Any:
    """The model with what it takes: its own word first, at the top or, as llama.cpp and OpenRouter have it, one level down."""
    if not isinstance(model, dict):
        return model
    own = model.get("architecture")
    known = {name: own[name] for name in MODALITIES if name in own} if isinstance(own, dict) else {}
    return {**MODALITIES, **known, **model}
