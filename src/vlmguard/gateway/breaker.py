"""A rewriter that fails again and again is left alone for a while, and none is waited for too long.

    closed --failures in a row--> open --seconds--> half-open: one call tries --> closed, or open again

What an open circuit raises is of the kind that opened it, so the policy treats it as it treats that failure; where the
rewriter's server had refused the key, it stays a refused key, on which no policy opens the guard (F026).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal, TypeAlias, TypeVar

from vlmguard.chat import Chat
from vlmguard.errors import BadAnswer, BadRequest, RateLimited, Timeout, Upstream, VLMGuardError
from vlmguard.guards.policy import OPERATORS_OWN
from vlmguard.rewriter.protocol import Rewrite
from vlmguard.rewriter.rewriter import Rewriter

State: TypeAlias = Literal["closed", "open", "half-open"]
T = TypeVar("T")

REMEDY: Final = "See to the rewriter's server; it is tried again by itself."
_ends: ContextVar[float | None] = ContextVar("vlmguard_guard_ends", default=None)  # on the event loop's clock


class Breaker:
    """Round the calls of one service.

    It counts what tells of the service: no answer in time, an error of its own (5xx, or no connection), too many
    requests, an answer that cannot be read. It does not count what tells of a request.

    Args:
        failures: in a row, until it opens.
        seconds: that it stays open.
        clock: monotonic seconds.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.failures = failures
        self.seconds = seconds
        self._clock = clock
        self._in_a_row = 0
        self._cause: VLMGuardError | None = None  # of the failures since the last success
        self._until: float | None = None  # when one call may try; None while closed
        self._trying = False
        self._round = 0  # a call that began before the circuit opened or closed says nothing about it any more

    @property
    def state(self) -> State:
        if self._until is None:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    async def __call__(self, call: Callable[[], Awaitable[T]]) -> T:
        """What the call gives or raises; while open, at once an error of the kind that opened it (Upstream: 503)."""
        begun = self._enter()
        try:
            result = await call()
        except (VLMGuardError, TimeoutError) as error:
            if begun == self._round:
                self._failed(error)
            raise
        finally:
            if begun == self._round:
                self._trying = False
        if begun == self._round:
            self._answered()
        return result

    def _enter(self) -> int:
        if self._until is not None:
            if self._trying or self._clock() < self._until:
                raise self._refusal(self._until)
            self._trying = True
        return self._round

    def _failed(self, error: VLMGuardError | TimeoutError) -> None:
        if isinstance(error, BadRequest):
            return  # the service may never have been asked
        if isinstance(error, OPERATORS_OWN):
            self._cause = error
        elif _is_of_the_service(error):
            if not isinstance(self._cause, OPERATORS_OWN):
                self._cause = error if isinstance(error, VLMGuardError) else Timeout("it did not answer in time")
            self._in_a_row += 1
            if self._trying or self._in_a_row >= self.failures:
                self._turn(self._clock() + self.seconds)
        else:
            self._answered()

    def _answered(self) -> None:
        self._cause = None
        self._in_a_row = 0
        if self._until is not None:
            self._turn(None)

    def _turn(self, until: float | None) -> None:
        """Opens, or closes with None."""
        self._until = until
        self._round += 1
        self._in_a_row = 0
        self._trying = False

    def _refusal(self, until: float) -> VLMGuardError:
        left = max(0.0, until - self._clock())
        what = f"the rewriter failed again and again ({type(self._cause).__name__}) and is left alone for {left:.0f} s"
        for kind in (*OPERATORS_OWN, Timeout):
            if isinstance(self._cause, kind):
                return kind(what, REMEDY)
        if isinstance(self._cause, RateLimited):
            return RateLimited(what, REMEDY, retry_after=left)
        return Upstream(what, REMEDY, status=503)


def _is_of_the_service(error: VLMGuardError | TimeoutError) -> bool:
    if isinstance(error, Upstream):
        return error.status is None or error.status >= 500
    return isinstance(error, Timeout | TimeoutError | RateLimited | BadAnswer)


@contextmanager
def shared_seconds(seconds: float) -> Iterator[None]:
    """All calls of guarded rewriters inside have these seconds together: a guard judges, rewrites and judges again."""
    token = _ends.set(asyncio.get_running_loop().time() + seconds)
    try:
        yield
    finally:
        _ends.reset(token)


class GuardedRewriter:
    """A rewriter with a circuit breaker and a deadline.

    Args:
        seconds: for one call, and less where `shared_seconds` leaves less.
    """

    def __init__(self, rewriter: Rewriter, breaker: Breaker, seconds: float) -> None:
        self.rewriter = rewriter
        self.breaker = breaker
        self.seconds = seconds

    @property
    def name(self) -> str:
        return self.rewriter.name

    @property
    def threshold(self) -> float:
        return self.rewriter.threshold

    async def judge(self, chat: Chat) -> Rewrite:
        """Raises Timeout after the deadline; while the circuit is open, its error."""
        return await self._asked(lambda: self.rewriter.judge(chat))

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        """Raises Timeout after the deadline; while the circuit is open, its error."""
        return await self._asked(lambda: self.rewriter(chat, verdict))

    async def aclose(self) -> None:
        await self.rewriter.aclose()

    async def _asked(self, call: Callable[[], Awaitable[Rewrite]]) -> Rewrite:
        now, shared = asyncio.get_running_loop().time(), _ends.get()
        ends = now + self.seconds if shared is None else min(shared, now + self.seconds)
        if ends <= now:
            raise self._late()
        return await self.breaker(lambda: self._in_time(call, ends))

    async def _in_time(self, call: Callable[[], Awaitable[Rewrite]], ends: float) -> Rewrite:
        try:
            async with asyncio.timeout_at(ends):
                return await call()
        except TimeoutError as error:  # of a rewriter that does not translate it, too (F027)
            raise self._late() from error

    def _late(self) -> Timeout:
        remedy = "Give it more seconds, or a faster machine."
        return Timeout(f"the rewriter did not answer in {self.seconds:g} s", remedy)
