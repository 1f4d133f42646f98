"""Reads the audit log, and takes old rows out of it. None of it needs a gateway that runs, nor disturbs one.

Everything goes in pages of rows: a long read would keep SQLite from tidying its write-ahead log, a long deletion would
keep the gateway from writing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import SQLAlchemyError

from vlmguard.gateway.audit_database import explained
from vlmguard.gateway.audit_record import Action, Record, record_of
from vlmguard.gateway.audit_tables import purging, requests, texts, writing

PAGE: Final = 500
BREATH_SECONDS: Final = 0.01  # between two pages of a deletion, in which a gateway that waits for the lock gets it


@dataclass(frozen=True)
class Wanted:
    """Which records; None is any. Times are in seconds since 1970: since <= time < until."""

    since: float | None = None
    until: float | None = None
    action: Action | None = None
    category: str | None = None
    key: str | None = None
    route: str | None = None
    request_id: str | None = None

    def conditions(self) -> list[sa.ColumnElement[bool]]:
        table = requests.c
        ended = requests.alias()
        has_ended = sa.exists().where(ended.c.entry == table.entry, ended.c.begun == 0)
        equal = {
            table.action: self.action,
            table.category: self.category,
            table.key_id: self.key,
            table.route: self.route,
            table.request_id: self.request_id,
        }
        return [
            sa.or_(table.begun == 0, ~has_ended),
            *([table.time >= self.since] if self.since is not None else []),
            *([table.time < self.until] if self.until is not None else []),
            *(column == value for column, value in equal.items() if value is not None),
        ]


def records(
    engine: sa.Engine,
    wanted: Wanted | None = None,
    *,
    limit: int | None = None,
    newest_first: bool = False,
    with_texts: bool = False,
) -> Iterator[Record]:
    """The records in order of time, of any number at constant memory; what is recorded meanwhile may be among them.

    A request that has begun and not ended is one with the action `begun`. Raises AuditLogError.
    """
    query = _query(wanted or Wanted(), newest_first, with_texts)
    place = sa.tuple_(requests.c.time, requests.c.entry)
    after: tuple[float, str] | None = None
    left = limit
    try:
        with engine.connect() as connection:
            while left is None or left > 0:
                size = PAGE if left is None else min(PAGE, left)
                page = query.limit(size)
                if after is not None:
                    page = page.where(place < sa.tuple_(*after) if newest_first else place > sa.tuple_(*after))
                rows = [row._asdict() for row in connection.execute(page)]
                connection.rollback()  # no transaction stays open while the caller works
                yield from map(record_of, rows)
                if len(rows) < size:
                    return
                after = rows[-1]["time"], rows[-1]["entry"]
                left = None if left is None else left - size
    except SQLAlchemyError as error:
        raise explained(error, engine) from None


def purge(engine: sa.Engine, before: float) -> int:
    """Deletes the requests that came before that time, with their texts; gives their number. Raises AuditLogError."""
    old = sa.select(requests.c.entry).where(requests.c.time < before).order_by(requests.c.time, requests.c.entry)
    return _delete(engine, old, (texts, requests))


def expire_texts(engine: sa.Engine, before: float) -> int:
    """Deletes the texts of requests that came before that time, not their records; gives their number.

    Raises AuditLogError.
    """
    old = sa.select(texts.c.entry).where(texts.c.time < before).order_by(texts.c.time)
    return _delete(engine, old, (texts,))


def _query(wanted: Wanted, newest_first: bool, with_texts: bool) -> sa.Select[Any]:
    columns: list[Any] = [*requests.c]
    source: sa.FromClause = requests
    if with_texts:
        columns += [texts.c.original, texts.c.sent, texts.c.answer]
        source = requests.outerjoin(texts, sa.and_(texts.c.entry == requests.c.entry, requests.c.begun == 0))
    order = [column.desc() if newest_first else column for column in (requests.c.time, requests.c.entry)]
    return sa.select(*columns).select_from(source).where(*wanted.conditions()).order_by(*order)


def _delete(engine: sa.Engine, old: sa.Select[Any], tables: tuple[sa.Table, ...]) -> int:
    deleted = 0
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA secure_delete = ON")  # overwritten, not only forgotten
                connection.rollback()
            while entries := _delete_page(connection, old, tables):
                deleted += entries
                time.sleep(BREATH_SECONDS)
            if deleted and engine.dialect.name == "sqlite":
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")  # what is gone lies in no other file
    except SQLAlchemyError as error:
        raise explained(error, engine) from None
    return deleted


def _delete_page(connection: sa.Connection, old: sa.Select[Any], tables: tuple[sa.Table, ...]) -> int:
    with writing(connection):
        entries = set(connection.execute(old.limit(PAGE)).scalars())
        if entries:
            connection.execute(sa.insert(purging).values(one=1))
            for table in tables:
                connection.execute(sa.delete(table).where(table.c.entry.in_(entries)))
            connection.execute(sa.delete(purging))
    return len(entries)
