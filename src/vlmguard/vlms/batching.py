"""One worker thread for one model; calls that wait and have equal arguments run as one batch.

The worker starts with the first job and ends when none is left, so it belongs to no event loop and needs no
closing.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol, Self


class Job(Protocol):
    """A call that waits for the model. A cancelled `future` means: don't run me, or stop."""

    future: Future[Any]

    def prepare(self) -> Hashable:
        """Make the model's inputs; jobs whose answers are equal may run together."""
        ...

    def run(self, batch: Sequence[Self]) -> None:
        """Run the whole batch, of which this is the first, and settle every future in it."""
        ...


class Batcher:
    """Run jobs one batch at a time, in the order of the first job of each.

    Args:
        max_batch: rows a batch.
        wait_seconds: how long the first job waits for company.
    """

    def __init__(self, max_batch: int = 8, wait_seconds: float = 0.005) -> None:
        self.max_batch = max_batch
        self.wait_seconds = wait_seconds
        self._inbox: list[Job] = []
        self._changed = threading.Condition()
        self._worker: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        with self._changed:
            self._inbox.append(job)
            self._changed.notify_all()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="vlmguard-model", daemon=True)
                self._worker.start()

    async def do(self, job: Job) -> Any:
        """Submit a job and wait for it; cancelling the wait cancels the job."""
        self.submit(job)
        return await asyncio.wrap_future(job.future)

    async def aclose(self) -> None:
        """Cancel what waits and wait until the worker is done."""
        with self._changed:
            worker = self._worker
            for job in self._inbox:
                job.future.cancel()
        if worker is not None and worker is not threading.current_thread():
            await asyncio.to_thread(worker.join)

    def _work(self) -> None:
        waiting: list[tuple[Hashable, Job]] = []
        while True:
            waiting += self._arrivals(idle=not waiting)
            waiting = [(key, job) for key, job in waiting if not job.future.cancelled()]
            if waiting:
                batch = [job for key, job in waiting if key == waiting[0][0]][: self.max_batch]
                waiting = [(key, job) for key, job in waiting if job not in batch]
                _run(batch)
                continue
            with self._changed:
                if not self._inbox:
                    self._worker = None
                    return

    def _arrivals(self, idle: bool) -> list[tuple[Hashable, Job]]:
        """The prepared jobs of the inbox; when nothing else waits, give others a moment to arrive."""
        with self._changed:
            if idle and self._inbox:
                until = time.monotonic() + self.wait_seconds
                while len(self._inbox) < self.max_batch and (left := until - time.monotonic()) > 0:
                    self._changed.wait(left)
            jobs, self._inbox = self._inbox, []
        return [(key, job) for job in jobs if (key := _prepare(job)) is not None]


def _prepare(job: Job) -> Hashable:
    if job.future.cancelled():
        return None
    try:
        return job.prepare()
    except BaseException as error:  # noqa: BLE001 - as an executor does: the caller gets it, whatever it is
        settle(job.future, error=error)
        return None


def _run(batch: list[Job]) -> None:
    try:
        batch[0].run(batch)
    except BaseException as error:  # noqa: BLE001 - as above
        for job in batch:
            settle(job.future, error=error)


def settle(future: Future[Any], result: Any = None, error: BaseException | None = None) -> None:
    """Give a future its outcome, unless it has one or its caller has gone."""
    with suppress(InvalidStateError):
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


class Task:
    """A job that runs a function alone."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.future: Future[Any] = Future()
        self._function = function

    def prepare(self) -> Hashable:
        return self

    def run(self, batch: Sequence[Task]) -> None:
        settle(self.future, self._function())
