"""Opening an audit log: which URLs name one, and what is said of the others."""

from __future__ import annotations

import asyncio
import sqlite3
import traceback
from pathlib import Path

import pytest

from tests.gateway.audit_logs import files, ids, opened, record
from vlmguard.errors import ConfigError
from vlmguard.gateway.audit_database import open_engine
from vlmguard.gateway.audit_log import AuditLog, AuditLogError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite3"


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("mysql://root@localhost/log", "cannot be kept in mysql"),
        ("postgresql+asyncpg://u:SECRET@localhost/log", "cannot be kept in postgresql"),
        ("audit.sqlite3", "URL cannot be read"),
        ("sqlite://", "needs a file"),
        ("sqlite:///:memory:", "needs a file"),
        ("sqlite:///log.sqlite3?synchronous=off", "expected normal or full, got 'off'"),
        ("sqlite:///log.sqlite3?mode=ro", "unknown option: mode"),
    ],
)
async def test_a_wrong_url_is_refused(url: str, problem: str, working_folder: Path) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        await AuditLog.open(url)
    assert "SECRET" not in "".join(traceback.format_exception(caught.value))
    assert files(working_folder / "log") == []


async def test_what_is_no_log_is_refused(path: Path) -> None:
    write(path, b"some text, and no database at all" * 100)
    with pytest.raises(AuditLogError, match="is no audit log, or damaged"):
        await AuditLog.open(f"sqlite:///{path}")
    with pytest.raises(AuditLogError, match="cannot be made: No such file"):
        await AuditLog.open(f"sqlite:///{path.parent}/no/folder.sqlite3")
    with pytest.raises(AuditLogError, match="there is no audit log at"):
        open_engine(f"sqlite:///{path.parent}/none.sqlite3", create=False)
    write(path.parent / "empty.sqlite3", b"")
    with pytest.raises(AuditLogError, match="there is no audit log in"):
        open_engine(f"sqlite:///{path.parent}/empty.sqlite3", create=False)


async def test_another_version_s_log_is_left_alone(path: Path) -> None:
    async with opened(path) as log:
        await log.append(record())
    with sqlite3.connect(path) as database:
        database.execute("INSERT INTO vlmguard_schema (version) VALUES (2)")
    database.close()
    with pytest.raises(ConfigError, match="tables of version 2, this vlmguard reads version 1"):
        await AuditLog.open(f"sqlite:///{path}")


async def test_synchronous_full_is_passed_on(path: Path) -> None:
    log = await AuditLog.open(f"sqlite:///{path}?synchronous=full")
    with log.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    await log.append(record())
    await log.aclose()
    assert ids(path) == ["req_1"]
    assert files(path) == [path.name]


async def test_another_worker_that_makes_the_log_is_waited_for(path: Path) -> None:
    """SQLite gives up at once on going over to its write-ahead log while somebody writes."""
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE made (x)")
    other.execute("BEGIN IMMEDIATE")
    opening = asyncio.create_task(AuditLog.open(f"sqlite:///{path}"))
    await asyncio.sleep(0.2)
    assert not opening.done()
    other.execute("COMMIT")
    other.close()
    log = await opening
    await log.append(record())
    await log.aclose()
    assert ids(path) == ["req_1"]
    with sqlite3.connect(path, isolation_level=None) as database:
        database.execute("PRAGMA journal_mode = DELETE")
        database.execute("BEGIN IMMEDIATE")
        with pytest.raises(AuditLogError, match="is locked"):
            await AuditLog.open(f"sqlite:///{path}", patience=0.1)
    database.close()
