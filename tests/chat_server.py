"""A chat-completions server on 127.0.0.1 that replies from a script, for tests of what talks to one."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web


@dataclass(frozen=True)
class Reply:
    """`body` is JSON, text or, for a stream, a list of pieces of bytes; `delay` comes before, `gap` between
    pieces."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    gap: float = 0.0


def said(text: str | None, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish_reason,
    }
    return {"id": "1", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}


def streamed(*texts: str, finish_reason: str | None = "stop", usage: bool = True, done: bool = True) -> list[bytes]:
    """A streamed answer, a chunk a text."""
    deltas: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}]
    deltas += [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    deltas += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]}] if finish_reason else []
    deltas += [{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}] if usage else []
    return [event(delta) for delta in deltas] + ([b"data: [DONE]\n\n"] if done else [])


def event(data: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


class ChatServer:
    """Gives its replies in order, then the last one for ever; `requests` and `keys` hold what it was sent."""

    def __init__(self, *replies: Reply | Any) -> None:
        self.replies: Sequence[Reply] = [it if isinstance(it, Reply) else Reply(it) for it in replies]
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.connections: set[Any] = set()
        self.asked = asyncio.Event()
        self.hung_up = asyncio.Event()
        self.url = ""

    def reply(self) -> Reply:
        """The reply to the last of `requests`."""
        return self.replies[min(len(self.requests), len(self.replies)) - 1]

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(await request.json())
        self.asked.set()
        self.keys.append(request.headers.get("Authorization"))
        self.connections.add(request.transport)
        reply = self.reply()
        try:
            await asyncio.sleep(reply.delay)
            if not isinstance(reply.body, list):
                text = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
                kind = "text/html" if isinstance(reply.body, str) else "application/json"
                return web.Response(text=text, status=reply.status, headers=reply.headers, content_type=kind)
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            for piece in reply.body:
                await response.write(piece)
                await asyncio.sleep(reply.gap)
        except (asyncio.CancelledError, ConnectionError):
            self.hung_up.set()
            raise
        return response
