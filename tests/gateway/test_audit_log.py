"""Appending: what is in the log when `append` has returned, and what is said when it can't be."""

from __future__ import annotations

import asyncio
import resource
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from tests.gateway.audit_logs import files, found, ids, opened, raw, record, until
from vlmguard.gateway import audit_log
from vlmguard.gateway.audit_log import AuditLogError, ImageFacts, Texts
from vlmguard.gateway.audit_record import NAME_CHARACTERS
from vlmguard.gateway.audit_rows import Wanted

ROOT = Path(__file__).parents[2]
APPENDER = """
import asyncio, itertools, sys
from vlmguard.gateway.audit_log import AuditLog, ImageFacts, Record

async def append(log, name, count, say):
    for number in count:
        record = Record(1.0, f"{name}-{number}", "app", "/v1/x", "m", False, 200, "passed", "rewrite")
        entry = await log.begin(record) if number % 2 else None
        await log.append(record, entry)
        if say:
            sys.stdout.write(f"{name}-{number}\\n")
            sys.stdout.flush()

async def main(url, name, most):
    log = await AuditLog.open(url)
    each = (range(int(most) // 8) if int(most) else itertools.count() for _ in range(8))
    say = not int(most)
    await asyncio.gather(*(append(log, f"{name}{worker}", count, say) for worker, count in enumerate(each)))
    await log.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite3"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.close()


def mode_of(path: Path) -> int:
    return path.stat().st_mode


def move(old: Path, new: Path) -> None:
    old.rename(new)


def start(path: Path, name: str, most: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", APPENDER, f"sqlite:///{path}", name, str(most)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


async def test_what_was_appended_is_there_and_for_its_owner_alone(path: Path) -> None:
    async with opened(path) as log:
        await log.append(record())
        assert found(path) == [record()]
    assert found(path) == [record()]
    assert mode_of(path) & 0o077 == 0


async def test_f066_f067_f068_nothing_that_a_user_wrote_is_kept(path: Path) -> None:
    picture = "iVBORw0KGgo" + "A" * 300_000 + "MARKERtail"
    hostile = "\x1b[31mfine\r\n2026 \u202eMARK" + "x" * NAME_CHARACTERS + f"MARKERend{picture}"
    async with opened(path) as log:
        await log.append(
            record(
                hostile,
                key_id=hostile,
                route=hostile,
                model=hostile,
                category=hostile,
                note=f"ImageUnreadable: the picture data:image/png;base64,{picture} is broken",
                images=(ImageFacts("ab" * 32, 225_000, 640, 480),),
            )
        )
        await log.append(record(note="MARKERnote 12 of a user's"))
        await log.append(record(note="static wrapper; Timeout: MARKERtext"))
        content = raw(path)
    first, second, third = found(path)
    assert b"MARKER" not in content
    assert len(content) < 200_000
    assert (first.note, second.note, third.note) == ("ImageUnreadable", "other", "static wrapper; Timeout")
    for name in (first.request_id, first.key_id, first.route, first.model, first.category):
        assert name is not None
        assert name.startswith("[31mfine2026 MARKxxx")
        assert name.endswith("x…")
        assert len(name) == NAME_CHARACTERS
        assert name.isprintable()


async def test_f066_the_error_of_a_failed_append_quotes_no_record(path: Path) -> None:
    hostile = record(model="MARKER", texts=Texts("MARKER"))
    async with opened(path) as log:
        with sqlite3.connect(path) as other:
            other.execute("DROP TABLE vlmguard_requests")
        other.close()
        with pytest.raises(AuditLogError, match=r"can't be used \(SQLITE_ERROR\)") as caught:
            await log.append(hostile)
    assert "MARKER" not in "".join(traceback.format_exception(caught.value))


async def test_texts_are_kept_where_they_are_given_and_leave_no_trace_when_they_expire(path: Path) -> None:
    old, new = time.time() - 3 * 86_400, time.time()
    texts = Texts("MARKER original", "MARKER \0sent\ud800", "MARKER answer" * 1000)
    async with opened(path, retention_days=2) as log:
        await log.append(record("old", time=old, texts=texts))
        await log.append(record("refused", time=new, texts=Texts("kept")))
        assert found(path) == [record("old", time=old), record("refused", time=new)]
        whole = found(path, with_texts=True)
        assert [one.texts for one in whole] == [replace(texts, sent="MARKER \ufffdsent?"), Texts("kept")]
        assert b"MARKER" in raw(path)
        assert (await log.expire_texts(), await log.expire_texts()) == (1, 0)
        assert b"MARKER" not in raw(path)
        assert [one.texts for one in found(path, with_texts=True)] == [None, Texts("kept")]
        await log.append(record("later"))
    assert ids(path) == ["later", "old", "refused"]


async def test_a_request_that_began_is_on_record_until_it_has_ended(path: Path) -> None:
    async with opened(path) as log:
        # a caller may send one request id twice
        one, two = await log.begin(record(texts=Texts("MARKER"))), await log.begin(record(status=0))
        assert [it.action for it in found(path)] == ["begun", "begun"]
        await log.append(record(action="rewrote"), one)
        assert sorted(it.action for it in found(path)) == ["begun", "rewrote"]
        assert found(path, Wanted(action="begun")) == [record(action="begun", status=0)]
        await log.append(record(action="error", status=502), two)
    assert sorted((it.action, it.status) for it in found(path)) == [("error", 502), ("rewrote", 200)]
    assert b"MARKER" not in raw(path)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE vlmguard_requests SET action = 'passed'",
        "DELETE FROM vlmguard_requests",
        "UPDATE vlmguard_texts SET original = ''",
        "DELETE FROM vlmguard_texts",
    ],
)
async def test_rows_are_not_changed_nor_deleted(path: Path, statement: str) -> None:
    async with opened(path) as log:
        await log.append(record(action="refused", texts=Texts("said")))
    database = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="append-only"):
        database.execute(statement)
    # a REPLACE deletes a row without asking the trigger for deletions
    database.execute(
        "INSERT OR REPLACE INTO vlmguard_texts SELECT entry, time, 'other', sent, answer FROM vlmguard_texts"
    )
    database.commit()
    database.close()
    assert found(path, with_texts=True) == [record(action="refused", texts=Texts("said"))]


async def test_records_share_commits(path: Path) -> None:
    commits = 0

    def count(_: object) -> None:
        nonlocal commits
        commits += 1

    async with opened(path) as log:
        sa.event.listen(log.engine, "commit", count)
        await asyncio.gather(*(log.append(record(str(number))) for number in range(1000)))
    assert len(ids(path)) == 1000
    assert 4 <= commits <= 20


async def test_a_cancelled_append_is_carried_out(path: Path) -> None:
    async with opened(path) as log:
        task = asyncio.create_task(log.append(record("cancelled")))
        await asyncio.sleep(0)
        task.cancel()
        await log.append(record("next"))
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ids(path) == ["cancelled", "next"]


async def test_closing_writes_what_waits(path: Path) -> None:
    async with opened(path) as log:
        tasks = [asyncio.create_task(log.append(record(str(number)))) for number in range(600)]
        await asyncio.sleep(0)
        await log.aclose()
        await log.aclose()
        await asyncio.gather(*tasks)
        assert not log.healthy
        with pytest.raises(AuditLogError, match="closed"):
            await log.append(record("late"))
    assert len(ids(path)) == 600
    assert files(path) == [path.name]  # its write-ahead log is merged


async def test_processes_share_a_file(path: Path) -> None:
    writers = [start(path, name, 400) for name in ("a", "b")]  # the file isn't there yet: they make it at once, too
    async with opened(path) as log:
        await log.append(record("here"))
        assert [await asyncio.to_thread(writer.wait, 30) for writer in writers] == [0, 0]
    for writer in writers:
        assert writer.stdout is not None
        writer.stdout.close()
    expected = [f"{name}{worker}-{number}" for name in "ab" for worker in range(8) for number in range(50)]
    assert ids(path) == sorted(["here", *expected])


@pytest.mark.parametrize("lines", [1, 700])
def test_kill_9_loses_no_record_whose_append_returned(path: Path, lines: int) -> None:
    writer = start(path, "w", 0)
    assert writer.stdout is not None
    printed = [writer.stdout.readline() for _ in range(lines)]
    writer.send_signal(signal.SIGKILL)
    with writer.stdout:
        printed += writer.stdout.readlines()
    assert writer.wait(10) == -signal.SIGKILL
    whole = {line.strip() for line in printed if line.endswith("\n")}
    assert len(whole) >= lines
    recorded = found(path)
    assert whole <= {one.request_id for one in recorded if one.action == "passed"}
    assert all(int(one.request_id.split("-")[1]) % 2 for one in recorded if one.action == "begun")
    database = sqlite3.connect(path)
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    database.close()


async def test_a_lock_is_waited_for(path: Path) -> None:
    async with opened(path, patience=5) as log:
        with locked(path):
            task = asyncio.create_task(log.append(record()))
            await asyncio.sleep(0.1)
            assert not task.done()
        await task
        assert log.healthy
    assert ids(path) == ["req_1"]


async def test_a_lock_that_lasts_is_an_error_and_the_log_recovers_by_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "DOWN_SECONDS", 0.05)
    async with opened(path, patience=0.1) as log:
        with locked(path):
            with pytest.raises(AuditLogError, match="is locked"):
                await log.append(record("lost"))
            assert not log.healthy
        await until(lambda: log.healthy)
        await log.append(record("next"))
    assert ids(path) == ["next"]


async def test_a_full_disk_is_an_error_and_the_log_goes_on_when_there_is_room(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "DOWN_SECONDS", 0.05)
    room = 100
    async with opened(path) as log:

        @sa.event.listens_for(log.engine, "connect")
        def _limit(connection: sqlite3.Connection, _: object) -> None:
            connection.execute(f"PRAGMA max_page_count = {room}")

        kept = 0

        async def fill() -> None:
            nonlocal kept
            while True:
                await log.append(record(str(kept), texts=Texts("words " * 500)))
                kept += 1

        with pytest.raises(AuditLogError, match="no room left on its disk"):
            await fill()
        down = log.healthy
        room = 100_000
        await log.append(record("next"))
        assert (down, log.healthy) == (False, True)
    assert ids(path) == sorted([*map(str, range(kept)), "next"])


async def test_a_disk_that_takes_nothing_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "DOWN_SECONDS", 0.05)
    async with opened(path) as log:
        await log.append(record("before"))
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
        try:
            with pytest.raises(AuditLogError, match="can't be written to its disk"):
                await log.append(record("lost"))
            assert not log.healthy
            await asyncio.sleep(0.2)
            assert not log.healthy
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        await until(lambda: log.healthy)
        await log.append(record("after"))
    assert ids(path) == ["after", "before"]


async def test_a_file_that_is_moved_away_is_noticed(path: Path) -> None:
    async with opened(path) as log:
        await log.append(record("before"))
        move(path, path.with_suffix(".old"))
        with pytest.raises(AuditLogError, match="was moved or removed"):
            await log.append(record("lost"))
        down = log.healthy
        move(path.with_suffix(".old"), path)
        await log.append(record("after"))
        assert (down, log.healthy) == (False, True)
    assert ids(path) == ["after", "before"]


async def test_an_idle_log_notices_that_it_cannot_be_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "IDLE_SECONDS", 0.05)
    async with opened(path, patience=0.05) as log:
        await log.append(record())
        with locked(path):
            await until(lambda: not log.healthy)


async def test_a_bounded_number_of_records_waits(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_WAITING", 5)
    async with opened(path) as log:
        with locked(path):
            tasks = [asyncio.create_task(log.append(record(str(number)))) for number in range(20)]
            await until(lambda: any(task.done() for task in tasks))
        results = await asyncio.gather(*tasks, return_exceptions=True)
    written = [str(number) for number, result in enumerate(results) if result is None]
    errors = [str(result) for result in results if result is not None]
    assert 5 <= len(written) < 20
    assert all(error.startswith("5 records wait") for error in errors)
    assert ids(path) == sorted(written)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_a_fault_in_the_writer_leaves_nobody_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    async with opened(path) as log:
        monkeypatch.setattr(log, "_write", broken)
        async with asyncio.timeout(5):
            results = await asyncio.gather(*(log.append(record()) for _ in range(600)), return_exceptions=True)
            assert {str(result).partition(".")[0] for result in results} == {"the audit log's writer has stopped"}
            await until(lambda: not log.healthy)
            with pytest.raises(AuditLogError):
                await log.append(record())
