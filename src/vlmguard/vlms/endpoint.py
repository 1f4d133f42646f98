"""A VLM behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp, OpenAI and the like."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import orjson
import stamina
from yarl import URL

from vlmguard.chat import Chat, Response
from vlmguard.errors import ConfigError, TargetError
from vlmguard.vlms.completions import Assembly, completion, error_of
from vlmguard.vlms.protocol import Capability
from vlmguard.vlms.sse import events
from vlmguard.vlms.transport import FAILURES, Patience, lost, retry_after, target_error

RETRIED_STATUSES = (408, 429)  # and 5xx


@dataclass(eq=False)
class Endpoint:
    """Calls `url`/chat/completions, with the request's own fields and our model name.

    The one place where calls are retried: connection errors, 408, 429, 5xx and silence, `retries` times, with
    growing waits or those the server asks for. Nothing else is, and nothing once a stream has said something.
    One endpoint serves one event loop.

    Args:
        url: the API's root, such as http://127.0.0.1:8000/v1.
        api_key: else $VLMGUARD_API_KEY, else for openai.com $OPENAI_API_KEY, else none is sent.
        connect_seconds: to reach the server.
        first_byte_seconds: the longest silence, before the answer and within it.
        total_seconds: for the whole call, retries and waits included.
        max_retry_wait_seconds: a server that asks for a longer wait fails the call at once (RateLimited).
        headers: sent with every request, over our own.
        connections: open at a time.
    """

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    connect_seconds: float = 10.0
    first_byte_seconds: float = 120.0
    total_seconds: float = 600.0
    retries: int = 2
    retry_wait_seconds: float = 0.5
    max_retry_wait_seconds: float = 30.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    connections: int = 100

    can = frozenset({Capability.TEXT, Capability.NO_IMAGE, Capability.TEMPERATURE, Capability.LOGPROBS})

    def __post_init__(self) -> None:
        url = URL(self.url)
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError.wrong("the endpoint's address", expected="http(s)://HOST/v1", got=self.url)
        if url.user or url.password:
            raise ConfigError("the endpoint's address holds a key", "Set VLMGUARD_API_KEY instead.")
        if not self.model:
            raise ConfigError("the endpoint needs a model's name", f"Write {self.url}#MODEL.")
        path = url.path.rstrip("/")
        self._url = url.with_fragment(None)
        self._url = self._url.with_path(
            path + ("" if path.endswith("/chat/completions") else "/chat/completions"), keep_query=True
        )
        self._key = self.api_key or os.environ.get("VLMGUARD_API_KEY")
        if not self._key and (url.host == "openai.com" or url.host.endswith(".openai.com")):
            self._key = os.environ.get("OPENAI_API_KEY")
        self._session: aiohttp.ClientSession | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @classmethod
    def from_spec(cls, spec: str, **options: Any) -> Endpoint:
        """From http://host/v1#model."""
        url, _, model = spec.partition("#")
        return cls(url, model, **options)

    @property
    def patience(self) -> Patience:
        return Patience(self.connect_seconds, self.first_byte_seconds, self.total_seconds)

    @property
    def name(self) -> str:
        return f"{self.address}#{self.model}"

    @property
    def address(self) -> str:
        """The address for messages: no key can be in it."""
        return str(self._url.with_query(None)).removesuffix("/chat/completions")

    async def __call__(self, chat: Chat) -> Response:
        """Raises a TargetError of the kind that fits; see `errors`."""
        call = _Call(self, chat, stream=False)
        async for attempt in call.attempts():
            with attempt, call.translating():
                async with await call.post() as answer:
                    response = completion(orjson.loads(await answer.read()), call.seconds)
        return response

    async def stream(self, chat: Chat) -> AsyncGenerator[str | Response, None]:
        """The text as it comes, then the Response. Closing the stream closes the connection."""
        call = _Call(self, chat, stream=True)
        async with AsyncExitStack() as open_answers:
            async for attempt in call.attempts():
                with attempt, call.translating():
                    await open_answers.aclose()
                    answer = await open_answers.enter_async_context(await call.post())
                    assembly = Assembly()
                    texts = await open_answers.enter_async_context(aclosing(_texts(answer, assembly)))
                    text = await anext(texts, None)
            while text is not None:
                yield text
                with call.translating():
                    text = await anext(texts, None)
            with call.translating():
                response = assembly.response(call.seconds)
            yield response

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
        self._session = None

    def _open_session(self) -> aiohttp.ClientSession:
        """The pool of connections, made on the first call of an event loop."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.closed or self._loop is not loop:
            self._loop = loop
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=self.connections))
        return self._session


class _Call:
    """One call of an endpoint: its request, its clock, and whether the last failure is worth another try."""

    def __init__(self, endpoint: Endpoint, chat: Chat, *, stream: bool) -> None:
        wire = {**chat.to_wire(), "model": endpoint.model, "stream": stream}
        options = wire.pop("stream_options", None) or {}
        wire |= {"stream_options": {**options, "include_usage": True}} if stream else {}
        self._body = orjson.dumps(wire)
        self._endpoint = endpoint
        self._started = time.perf_counter()
        self._again: bool | float = False  # or the seconds to wait first

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started

    @property
    def _left(self) -> float:
        return self._endpoint.total_seconds - self.seconds

    def attempts(self) -> AsyncIterator[stamina.Attempt]:
        endpoint = self._endpoint
        return aiter(
            stamina.retry_context(
                on=lambda error: self._again if isinstance(error, TargetError) else False,
                attempts=endpoint.retries + 1,
                timeout=None,  # the clock is ours: see `post`
                wait_initial=endpoint.retry_wait_seconds,
                wait_max=endpoint.max_retry_wait_seconds,
                wait_jitter=endpoint.retry_wait_seconds,
            )
        )

    async def post(self) -> aiohttp.ClientResponse:
        """An open answer with a good status; its body is still to be read."""
        endpoint = self._endpoint
        key = {"Authorization": f"Bearer {endpoint._key}"} if endpoint._key else {}
        answer = await endpoint._open_session().post(
            endpoint._url,
            data=self._body,
            headers={"Content-Type": "application/json", **key, **endpoint.headers},
            timeout=endpoint.patience.timeout(self._left),
            allow_redirects=False,  # the key is for this server
        )
        if 200 <= answer.status < 300:
            return answer
        async with answer:
            body = await answer.read()
        after = retry_after(answer.headers.get("Retry-After"))
        self._again = self._worth(answer.status, after)
        raise error_of(answer.status, _json_or_text(body), after, endpoint._key)

    def _worth(self, status: int, after: float | None) -> bool | float:
        if status not in RETRIED_STATUSES and status < 500:
            return False
        if after is None:
            return True
        return after if after <= min(self._endpoint.max_retry_wait_seconds, self._left) else False

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turns what aiohttp and the parsers raise into our errors, with the address and a remedy."""
        endpoint, where = self._endpoint, self._endpoint.address
        self._again = False
        try:
            yield
        except TargetError as error:
            error.args = (f"{where}: {error.message}",)
            raise
        except FAILURES as error:
            silent = isinstance(error, aiohttp.SocketTimeoutError) and self._left > 0
            self._again = silent or lost(error)
            raise target_error(error, where, endpoint.patience) from error


async def _texts(answer: aiohttp.ClientResponse, assembly: Assembly) -> AsyncGenerator[str, None]:
    """The texts of a streamed answer; an answer that was not streamed gives one."""
    if answer.content_type == "application/json":
        whole = orjson.loads(await answer.read())
        completion(whole, 0)
        chunk = {
            **whole,
            "choices": [{**choice, "delta": choice.get("message")} for choice in whole["choices"][:1]],
        }
        yield assembly.add(chunk)
        return
    async with aclosing(events(answer.content.iter_any())) as arriving:
        async for event in arriving:
            if event.data == "[DONE]":
                return
            chunk = orjson.loads(event.data)
            failed = event.name == "error" and isinstance(chunk, dict) and "error" not in chunk
            if text := assembly.add({"error": chunk} if failed else chunk):
                yield text


def _json_or_text(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except ValueError:
        return body[:2000].decode(errors="replace")
