"""Opens the audit log's database from its URL, and says in our words what is wrong with it."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, InterfaceError, NoSuchModuleError, OperationalError, SQLAlchemyError

from vlmguard.errors import AuditLogError, ConfigError, VLMGuardError, missing_extra
from vlmguard.gateway.audit_tables import VERSION, make, schema

PATIENCE_SECONDS: Final = 10.0
OWNERS_ALONE: Final = 0o600
SYNCHRONOUS: Final = ("normal", "full")
SAID_CHARACTERS: Final = 300
EXAMPLES: Final = "Use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME."
# What a database's code for an error begins with, what it means, and what to do.
PROBLEMS: Final = (
    (("SQLITE_FULL", "53100"), "has no room left on its disk", "Free some, or purge old records."),
    (("SQLITE_BUSY", "SQLITE_LOCKED", "55P03", "57014"), "is locked", "Close what holds it open for writing."),
    (("SQLITE_NOTADB", "SQLITE_CORRUPT"), "is no audit log, or damaged", "Move it away and start a new one."),
    (
        ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "42501"),
        "can't be opened or written",
        "Check its permissions.",
    ),
    (("SQLITE_IOERR", "58030"), "can't be written to its disk", "Check the disk."),
)
# A server that has gone without a word is given up in about patience's time, not in the system's two hours.
CONNECTION: Final = {
    "connect_timeout": "3",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}


def open_engine(url: str, *, create: bool, patience: float = PATIENCE_SECONDS) -> sa.Engine:
    """The database, its tables checked; `create` makes what is missing.

    Args:
        url: sqlite:///FILE, with ?synchronous=full to survive a power cut too, or postgresql://USER@HOST/NAME.
        patience: seconds that a lock of somebody else's is waited for.

    Raises:
        ConfigError: the URL is wrong, or the tables are of another version. AuditLogError: it cannot be opened.
    """
    engine = _engine(_parsed(url), create, patience)
    try:
        _prepare(engine, create, time.monotonic() + patience)
    except SQLAlchemyError as error:
        engine.dispose()
        raise explained(error, engine) from None
    except VLMGuardError:
        engine.dispose()
        raise
    return engine


def passing(error: SQLAlchemyError) -> bool:
    """Whether another attempt may go better: the server is away, or busy. SQLite has waited for its lock already."""
    return isinstance(error, OperationalError | InterfaceError) and not isinstance(error.orig, sqlite3.Error)


def explained(error: SQLAlchemyError, engine: sa.Engine) -> AuditLogError:
    """What went wrong in words of ours: a database's own may quote what was to be written."""
    place, cause = place_of(engine), getattr(error, "orig", None)
    code = getattr(cause, "sqlite_errorname", None) or getattr(cause, "sqlstate", None)
    name = code or type(cause or error).__name__
    for codes, problem, remedy in PROBLEMS:
        if name.startswith(codes):
            return AuditLogError(f"the audit log {place} {problem}", remedy)
    if not passing(error):
        return AuditLogError(f"the audit log {place} can't be used ({name})", "The database's own log may say more.")
    if code is None:  # about the connection, so it quotes nothing that was to be written
        name = " ".join(str(cause).split())[:SAID_CHARACTERS]
    return AuditLogError(f"the audit log {place} can't be reached: {name}", "See that its server runs, and its URL.")


def file_of(engine: sa.Engine) -> tuple[int, int] | None:
    """Which file stands at the log's path: one that is moved away would go on being written. None for a server."""
    if engine.dialect.name != "sqlite":
        return None
    try:
        found = Path(str(engine.url.database)).stat()
    except OSError:
        return (0, 0)
    return found.st_dev, found.st_ino


def place_of(engine: sa.Engine) -> str:
    """Where the log is, without a password."""
    url = engine.url
    return str(url.database) if engine.dialect.name == "sqlite" else f"{url.host or 'localhost'}/{url.database}"


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError("the audit log's URL cannot be read", EXAMPLES) from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        return parsed.set(drivername="sqlite+pysqlite")
    if parsed.drivername in ("postgresql", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    raise ConfigError(f"the audit log cannot be kept in {parsed.drivername}", EXAMPLES)


def _engine(url: sa.URL, create: bool, patience: float) -> sa.Engine:
    if url.drivername == "sqlite+pysqlite":
        return _sqlite(url, create, patience)
    url = url.set(query={**CONNECTION, **url.query, "client_encoding": "utf8"})
    try:
        engine = sa.create_engine(url, hide_parameters=True, poolclass=sa.NullPool)
    except (ImportError, NoSuchModuleError):
        raise missing_extra("psycopg", "postgresql") from None

    @sa.event.listens_for(engine, "connect")
    def _bounded(connection: Any, _: object) -> None:
        connection.execute(f"SET statement_timeout = {int(patience * 1000)}")
        connection.commit()

    return engine


def _sqlite(url: sa.URL, create: bool, patience: float) -> sa.Engine:
    synchronous = str(url.query.get("synchronous", "normal")).lower()
    if synchronous not in SYNCHRONOUS:
        raise ConfigError.wrong("synchronous in the audit log's URL", expected="normal or full", got=synchronous)
    if unknown := sorted(set(url.query) - {"synchronous"}):
        raise ConfigError(f"the audit log's URL has an unknown option: {unknown[0]}", "Known is synchronous.")
    if not url.database or ":memory:" in url.database:
        raise ConfigError("the audit log needs a file: one in memory is lost", EXAMPLES)
    path = Path(url.database).absolute()
    _file(path, create)
    engine = sa.create_engine(
        url.set(database=str(path), query={}),
        connect_args={"timeout": patience},
        hide_parameters=True,
        poolclass=sa.NullPool,
    )

    @sa.event.listens_for(engine, "connect")
    def _set(connection: sqlite3.Connection, _: object) -> None:
        connection.isolation_level = None  # transactions begin where `writing` says so
        connection.execute(f"PRAGMA synchronous = {synchronous}")

    return engine


def _file(path: Path, create: bool) -> None:
    if path.is_file():
        return
    if not create:
        raise AuditLogError(f"there is no audit log at {path}", "Name another with --url or --config.")
    try:
        path.touch(OWNERS_ALONE)
    except OSError as error:
        raise AuditLogError(f"the audit log {path} cannot be made: {error.strerror}", "Make its folder.") from None


def _prepare(engine: sa.Engine, create: bool, deadline: float) -> None:
    with engine.connect() as connection:
        if engine.dialect.name == "postgresql":
            _check_encoding(connection)
        elif create:
            _write_ahead(connection, deadline)
        if not sa.inspect(connection).has_table(schema.name):
            if not create:
                raise AuditLogError(
                    f"there is no audit log in {place_of(engine)}", "Name another with --url or --config."
                )
            connection.rollback()
            make(connection)
        version = connection.execute(sa.select(sa.func.max(schema.c.version))).scalar()
        connection.rollback()
    if version != VERSION:
        raise ConfigError(
            f"the audit log {place_of(engine)} has tables of version {version}, this vlmguard reads version {VERSION}",
            "Use the vlmguard that wrote it, or start a new log.",
        )


def _check_encoding(connection: sa.Connection) -> None:
    """A caller's name of a model in another script must not make a whole batch fail."""
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar()
    if encoding not in ("UTF8", "SQL_ASCII"):
        raise ConfigError.wrong("the database's encoding", expected="UTF8", got=encoding)


def _write_ahead(connection: sa.Connection, deadline: float) -> None:
    """Readers don't block the writer in WAL mode, and a commit is one write. Going over to it does not wait for a lock."""
    while True:
        try:
            mode = connection.exec_driver_sql("PRAGMA journal_mode = WAL").scalar()
        except OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
            continue
        if mode != "wal":
            raise ConfigError(f"SQLite can't use a write-ahead log there, only {mode!r}", "Put it on a local disk.")
        return
