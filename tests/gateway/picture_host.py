"""A web host on loopback that gives pictures from a script, byte for byte, well or badly."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self


@dataclass(frozen=True)
class Answer:
    """
    Args:
        body: sent as it is; with `gap`, byte by byte, that many seconds apart.
        headers: over Content-Length, which None leaves out.
        delay: seconds before the first byte.
        times: how often the body is sent.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str | None] = field(default_factory=dict)
    delay: float = 0.0
    gap: float = 0.0
    times: int = 1

    @property
    def head(self) -> bytes:
        own = {"Content-Length": str(len(self.body) * self.times), "Content-Type": "image/png", "Connection": "close"}
        lines = [f"{name}: {value}" for name, value in {**own, **self.headers}.items() if value is not None]
        return "\r\n".join((f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", *lines, "", "")).encode()


def to(location: str, status: int = 302) -> Answer:
    return Answer(status=status, headers={"Location": location})


class PictureHost:
    """Answers paths from `answers`; `heads` holds what it was sent, `most` the most requests at a time."""

    def __init__(self, answers: Mapping[str, Answer], tls: ssl.SSLContext | None = None, at: str = "127.0.0.1") -> None:
        self.answers = dict(answers)
        self.heads: list[str] = []
        self.most = self._now = self.sent = 0
        self.asked, self.hung_up = asyncio.Event(), asyncio.Event()
        self._tls, self._at = tls, at
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self._at, 0, ssl=self._tls)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    @property
    def paths(self) -> list[str]:
        return [head.split(" ")[1] for head in self.heads]

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            self._now += 1
            self.most = max(self.most, self._now)
            self.asked.set()
            with suppress(ConnectionError):
                await self._answer(self.answers[self.paths[-1].partition("?")[0]], reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):  # a client that found our certificate wanting
            pass
        finally:
            self._now -= 1
            writer.close()
            with suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    async def _answer(self, answer: Answer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sending = asyncio.ensure_future(self._send(answer, writer))
        leaving = asyncio.ensure_future(reader.read())  # ends when the client goes
        await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not sending.done() or sending.exception():
            self.hung_up.set()
        for task in (sending, leaving):
            task.cancel()
        await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send(self, answer: Answer, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(answer.delay)
        writer.write(answer.head)
        pieces = [answer.body[at : at + 1] for at in range(len(answer.body))] if answer.gap else [answer.body]
        for _ in range(answer.times):
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                self.sent += len(piece)
                await asyncio.sleep(answer.gap)
