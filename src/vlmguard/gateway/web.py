"""HTTP as ASGI gives it: a request's body within limits, its identifier, and the one reply to it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import orjson
from starlette.types import Receive, Send

from vlmguard.gateway.upstream import JSON, Headers
from vlmguard.gateway.wire.problem import Problem

BODY_SECONDS: Final = 60.0  # 32 MiB at 4 Mbit/s
OWN_ID: Final = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


class Rejected(Exception):
    """The gateway itself turns a request away; `kind` is what the record says of it."""

    def __init__(self, problem: Problem, kind: str) -> None:
        super().__init__(problem.message)
        self.problem, self.kind = problem, kind


class Disconnected(Exception):
    """The client went away."""


def header(headers: Headers, name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


def request_id(headers: Headers) -> str:
    """The caller's own x-request-id where it is a plain one, else a new one."""
    given = header(headers, b"x-request-id")
    return given.decode() if given and OWN_ID.fullmatch(given) else f"req_{os.urandom(12).hex()}"


class Shape(Protocol):
    """How an API spells an error: as the whole answer, or as the last event of a stream, which `ending` closes."""

    @property
    def ending(self) -> bytes: ...

    def error(self, problem: Problem) -> dict[str, Any]: ...

    def error_event(self, problem: Problem) -> bytes: ...


async def request_body(headers: Headers, receive: Receive, limit: int, *, json: bool) -> bytes:
    """Raises Rejected (408, 413, 415) before anything is parsed, Disconnected when the client leaves."""
    if json:
        if header(headers, b"content-encoding") not in (None, b"identity"):
            raise _rejected(415, "the body is compressed. Send it as it is")
        kind = (header(headers, b"content-type") or b"").split(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            raise _rejected(415, "the body is not called JSON. Send content-type: application/json")
    declared = header(headers, b"content-length") or b"0"
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await _whole(receive, limit)
    except TimeoutError:
        raise _rejected(408, f"the body did not arrive in {BODY_SECONDS:g} s") from None


async def _whole(receive: Receive, limit: int) -> bytes:
    pieces: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
        if (size := size + len(pieces[-1])) > limit:
            raise _too_large(limit)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Reply:
    """The reply to one request: whole, or begun and then given in pieces. What comes after its end is dropped.

    Args:
        own_headers: asked when the reply begins.
    """

    def __init__(self, send: Send, shape: Shape, own_headers: Callable[[], Headers]) -> None:
        self._send, self._shape, self._own_headers = send, shape, own_headers
        self.begun = self.ended = False

    async def begin(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        self.begun = True
        sent = [*headers, *self._own_headers()]
        await self._send({"type": "http.response.start", "status": status, "headers": sent})

    async def piece(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        if self.ended:
            return
        self.ended = True
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def whole(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        await self.begin(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.end(body)

    async def failed(self, problem: Problem) -> None:
        """The error in the caller's shape; of a stream that has begun, its last event."""
        if self.ended:
            return
        if self.begun:
            await self.end(self._shape.error_event(problem) + self._shape.ending)
            return
        headers = [JSON]
        if problem.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(problem.retry_after))).encode()))
        if problem.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        if problem.status == 408:  # what is still to come of the body is not the next request
            headers.append((b"connection", b"close"))
        await self.whole(problem.status, headers, orjson.dumps(self._shape.error(problem)))


def _rejected(status: int, message: str) -> Rejected:
    return Rejected(Problem(status, message), "BadRequest")


def _too_large(limit: int) -> Rejected:
    return _rejected(413, f"the body has more than {limit:,} bytes. Send smaller pictures")
