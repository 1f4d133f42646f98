"""The audit log's database: SQLite or PostgreSQL, its tables, and what keeps them append-only.

    vlmguard_requests   a row for each request that ended, and one for each that began and was told so (`begun` = 1)
    vlmguard_texts      what users wrote, where that is recorded; apart, so that it can go earlier
    vlmguard_purging    has a row only inside a transaction that may delete
    vlmguard_schema     the version of these tables

Triggers refuse every UPDATE, and a DELETE unless its own transaction has put a row into vlmguard_purging: nobody else
ever sees that row. They stop mistakes, not somebody who owns the database: keep the file to the gateway's user. A
gateway's PostgreSQL role needs, once the tables are made, SELECT and INSERT on all of them, UPDATE on vlmguard_schema,
and for texts that expire DELETE on vlmguard_texts and vlmguard_purging.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import sqlalchemy as sa

VERSION: Final = 1
ADVISORY_LOCK: Final = 0x766C6D67  # "vlmg": two workers that start at once make the tables once

metadata = sa.MetaData()
requests: Final = sa.Table(
    "vlmguard_requests",
    metadata,
    sa.Column("entry", sa.Text, primary_key=True),  # ours, in order of time; a caller may send one request id twice
    sa.Column("begun", sa.SmallInteger, primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("stream", sa.SmallInteger, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("action", sa.Text, nullable=False),
    sa.Column("mode", sa.Text, nullable=False),
    sa.Column("images", sa.Text, nullable=False),
    sa.Column("risk", sa.Double),
    sa.Column("threshold", sa.Double),
    sa.Column("category", sa.Text),
    sa.Column("note", sa.Text),
    sa.Column("guard_ms", sa.Double),
    sa.Column("first_byte_ms", sa.Double),
    sa.Column("total_ms", sa.Double),
    sa.Column("prompt_tokens", sa.BigInteger),
    sa.Column("completion_tokens", sa.BigInteger),
    sa.Column("versions", sa.Text, nullable=False),
    sqlite_with_rowid=False,
)
texts: Final = sa.Table(
    "vlmguard_texts",
    metadata,
    sa.Column("entry", sa.Text, primary_key=True),
    sa.Column("time", sa.Double, nullable=False),
    sa.Column("original", sa.Text, nullable=False),
    sa.Column("sent", sa.Text),
    sa.Column("answer", sa.Text),
    sqlite_with_rowid=False,
)
purging: Final = sa.Table("vlmguard_purging", metadata, sa.Column("one", sa.Integer, primary_key=True))
schema: Final = sa.Table(
    "vlmguard_schema",
    metadata,
    sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("beat", sa.Double),  # the last time that a gateway tried whether the log can be written
)
sa.Index("vlmguard_requests_time", requests.c.time, requests.c.entry)
sa.Index("vlmguard_texts_time", texts.c.time)

SQLITE_TRIGGERS: Final = (
    """
    CREATE TRIGGER {table}_no_replace BEFORE INSERT ON {table} WHEN EXISTS (SELECT 1 FROM {table} WHERE {same})
    BEGIN SELECT RAISE(IGNORE); END
    """,
    """
    CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table}
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END
    """,
    """
    CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table} WHEN NOT EXISTS (SELECT 1 FROM vlmguard_purging)
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only: use vlmguard audit-log purge'); END
    """,
)
POSTGRESQL_FUNCTION: Final = """
    CREATE OR REPLACE FUNCTION vlmguard_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF TG_OP = 'DELETE' THEN
            IF EXISTS (SELECT 1 FROM vlmguard_purging) THEN RETURN OLD; END IF;
        END IF;
        RAISE EXCEPTION 'the audit log is append-only: use vlmguard audit-log purge';
    END $$
    """
POSTGRESQL_TRIGGERS: Final = (
    """
    CREATE TRIGGER {table}_append_only BEFORE UPDATE OR DELETE ON {table}
    FOR EACH ROW EXECUTE FUNCTION vlmguard_append_only()
    """,
    """
    CREATE TRIGGER {table}_no_truncate BEFORE TRUNCATE ON {table}
    FOR EACH STATEMENT EXECUTE FUNCTION vlmguard_append_only()
    """,
)


def make(connection: sa.Connection) -> None:
    """Makes the tables, unless another worker was faster."""
    with writing(connection):
        is_postgresql = connection.dialect.name == "postgresql"
        if is_postgresql:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(ADVISORY_LOCK)))
        if sa.inspect(connection).has_table(schema.name):
            return
        metadata.create_all(connection, checkfirst=False)
        connection.execute(sa.insert(schema).values(version=VERSION))
        if is_postgresql:
            connection.exec_driver_sql(POSTGRESQL_FUNCTION)
        for table in (requests, texts):
            for trigger in POSTGRESQL_TRIGGERS if is_postgresql else SQLITE_TRIGGERS:
                same = " AND ".join(f"{key.name} = NEW.{key.name}" for key in table.primary_key)
                connection.exec_driver_sql(trigger.format(table=table.name, same=same))


@contextmanager
def writing(connection: sa.Connection) -> Iterator[None]:
    """A transaction that has the right to write from its beginning, so that it can't lose it half-way."""
    with connection.begin():
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield


def insertion(engine: sa.Engine, table: sa.Table) -> str:
    """The INSERT of rows in the order of the table's columns; one that is repeated changes nothing.

    It goes to the driver as it is: SQLAlchemy's own form of it costs a request half as much again.
    """
    mark = "?" if engine.dialect.name == "sqlite" else "%s"
    names = ", ".join(column.name for column in table.columns)
    marks = ", ".join(mark for _ in table.columns)
    return f"INSERT INTO {table.name} ({names}) VALUES ({marks}) ON CONFLICT DO NOTHING"
