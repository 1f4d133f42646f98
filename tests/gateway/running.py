"""A gateway that serves on loopback, and an upstream there that replies from a script, byte for byte, well or badly."""

from __future__ import annotations

import asyncio
import base64
import json
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, Self, TypeAlias, cast

import aiohttp
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI

from tests.gateway.audit_logs import found
from tests.stand_ins import Rewriter
from vlmguard.commands.serve import bound, server_of
from vlmguard.gateway.audit_record import Record
from vlmguard.gateway.config import Settings
from vlmguard.gateway.gateway import Gateway, opened

REWRITER: Final = f"{Path(__file__).parents[1] / 'stand_ins.py'}:Rewriter"
PATIENCE_SECONDS: Final = 30.0  # of tests for what comes at once on an idle machine
PATIENCE: Final = aiohttp.ClientTimeout(total=PATIENCE_SECONDS)
DROP: Final = object()  # in the place of a piece: the connection breaks off
Piece: TypeAlias = bytes | float | asyncio.Event | object

KEY = "vg-the-callers-own-key"
HASH = sha256(KEY.encode()).hexdigest()  # of a caller's key

CHAT, RESPONSES, MESSAGES = ROUTES = "/v1/chat/completions", "/v1/responses", "/v1/messages"


@dataclass(frozen=True)
class Reply:
    """
    Args:
        pieces: each is sent by itself; a number waits so many seconds, an event until it is set, DROP breaks off.
        headers: beside content-type.
        raw: the pieces are all that is sent, head included.
    """

    pieces: Iterable[Piece]
    status: int = 200
    kind: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    raw: bool = False

    @property
    def head(self) -> bytes:
        own = {"Content-Type": self.kind, "Transfer-Encoding": "chunked", **self.headers}
        lines = [f"{name}: {value}" for name, value in own.items()]
        return "\r\n".join((f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}", *lines, "", "")).encode()


def whole(body: Any, status: int = 200, **headers: str) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply((data,), status, headers={name.replace("_", "-"): value for name, value in headers.items()})


def stream(*pieces: Piece) -> Reply:
    return Reply(pieces, kind="text/event-stream")


def event(data: Any, name: str = "") -> bytes:
    return (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(data).encode() + b"\n\n"


DONE: Final = b"data: [DONE]\n\n"
HEAD: Final = {"id": "chatcmpl-1", "created": 1, "model": "m"}
USAGE: Final = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}


def chunk(text: str | None = None, finish: str | None = None) -> bytes:
    """A piece of a streamed chat completion."""
    delta = {"role": "assistant", "content": text} if text is not None else {}
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({**HEAD, "object": "chat.completion.chunk", "choices": [choice]})


def usage_chunk() -> bytes:
    return event({**HEAD, "object": "chat.completion.chunk", "choices": [], "usage": USAGE})


def completion(text: str | None = "Hello from upstream.", finish: str = "stop", **message: Any) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
        "logprobs": None,
    }
    return {**HEAD, "object": "chat.completion", "choices": [choice], "usage": USAGE}


def completion_chunks(*texts: str) -> list[bytes]:
    return [*(chunk(text) for text in texts), chunk(finish="stop"), usage_chunk(), DONE]


def response(text: str = "Hello from upstream.", status: str = "completed") -> dict[str, Any]:
    """An answer of /v1/responses."""
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    head = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "status": status}
    return {**head, "output": [message], "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}


def response_events(*texts: str) -> list[bytes]:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0}
    kind = "response.output_text.delta"
    return [
        event({"type": "response.created", "sequence_number": 0, "response": response("", "in_progress")}),
        *(event({"type": kind, "sequence_number": 1, **place, "delta": text, "logprobs": []}, kind) for text in texts),
        event(
            {"type": "response.completed", "sequence_number": 9, "response": response("".join(texts))},
            "response.completed",
        ),
    ]


def message(text: str = "Hello from upstream.", *blocks: Mapping[str, Any], reason: str = "end_turn") -> dict[str, Any]:
    """An answer of /v1/messages."""
    head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m"}
    ending = {"stop_reason": reason, "stop_sequence": None, "usage": {"input_tokens": 9, "output_tokens": 4}}
    return {**head, "content": [{"type": "text", "text": text}, *blocks], **ending}


def message_events(*texts: str) -> list[bytes]:
    started = {**message(), "content": [], "stop_reason": None}
    told: list[dict[str, Any]] = [
        {"type": "message_start", "message": started},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": it}} for it in texts),
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"output_tokens": 4},
        },
        {"type": "message_stop"},
    ]
    return [event(it, it["type"]) for it in told]


ORDINARY: Final[Mapping[tuple[str, bool], Reply]] = {
    (CHAT, False): whole(completion()),
    (CHAT, True): stream(*completion_chunks("Hello ", "from upstream.")),
    (RESPONSES, False): whole(response()),
    (RESPONSES, True): stream(*response_events("Hello ", "from upstream.")),
    (MESSAGES, False): whole(message()),
    (MESSAGES, True): stream(*message_events("Hello ", "from upstream.")),
}


def ask(path: str, text: str = "What is the tide table?", **fields: Any) -> dict[str, Any]:
    """A request of one user turn in the API's shape."""
    if path == RESPONSES:
        return {"model": "m", "input": text, **fields}
    limit = {"max_tokens": 50} if path == MESSAGES else {}
    return {"model": "m", **limit, "messages": [{"role": "user", "content": text}], **fields}


@dataclass(frozen=True)
class Asked:
    """A request that the upstream got."""

    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Upstream:
    """Gives its replies in order, then the last one for ever; without any, what the API's own server would say.

    `asked` holds what it was sent, `connections` how many are open, `replying` how many replies have begun and not ended.
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[Asked] = []
        self.connections = self.replying = 0
        self.was_asked, self.hung_up = asyncio.Event(), asyncio.Event()
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=2**26)
        self.port = int(self._server.sockets[0].getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    @property
    def last(self) -> Asked:
        return self.asked[-1]

    def says(self, *replies: Reply) -> None:
        """From now on these."""
        self.replies = list(replies)
        self.asked.clear()
        self.was_asked, self.hung_up = asyncio.Event(), asyncio.Event()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while asked := await _read(reader):
                self.asked.append(asked)
                self.was_asked.set()
                if not await self._reply(asked, reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.connections -= 1
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _reply(self, asked: Asked, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection may go on."""
        reply = self._next(asked)
        self.replying += 1
        leaving = asyncio.ensure_future(reader.read(1))
        work = asyncio.ensure_future(_send(reply, writer))
        try:
            await asyncio.wait((leaving, work), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.hung_up.set()
                return False
            return work.result() and not leaving.done()
        finally:
            self.replying -= 1
            for task in (leaving, work):
                task.cancel()
            await asyncio.gather(leaving, work, return_exceptions=True)

    def _next(self, asked: Asked) -> Reply:
        if not self.replies:
            streamed = bool(asked.body) and asked.json.get("stream") is True
            return ORDINARY[asked.path, streamed]
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


async def _read(reader: asyncio.StreamReader) -> Asked | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    method, path, _ = first.split(" ")
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Asked(method, path, headers, body)


async def _send(reply: Reply, writer: asyncio.StreamWriter) -> bool:
    if not reply.raw:
        writer.write(reply.head)
    for piece in reply.pieces:
        if isinstance(piece, bytes):
            writer.write(piece if reply.raw else b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        elif isinstance(piece, asyncio.Event):
            await piece.wait()
        elif isinstance(piece, float):
            await asyncio.sleep(piece)
        else:
            return False
        await asyncio.sleep(0)
    if not reply.raw:
        writer.write(b"0\r\n\r\n")
        await writer.drain()
    return not reply.raw


@dataclass(frozen=True)
class Answered:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Running:
    """A gateway that serves."""

    gateway: Gateway
    root: str
    log: Path
    session: aiohttp.ClientSession

    @property
    def rewriter(self) -> Rewriter:
        return cast(Rewriter, self.gateway.rewriter.rewriter)

    def openai(self, key: str = "none") -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.root}/v1", api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)

    def anthropic(self, key: str = "none") -> AsyncAnthropic:
        return AsyncAnthropic(base_url=self.root, api_key=key, max_retries=0, timeout=PATIENCE_SECONDS)

    async def ask(self, path: str, body: Any = None, method: str = "POST", **headers: str) -> Answered:
        """The whole answer. The body is JSON, or sent as it is where it is bytes."""
        async with self.asking(path, body, method, **headers) as answer:
            return Answered(answer.status, {k.lower(): v for k, v in answer.headers.items()}, await answer.read())

    def asking(
        self, path: str, body: Any = None, method: str = "POST", **headers: str
    ) -> aiohttp.client._RequestContextManager:
        """The same, as it comes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if data is not None:
            given.setdefault("content-type", "application/json")
        return self.session.request(method, self.root + path, data=data, headers=given)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A bare one."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.root.rpartition(":")[2]))
        try:
            yield reader, writer
        finally:
            writer.close()
            await writer.wait_closed()

    def records(self) -> list[Record]:
        return found(self.log, with_texts=True)

    def record(self, answer: Answered) -> Record:
        """Of the request that was answered so."""
        (one,) = (one for one in self.records() if one.request_id == answer.headers["x-request-id"])
        return one


def key(**fields: Any) -> list[dict[str, Any]]:
    return [{"id": "app", "sha256": HASH, **fields}]


def picture(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def error_of(path: str, answer: Answered) -> dict[str, Any]:
    """The error in an answer, which has to be in the API's shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json
    error: dict[str, Any] = body["error"]
    if path == MESSAGES:
        assert body.keys() == {"type", "error"}
        assert body["type"] == "error"
        assert error.keys() == {"type", "message"}
    else:
        assert body.keys() == {"error"}
        assert error.keys() == {"message", "type", "param", "code"}
    return error


async def until(true: Callable[[], bool], seconds: float = PATIENCE_SECONDS) -> None:
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110 what is waited for has no event
            await asyncio.sleep(0.005)


@asynccontextmanager
async def running(server: Upstream | str, /, **sections: Any) -> AsyncIterator[Running]:
    """A gateway in front of an upstream, or of the model with this spec, with the scripted rewriter and these settings."""
    where = {"spec": server} if isinstance(server, str) else {"url": server.url}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.sqlite3"
        own: dict[str, dict[str, Any]] = {
            "server": {"port": 0},
            "target": where,
            "guard": {"rewriter": REWRITER},
            "audit_log": {"url": f"sqlite:///{log}"},
        }
        merged = {name: {**own.get(name, {}), **sections.get(name, {})} for name in own | sections if name != "keys"}
        settings = Settings.model_validate({**merged, "keys": sections.get("keys", ())})
        listening = bound(settings)
        async with opened(settings) as gateway, aiohttp.ClientSession(timeout=PATIENCE) as session:
            uvicorn = server_of(gateway)
            serving = asyncio.create_task(uvicorn.serve(sockets=[listening]))
            await until(lambda: uvicorn.started)
            try:
                yield Running(gateway, f"http://127.0.0.1:{listening.getsockname()[1]}", log, session)
            finally:
                await session.close()
                uvicorn.should_exit = True
                await serving
