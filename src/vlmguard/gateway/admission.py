"""How many requests are worked on at once, and how many may wait for it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from types import TracebackType

from vlmguard.errors import RateLimited


class Admission:
    """A place for each request that is worked on, and a queue for it: `async with admission: ...`.

    Who came first gets the next place. A process counts its own requests: with several workers each has as many places.

    Args:
        concurrent: places.
        waiting: in the queue at most; 0 for no queue.
        wait_seconds: in the queue at most.
    """

    def __init__(self, concurrent: int, waiting: int, wait_seconds: float) -> None:
        self.concurrent = concurrent
        self.most_waiting = waiting
        self.wait_seconds = wait_seconds
        self._running = 0
        self._queue: OrderedDict[asyncio.Future[None], None] = OrderedDict()
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    @property
    def running(self) -> int:
        return self._running

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def draining(self) -> bool:
        return self._draining

    async def __aenter__(self) -> None:
        """Raises RateLimited where the queue is full, the wait is over, or the gateway is draining."""
        if self._draining:
            raise self._refusal("the gateway is shutting down")
        if self._running < self.concurrent:
            self._running += 1
            self._idle.clear()
            return
        if len(self._queue) >= self.most_waiting:
            raise self._refusal("the gateway is busy, and its queue is full")
        await self._wait()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave()

    async def drain(self) -> None:
        """Lets nobody in any more, and waits until all who were in or waiting are done."""
        self._draining = True
        await self._idle.wait()

    async def _wait(self) -> None:
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        self._queue[place] = None
        too_long = loop.call_later(self.wait_seconds, self._expire, place)
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._queue.pop(place, None)
            elif place.exception() is None:  # the place came in the same moment: it goes to the next
                self._leave()
            raise
        finally:
            too_long.cancel()

    def _expire(self, place: asyncio.Future[None]) -> None:
        if not place.done():
            del self._queue[place]
            place.set_exception(self._refusal(f"the gateway is busy: no place in {self.wait_seconds:g} s"))

    def _leave(self) -> None:
        """Hands the place to the first who still waits."""
        while self._queue:
            place, _ = self._queue.popitem(last=False)
            if not place.done():
                place.set_result(None)
                return
        self._running -= 1
        if not self._running:
            self._idle.set()

    def _refusal(self, why: str) -> RateLimited:
        # within that time all who wait now have got in or gone
        return RateLimited(why, "Try again later.", retry_after=max(1.0, self.wait_seconds))
