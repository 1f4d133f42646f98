"""The audit log: a row for each request, which is durable when `append` returns.

    append --row--> queue --one thread, all that waits in one transaction--> database --> the appenders go on

A kill -9 of the process loses no record whose `append` returned: a commit has handed its pages to the system. A power
cut may lose SQLite's last commits, not damage the file: `synchronous` is normal, which waits for the disk only when the
write-ahead log is copied into the file, since a wait at every commit costs each request milliseconds of a disk's time.
Who wants it nevertheless adds ?synchronous=full to the URL. PostgreSQL waits, unless its operator has set it otherwise.

A request that a kill would catch half-way is on record too where `begin` was awaited before it went to the target:
its row says `begun` until it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Final, NamedTuple, Self

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from vlmguard.errors import AuditLogError
from vlmguard.gateway.audit_database import (
    PATIENCE_SECONDS,
    explained,
    file_of,
    open_engine,
    passing,
    place_of,
)
from vlmguard.gateway.audit_record import Action, ImageFacts, Record, Texts, row_of, texts_row
from vlmguard.gateway.audit_rows import expire_texts
from vlmguard.gateway.audit_tables import insertion, requests, schema, texts, writing

__all__ = ["Action", "AuditLog", "AuditLogError", "ImageFacts", "Record", "Texts"]

BATCH: Final = 256  # records in one transaction, so that the first of them doesn't wait long for the last
MAX_WAITING: Final = 20_000
BACK_OFF_SECONDS: Final = (0.05, 0.1, 0.2, 0.5, 1.0)  # between attempts; the last one goes on
IDLE_SECONDS: Final = 10.0  # after which it is tried whether the log can still be written
DOWN_SECONDS: Final = 1.0  # the same for a log that could not be
DAY_SECONDS: Final = 86_400
STOPPED: Final = "the audit log's writer has stopped", "Start the gateway again; its log says what happened."


class Waiting(NamedTuple):
    """A record on its way, and who waits for it."""

    row: tuple[Any, ...]
    texts: tuple[Any, ...] | None
    done: asyncio.Future[None]


class AuditLog:
    """A log that this process appends to; others may append to it at the same time."""

    def __init__(self, engine: sa.Engine, retention_days: float, patience: float) -> None:
        """Of the running event loop; use `open`."""
        self.engine, self.retention_days, self.patience = engine, retention_days, patience
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[Waiting | None] = SimpleQueue()
        self._closed = False
        self._healthy = True
        self._connection: sa.Connection | None = None
        self._file = file_of(engine)
        self._inserts = insertion(engine, requests), insertion(engine, texts)
        self._process, self._count = os.urandom(4).hex(), itertools.count()
        self._thread = threading.Thread(target=self._run, name="audit-log", daemon=True)

    @classmethod
    async def open(cls, url: str, *, retention_days: float = 30, patience: float = PATIENCE_SECONDS) -> Self:
        """Opens the log, and makes it where there is none.

        Args:
            url: see `open_engine`.
            retention_days: how long `expire_texts` leaves texts.
            patience: how many seconds an append waits for a locked or absent database before it fails.

        Raises:
            ConfigError: the URL is wrong, or another version's log is there. AuditLogError: it cannot be opened.
        """
        engine = await asyncio.to_thread(open_engine, url, create=True, patience=patience)
        log = cls(engine, retention_days, patience)
        log._thread.start()
        return log

    @property
    def waiting(self) -> int:
        """Records that are not yet durable."""
        return self._queue.qsize()

    @property
    def healthy(self) -> bool:
        """Whether the last write went well; a log that failed is tried every second."""
        return self._healthy and self._thread.is_alive()

    async def begin(self, record: Record) -> str:
        """Records that a request is about to reach the target; gives what `append` takes when it has ended.

        Its action is set down as `begun`, its texts are not recorded yet. Raises AuditLogError.
        """
        entry = self._entry()
        await self._put(row_of(record, entry, begun=True), None)
        return entry

    async def append(self, record: Record, entry: str | None = None) -> None:
        """Records a request that has ended; returns when the record is durable. It is written though this is cancelled.

        Raises AuditLogError: the record is not in the log.
        """
        entry = entry or self._entry()
        written = texts_row(record, record.texts, entry) if record.texts else None
        await self._put(row_of(record, entry, begun=False), written)

    async def expire_texts(self) -> int:
        """Removes the texts that are older than the retention; their records stay. For every hour or so."""
        before = time.time() - self.retention_days * DAY_SECONDS
        return await asyncio.to_thread(expire_texts, self.engine, before)

    async def aclose(self) -> None:
        """Writes what waits, then closes; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self.engine.dispose()

    def _entry(self) -> str:
        """A key that no other process has, in order of time, so that new rows lie together."""
        return f"{time.time_ns():016x}{self._process}{next(self._count):x}"

    def _put(self, row: tuple[Any, ...], written: tuple[Any, ...] | None) -> asyncio.Future[None]:
        if self._closed:
            raise AuditLogError("the audit log is closed")
        if not self._thread.is_alive():
            raise AuditLogError(*STOPPED)
        if self._queue.qsize() >= MAX_WAITING:
            raise AuditLogError(
                f"{MAX_WAITING:,} records wait to be written", "The database is too slow, or stands still."
            )
        waiting = Waiting(row, written, self._loop.create_future())
        self._queue.put(waiting)
        return waiting.done

    # From here on in the writer's thread.

    def _run(self) -> None:
        batch: list[Waiting] = []
        try:
            while batch := self._next():
                self._tell(_settle, [one.done for one in batch], self._written(batch))
        finally:
            self._drop_connection()
            self._tell(self._abandon, [one.done for one in batch])  # by a fault of ours: nobody waits for ever

    def _next(self) -> list[Waiting]:
        """All that waits, in order, as far as it fits one transaction; empty at the end."""
        first = self._first()
        batch = [] if first is None else [first]
        while batch and len(batch) < BATCH:
            try:
                one = self._queue.get_nowait()
            except Empty:
                break
            if one is None:
                self._queue.put(None)  # the end is for the next turn
                break
            batch.append(one)
        return batch

    def _first(self) -> Waiting | None:
        while True:
            try:
                return self._queue.get(timeout=IDLE_SECONDS if self._healthy else DOWN_SECONDS)
            except Empty:
                self._written([])

    def _written(self, batch: Sequence[Waiting]) -> AuditLogError | None:
        """Writes the batch in one transaction; an empty one tries whether the log can be written."""
        deadline = time.monotonic() + (self.patience if self._healthy else 0)  # known to be down: one attempt
        for pause in itertools.chain(BACK_OFF_SECONDS, itertools.repeat(BACK_OFF_SECONDS[-1])):
            try:
                self._write(batch)
            except SQLAlchemyError as error:
                self._drop_connection()
                if passing(error) and time.monotonic() + pause < deadline:
                    time.sleep(pause)
                    continue
                self._healthy = False
                return explained(error, self.engine)
            except AuditLogError as error:
                self._healthy = False
                return error
            self._healthy = True
            break
        return None

    def _write(self, batch: Sequence[Waiting]) -> None:
        if file_of(self.engine) != self._file:
            remedy = "Put it back, or stop the gateway before you move it."
            raise AuditLogError(f"the audit log {place_of(self.engine)} was moved or removed", remedy)
        if self._connection is None:
            self._connection = self.engine.connect()
        written = [one.texts for one in batch if one.texts is not None]
        with writing(self._connection):
            if not batch:
                self._connection.execute(sa.update(schema).values(beat=time.time()))
                return
            self._connection.exec_driver_sql(self._inserts[0], [one.row for one in batch])
            if written:
                self._connection.exec_driver_sql(self._inserts[1], written)

    def _drop_connection(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(SQLAlchemyError):
                connection.close()

    def _tell(self, what: Callable[..., None], *arguments: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(what, *arguments)

    # In the event loop's thread again.

    def _abandon(self, done: list[asyncio.Future[None]]) -> None:
        self._closed = True
        with suppress(Empty):
            while True:
                one = self._queue.get_nowait()
                done += [one.done] if one is not None else []
        _settle(done, AuditLogError(*STOPPED))


def _settle(done: Sequence[asyncio.Future[None]], error: AuditLogError | None) -> None:
    for future in done:
        if future.done():  # its appender was cancelled
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(AuditLogError(error.message, error.remedy))  # one each: a raised error keeps its trace
