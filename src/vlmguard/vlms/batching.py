"""One worker thread for one model; calls that wait and have equal arguments run as one batch.

The worker starts with the first job and ends soon after the last, so it belongs to no event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, Protocol, Self

from vlmguard.errors import TargetError

LINGER_SECONDS = 0.2  # a worker without work stays this long: threads have pools of their own to warm up


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
    """Run jobs one batch at a time; kinds of jobs take turns.

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
        self._closing = False

    def submit(self, job: Job) -> None:
        with self._changed:
            self._inbox.append(job)
            self._changed.notify_all()
            if self._worker is None:
                # Not a daemon: Python would end it inside torch at exit, which aborts the process.
                self._worker = threading.Thread(target=self._work, name="vlmguard-model")
                self._worker.start()

    async def do(self, job: Job) -> Any:
        """Submit a job and wait for it; cancelling the wait cancels the job."""
        self.submit(job)
        return await asyncio.wrap_future(job.future)

    async def aclose(self) -> None:
        """Fail what waits and wait for the batch that runs. A later job starts another worker."""
        with self._changed:
            worker, self._closing = self._worker, True
            self._changed.notify_all()
        if worker is not None:
            await asyncio.to_thread(worker.join)
        self._closing = False

    def _work(self) -> None:
        waiting: dict[Hashable, list[Job]] = {}
        while waiting or self._arrived():
            for key, job in self._prepared(company=not waiting):
                waiting.setdefault(key, []).append(job)
            if not waiting:
                continue
            key = next(iter(waiting))
            jobs = [job for job in waiting.pop(key) if not job.future.cancelled()]
            if self._closing:
                _fail(jobs, TargetError("the model was closed"))
                continue
            if len(jobs) > self.max_batch:
                waiting[key] = jobs[self.max_batch :]  # behind the other kinds
            if jobs:
                _run(jobs[: self.max_batch])

    def _arrived(self) -> bool:
        """Whether a job is there, or comes within a while; else the worker is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._inbox) or self._closing, LINGER_SECONDS)
            if not self._inbox:
                self._worker = None
            return bool(self._inbox)

    def _prepared(self, company: bool) -> list[tuple[Hashable, Job]]:
        """The jobs of the inbox with their keys; with `company` it gives more of them a moment to arrive."""
        with self._changed:
            if company:
                self._changed.wait_for(lambda: len(self._inbox) >= self.max_batch, self.wait_seconds)
            jobs, self._inbox = self._inbox, []
        return [(key, job) for job in jobs if (key := _prepare(job)) is not None]


def _prepare(job: Job) -> Hashable:
    if job.future.cancelled():
        return None
    try:
        key = job.prepare()
        hash(key)  # a processor without a hash is its caller's error, not the worker's
    except BaseException as error:  # noqa: BLE001 - as an executor does: the caller gets it, whatever it is
        settle(job.future, error=error)
        return None
    return key


def _run(batch: list[Job]) -> None:
    try:
        batch[0].run(batch)
    except BaseException as error:  # noqa: BLE001 - as above
        _fail(batch, error)


def _fail(jobs: Sequence[Job], error: BaseException) -> None:
    for job in jobs:
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
