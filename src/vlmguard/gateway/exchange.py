"""One request, from its first byte to its record: key, place in the queue, what its route does, answer or error.

The record is durable before the answer goes out, that of a stream as one that has begun, and whole before the stream's
last event: no answered request lacks one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, TypeAlias

import orjson
from starlette.types import Receive, Scope, Send

from vlmguard.errors import AuditLogError, BadAnswer, Timeout, Upstream, VLMGuardError
from vlmguard.gateway.events import Passing
from vlmguard.gateway.facts import Facts
from vlmguard.gateway.keys import may_call, presented
from vlmguard.gateway.telemetry import for_request
from vlmguard.gateway.upstream import Answer
from vlmguard.gateway.web import Disconnected, Rejected, Reply, Shape, request_body, request_id
from vlmguard.gateway.wire.problem import Problem, problem_of

if TYPE_CHECKING:
    from vlmguard.gateway.audit_record import Record
    from vlmguard.gateway.config import Key
    from vlmguard.gateway.gateway import Gateway
    from vlmguard.gateway.wire import Wire

Handle: TypeAlias = "Callable[[Exchange, Key], Awaitable[None]]"

MAX_ANSWER_BYTES: Final = 64 * 2**20  # of one that is not streamed


class Exchange:
    """
    Args:
        shape: of the errors.
        handle: what the route does: it answers through `pass_on` or `answer`.
    """

    def __init__(
        self, gateway: Gateway, shape: Shape, handle: Handle, scope: Scope, receive: Receive, send: Send
    ) -> None:
        self.gateway, self.handle, self.scope, self.receive = gateway, handle, scope, receive
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.path: str = scope["path"]
        self.facts = Facts(request_id(self.headers), self.path)
        self.reply = Reply(send, shape, self._own_headers)
        self._recorded = self._complete = False
        self._entry: str | None = None  # of a record that says that the answer has begun

    async def run(self) -> None:
        """Answers, whatever happens."""
        tracing = self.gateway.telemetry.tracing
        with for_request(self.facts.request_id), tracing.request(self.headers, self.scope["method"], self.path) as span:
            await self._answered()
            step = self.facts.step
            span.set(
                status=self.facts.status, action=self.facts.action, mode=self.facts.mode, images=self.facts.pictures
            )
            if step is not None:
                span.set(risk=step.risk, threshold=step.threshold, category=step.category)

    async def _answered(self) -> None:
        try:
            await self._run()
        except Disconnected:
            if not self._complete:
                self._failed("the client left", 499)
        except asyncio.CancelledError:  # by the server, which has waited long enough; nobody waits for this task
            await self._fail(Problem(503, "the gateway is shutting down"), "the gateway stopped")
        except Rejected as rejected:
            await self._fail(rejected.problem, rejected.kind)
        except VLMGuardError as error:
            await self._fail(problem_of(error), type(error).__name__)
        except Exception as error:  # noqa: BLE001 the edge: a fault of ours is a 500 in the caller's shape, and logged
            self.gateway.log_fault(error, self.facts.request_id)
            text = f"a fault in the gateway; its log has more under {self.facts.request_id}"
            await self._fail(Problem(500, text), type(error).__name__)
        finally:
            await self._record_at_last()
            self.gateway.observe(self.facts)

    async def body(self, *, json: bool = True) -> bytes:
        limit = self.gateway.settings.server.max_body_bytes
        return await request_body(self.headers, self.receive, limit, json=json)

    @asynccontextmanager
    async def while_connected(self) -> AsyncIterator[None]:
        """The block, cancelled at once when the client leaves before its end; for after the body. Raises Disconnected then."""
        work = asyncio.current_task()
        assert work is not None
        gone = False

        async def watch() -> None:
            nonlocal gone
            while (await self.receive())["type"] != "http.disconnect":
                pass
            if not self.reply.ended:  # else it is only said that nothing more can come
                gone = True
                work.cancel()

        watcher = asyncio.create_task(watch())
        try:
            yield
        except asyncio.CancelledError:
            if not gone:
                raise
            work.uncancel()
            raise Disconnected from None
        finally:
            watcher.cancel()

    async def pass_on(self, answer: Answer, wire: Wire | None = None) -> None:
        """The target's answer as it comes.

        Args:
            wire: what the answer has to be in; None passes on whatever it is.
        """
        self.facts.began()
        if answer.streamed and answer.status < 300:
            await self._stream(answer, wire)
        else:
            await self._whole(answer, wire)

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        """An answer of the gateway's own."""
        self.facts.status = status
        await self._record()
        await self.reply.whole(status, headers, body)

    async def _run(self) -> None:
        seconds = self.gateway.settings.target.total_seconds
        key = self._caller()
        self._check_log()
        async with self.gateway.admission:
            try:
                async with asyncio.timeout(seconds):
                    await self.handle(self, key)
            except TimeoutError:
                raise Timeout(f"the request took over {seconds:g} s", "Ask for fewer tokens.") from None

    def _caller(self) -> Key:
        """Raises Rejected for a key that is unknown (401) or not let in here (403), RateLimited for one that has to wait."""
        keys = self.gateway.keys
        key = keys.find(presented(self.headers))
        if key is None:
            text = "the gateway does not know the key. Send one as Authorization: Bearer, or as x-api-key"
            raise Rejected(Problem(401, text), "AuthenticationFailed")
        self.facts.key_id = key.id
        if not may_call(key, self.path):
            text = f"the key {key.id} may not call {self.path}"
            raise Rejected(Problem(403, text), "PermissionDenied")
        keys.spend(key)
        return key

    def _check_log(self) -> None:
        """Raises AuditLogError before anything is done for a request that could not be recorded."""
        log = self.gateway.audit_log
        if log is not None and not log.healthy:
            raise AuditLogError("the audit log cannot be written", "The gateway's own log says why. Try again later.")

    async def _whole(self, answer: Answer, wire: Wire | None) -> None:
        """An answer that is read to its end first: where it breaks off, the caller gets an error and not a half."""
        pieces, size = [], 0
        async for piece in answer.chunks:
            pieces.append(piece)
            self._check_size(size := size + len(piece))
        body = b"".join(pieces)
        if wire is not None and answer.status < 300:
            try:
                self.facts.said(orjson.loads(body))
            except ValueError:
                raise BadAnswer("the target's answer is not JSON", "Its operator may know more.") from None
        await self.answer(answer.status, body, *answer.headers)

    async def _stream(self, answer: Answer, wire: Wire | None) -> None:
        """Each piece as it comes. The record is whole before the event that ends the answer is sent."""
        self.facts.status = answer.status
        await self._begin()
        await self.reply.begin(answer.status, answer.headers)
        if wire is None:
            async for piece in answer.chunks:
                await self.reply.piece(piece)
        else:
            await self._events(answer, Passing(wire.final), wire.ending)
        await self._record()
        await self.reply.end()

    async def _events(self, answer: Answer, passing: Passing, ending: bytes) -> None:
        async for piece in answer.chunks:
            if whole := passing.push(piece):
                await self._event(whole, passing.ended)
            self._check_size(passing.held)
        rest = passing.rest()
        if rest and not passing.ended and not rest.endswith(b"\n"):
            raise Upstream("the target broke off in the middle of its answer", "Ask again.")
        if ending and not passing.ended:  # some servers leave [DONE] out (F022)
            rest += b"\n" * bool(rest) + ending
        await self._event(rest, ended=True)

    async def _event(self, event: bytes, ended: bool) -> None:
        if ended:
            await self._record()
        if event:
            await self.reply.piece(event)
        self._complete = ended

    def _check_size(self, size: int) -> None:
        if size > MAX_ANSWER_BYTES:
            raise Rejected(Problem(502, f"the target's answer has over {MAX_ANSWER_BYTES:,} bytes"), "BadAnswer")

    async def _fail(self, problem: Problem, kind: str) -> None:
        if self._complete:  # its reader has the whole answer
            await self.reply.end()
            return
        self._failed(kind, problem.status)
        await self._record_at_last()
        await self.reply.failed(problem)

    def _failed(self, kind: str, status: int) -> None:
        self.facts.failed(kind, self.facts.status if self.reply.begun else status)

    async def _begin(self) -> None:
        """Records that an answer begins, for one that is sent while it is made. Raises AuditLogError: then it doesn't."""
        if (log := self.gateway.audit_log) is not None:
            self._entry = await log.begin(await self._known())

    async def _record(self) -> None:
        """Once: the first caller's facts are those of the answer. Raises AuditLogError: then nothing is answered."""
        log = self.gateway.audit_log
        if self._recorded or log is None:
            return
        record = await self._known()
        self._recorded = True
        await log.append(record, self._entry)  # is written though this is cancelled

    async def _known(self) -> Record:
        return await self.facts.record(self.gateway.versions, texts=self.gateway.settings.audit_log.texts)

    async def _record_at_last(self) -> None:
        """Of a request that failed, or whose client left: a failure of the log's own can only be logged."""
        try:
            await self._record()
        except VLMGuardError as error:
            self.gateway.log_fault(error, self.facts.request_id)

    def _own_headers(self) -> list[tuple[bytes, bytes]]:
        own = [(b"x-request-id", self.facts.request_id.encode())]
        return own + self.facts.headers() if self.gateway.settings.policy.response_headers else own
