"""Where guarded requests go: a server, whose answer passes through as it comes, or a model in this process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias, TypeVar

import aiohttp
import orjson

from vlmguard.chat import Chat, Response
from vlmguard.errors import AuthenticationFailed, BadAnswer, RateLimited, Timeout, Upstream
from vlmguard.gateway.wire import Conversation, Wire
from vlmguard.vlms.protocol import VLM, closing
from vlmguard.vlms.transport import FAILURES, Patience, retry_after, target_error

Piece = TypeVar("Piece")
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]  # lower-case names, as ASGI gives them

JSON: Final = (b"content-type", b"application/json")
EVENT_STREAM: Final = b"text/event-stream"
EVENTS: Final = (b"content-type", EVENT_STREAM + b"; charset=utf-8")
# What of a caller's headers goes on: what the API itself reads. Cookies, keys and addresses don't.
SENT_ON: Final = frozenset(
    (
        *(b"accept", b"content-type", b"anthropic-version", b"anthropic-beta", b"openai-beta"),
        *(b"traceparent", b"tracestate", b"user-agent"),
    )
)
KEYS: Final = frozenset((b"authorization", b"x-api-key", b"api-key"))
# What of an answer's headers comes back.
BROUGHT_BACK: Final = frozenset(("content-type", "retry-after", "retry-after-ms", "cache-control"))
LIMITS_BROUGHT_BACK: Final = ("x-ratelimit-", "anthropic-ratelimit-")
NOTICED_SECONDS: Final = 1.0
IDLE_SECONDS: Final = 4  # of a connection; the servers that we ask close one after 5, maybe under a request


@dataclass(frozen=True)
class Call:
    """A request on its way.

    Args:
        chat: what the guard lets through; the conversation's own where nothing was changed.
        received: the body as it came.
        headers: the client's, those that continue its trace among them.
    """

    wire: Wire
    conversation: Conversation
    chat: Chat
    received: bytes = field(repr=False)
    headers: Headers = field(repr=False)
    request_id: str

    def body(self, model: str | None) -> bytes:
        """What a server gets: the very bytes that came, unless the guard changed the chat or `model` is another one."""
        asked = self.conversation
        if self.chat is asked.chat and model in (None, asked.model):
            return self.received
        wire = self.wire.write(asked, self.chat)
        return orjson.dumps({**wire, "model": model} if model else wire)


@dataclass(frozen=True)
class Answer:
    """An answer that has begun; `chunks` is its body as it arrives, none of them empty."""

    status: int
    headers: Headers
    chunks: AsyncIterator[bytes] = field(repr=False)

    @property
    def kind(self) -> bytes:
        """Its content type, without parameters."""
        return next((value for name, value in self.headers if name == JSON[0]), b"").partition(b";")[0].strip().lower()

    @property
    def streamed(self) -> bool:
        return self.kind == EVENT_STREAM


class Target(Protocol):
    """Who answers. `open` gives an answer inside the block; leaving it early ends the work on it."""

    @property
    def name(self) -> str: ...

    def open(self, call: Call) -> AbstractAsyncContextManager[Answer]: ...

    async def aclose(self) -> None: ...


@dataclass(eq=False)
class Server:
    """A server of the same API, asked once: who called us has retries of its own (F033).

    Args:
        url: its root, up to and with /v1.
        model: asked for in place of the caller's; None asks for the caller's.
        key: ours for it; None sends none.
        pass_key: send the caller's key on, in place of ours.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    pass_key: bool = False
    patience: Patience = field(default_factory=Patience)
    _session: aiohttp.ClientSession | None = field(default=None, init=False, repr=False)

    @property
    def name(self) -> str:
        return self.url

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Answer]:
        """Raises TargetError when there is no answer of the API's; what it answers, errors too, is passed on."""
        body = call.body(self.model)
        async with self.request("POST", call.wire.path, call.headers, body) as answer:
            check_spoken(answer)
            yield answer

    @asynccontextmanager
    async def request(self, method: str, path: str, headers: Headers, body: bytes | None) -> AsyncIterator[Answer]:
        """
        Args:
            path: as the gateway's; /v1 stands for where the server's API begins.
        """
        under = path.startswith("/v1/")
        try:
            asked = await self._open_session().request(
                method,
                self.url + path.removeprefix("/v1") if under else self.url.removesuffix("/v1") + path,
                data=body,
                headers=self._sent(headers),
                timeout=self.patience.timeout(self.patience.total_seconds),
                allow_redirects=False,  # the request and the key are for this server
            )
        except FAILURES as error:
            raise target_error(error, self.url, self.patience) from error
        async with asked:
            if asked.status in (401, 403) and not self.pass_key:
                remedy = "Its operator sets the key that [target] api_key_env names."
                raise AuthenticationFailed("the target refused the gateway's key", remedy)
            yield Answer(asked.status, _brought_back(asked), self._chunks(asked))

    async def _chunks(self, asked: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
        try:
            while chunk := await _next(asked):
                yield chunk
        except FAILURES as error:
            raise target_error(error, self.url, self.patience) from error

    def _sent(self, headers: Headers) -> list[tuple[str, str]]:
        wanted = SENT_ON | KEYS if self.pass_key else SENT_ON
        sent = [(name.decode(), value.decode("latin-1")) for name, value in headers if name in wanted]
        sent.append(("accept-encoding", "identity"))
        if self.key and not self.pass_key:
            sent += [("authorization", f"Bearer {self.key}"), ("x-api-key", self.key)]
        return sent

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=0, keepalive_timeout=IDLE_SECONDS
                ),  # admission bounds the connections
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent",),
            )
        return self._session

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None


@dataclass(eq=False)
class InProcess:
    """A model in this process; its answers take the shape of the API that was called."""

    vlm: VLM

    @property
    def name(self) -> str:
        return self.vlm.name

    @asynccontextmanager
    async def open(self, call: Call) -> AsyncIterator[Answer]:
        if not call.conversation.stream:
            async with said_here(call, await self.vlm(call.chat)) as answer:
                yield answer
            return
        async with closing(self.vlm.stream(call.chat)) as pieces:
            first = await anext(pieces, None)  # what fails before the first word is an error with a status of its own
            if first is None:
                raise BadAnswer(f"{self.name} ended its answer before it began")
            async with streamed_here(call, _after([first], pieces)) as answer:
                yield answer

    async def aclose(self) -> None:
        await self.vlm.aclose()


@asynccontextmanager
async def said_here(call: Call, said: Response) -> AsyncIterator[Answer]:
    """An answer of ours in the API's shape; as a stream where one was asked for."""
    if call.conversation.stream:
        async with streamed_here(call, _each([said.text, said] if said.text else [said])) as answer:
            yield answer
        return
    body = orjson.dumps(call.wire.answer(said, call.conversation, call.request_id, int(time.time())))
    yield Answer(200, (JSON,), _each([body]))


@asynccontextmanager
async def streamed_here(call: Call, pieces: AsyncIterator[str | Response]) -> AsyncIterator[Answer]:
    events = call.wire.stream(pieces, call.conversation, call.request_id, int(time.time()))
    try:
        yield Answer(200, (EVENTS, (b"cache-control", b"no-cache")), events)
    finally:
        await events.aclose()


async def _each(pieces: Iterable[Piece]) -> AsyncGenerator[Piece, None]:
    for piece in pieces:
        yield piece


async def _after(first: Iterable[Piece], rest: AsyncIterator[Piece]) -> AsyncGenerator[Piece, None]:
    for piece in first:
        yield piece
    async for piece in rest:
        yield piece


async def _next(asked: aiohttp.ClientResponse) -> bytes:
    """The next piece of the body; b"" at its end.

    aiohttp closes the connection on garbage in a body and lets its reader wait on: that is noticed here.
    """
    while True:
        try:
            async with asyncio.timeout(NOTICED_SECONDS) as silence:
                return await asked.content.readany()
        except TimeoutError:
            if not silence.expired():  # aiohttp's own
                raise
        protocol = asked.connection.protocol if asked.connection is not None else None
        if not asked.content.is_eof() and (protocol is None or not protocol.is_connected()):
            raise aiohttp.ClientPayloadError("the connection was closed")


def check_spoken(answer: Answer) -> None:
    """Raises TargetError for an error that is not the API's own: a proxy's page, a redirect."""
    if answer.status < 300 or answer.kind == JSON[1]:
        return
    if answer.status == 429:
        after = next((value.decode() for name, value in answer.headers if name == b"retry-after"), None)
        raise RateLimited("the target asks to be called less often", "Wait.", retry_after=retry_after(after))
    if answer.status in (408, 504):
        raise Timeout(f"the target gave up waiting ({answer.status})", "Try again, or ask for fewer tokens.")
    raise Upstream(f"the target answered {answer.status}", "Its operator may know more.", status=answer.status)


def _brought_back(asked: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    return [
        (name.lower().encode(), value.encode("latin-1", "replace"))
        for name, value in asked.headers.items()
        if name.lower() in BROUGHT_BACK or name.lower().startswith(LIMITS_BROUGHT_BACK)
    ]
