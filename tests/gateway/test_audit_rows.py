"""Reading, expiring and purging, on both kinds of database; and a PostgreSQL server that goes away."""

from __future__ import annotations

import asyncio
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tests.gateway import postgres
from tests.gateway.audit_logs import found, ids, opened, record, until, url_of
from vlmguard.errors import ConfigError
from vlmguard.gateway import audit_log, audit_rows
from vlmguard.gateway.audit_database import open_engine
from vlmguard.gateway.audit_log import AuditLog, AuditLogError, ImageFacts, Record, Texts
from vlmguard.gateway.audit_record import row_of
from vlmguard.gateway.audit_rows import Wanted, purge, records
from vlmguard.gateway.audit_tables import insertion, requests

WHOLE = Record(
    time=1_764_000_000.123456,
    request_id="req_ü",
    key_id="app",
    route="/v1/messages",
    model="模型 7B",
    stream=True,
    status=200,
    action="rewrote",
    mode="rewrite",
    images=(ImageFacts("ab" * 32, 2**40, 640, 480), ImageFacts("cd" * 32, 1)),
    risk=0.123456789,
    threshold=0.5,
    category="fraud",
    note="RewriteUnreadable",
    guard_ms=1.25,
    first_byte_ms=3.5,
    total_ms=1e7,
    prompt_tokens=2**40,
    completion_tokens=0,
    versions={"vlmguard": "0.1.0", "rewriter": "packaged:rewriter"},
)


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    try:
        with postgres.serving() as server:
            yield server
    except postgres.Absent as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return url_of(tmp_path / "audit.sqlite3")
    server: postgres.Server = request.getfixturevalue("server")
    return server.new_database()


async def test_a_record_comes_back_as_it_was(url: str) -> None:
    texts = Texts("日本 \0 \U0001f600", None, 'quote " %s ? :x')
    async with opened(url) as log:
        await log.append(replace(WHOLE, texts=texts))
    assert found(url) == [WHOLE]
    assert found(url, with_texts=True) == [replace(WHOLE, texts=replace(texts, original="日本 \ufffd \U0001f600"))]


async def test_what_a_target_may_say_fits_a_row(url: str) -> None:
    strange = record(risk=float("nan"), threshold=float("inf"), prompt_tokens=10**30, completion_tokens=-1)
    async with opened(url) as log:
        await log.append(strange)
    assert found(url) == [record()]


async def test_a_request_that_began_is_replaced_by_its_end(url: str) -> None:
    async with opened(url) as log:
        entry = await log.begin(record("ended"))
        await log.begin(record("killed"))
        await log.append(record("ended", action="flagged", texts=Texts("t")), entry)
        await log.append(record("ended", action="passed"), entry)  # the first word stands
    assert sorted((it.request_id, it.action) for it in found(url)) == [("ended", "flagged"), ("killed", "begun")]
    assert [it.texts for it in found(url, Wanted(request_id="ended"), with_texts=True)] == [Texts("t")]


async def test_rows_are_append_only(url: str) -> None:
    async with opened(url) as log:
        await log.append(record(texts=Texts("said")))
    engine = open_engine(url, create=False)
    statements = [f"{it} vlmguard_{table}" for it in ("DELETE FROM", "TRUNCATE") for table in ("requests", "texts")]
    statements += ["UPDATE vlmguard_requests SET status = 500", "UPDATE vlmguard_texts SET original = ''"]
    for statement in statements[:2] + statements[4:] if engine.dialect.name == "sqlite" else statements:
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), engine.begin() as connection:
            connection.exec_driver_sql(statement)
    assert found(url, with_texts=True) == [record(texts=Texts("said"))]


async def test_filters_limit_and_order(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_rows, "PAGE", 3)
    async with opened(url) as log:
        for number in range(10):  # of the same time by threes
            rewrote = number % 2 == 0
            await log.append(
                record(
                    f"{number}",
                    time=100.0 + number // 3,
                    action="rewrote" if rewrote else "passed",
                    category="fraud" if number > 6 else None,
                    key_id=f"key{number % 3}",
                    route=f"/v1/{number % 4}",
                )
            )

    def chosen(wanted: Wanted | None = None, **options: Any) -> str:
        return "".join(one.request_id for one in found(url, wanted, **options))

    assert chosen() == "0123456789"
    assert chosen(newest_first=True) == "9876543210"
    assert chosen(limit=4) == "0123"
    assert chosen(limit=6, newest_first=True) == "987654"
    assert chosen(limit=0) == ""
    assert chosen(Wanted(since=101.0, until=103.0)) == "345678"
    assert chosen(Wanted(action="rewrote")) == "02468"
    assert chosen(Wanted(category="fraud")) == "789"
    assert chosen(Wanted(key="key1")) == "147"
    assert chosen(Wanted(route="/v1/3", action="passed"), limit=1) == "3"
    assert chosen(Wanted(request_id="5")) == "5"
    assert chosen(Wanted(action="begun")) == ""


async def test_purge_deletes_what_is_older_and_counts_requests(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_rows, "PAGE", 4)
    async with opened(url) as log:
        for number in range(10):
            entry = await log.begin(record(f"old{number}", time=float(number)))
            await log.append(record(f"old{number}", time=float(number), texts=Texts("t")), entry)
        await log.begin(record("killed", time=5.0))
        await log.append(record("new", time=10.0, texts=Texts("t")))
        assert purge(log.engine, 10.0) == 11
        assert purge(log.engine, 10.0) == 0
        await log.append(record("next", time=5.0))
    assert ids(url) == ["new", "next"]
    engine = open_engine(url, create=False)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM vlmguard_texts").scalar() == 1
        assert connection.exec_driver_sql("SELECT count(*) FROM vlmguard_purging").scalar() == 0


async def test_texts_expire_and_records_stay(url: str) -> None:
    now = time.time()
    async with opened(url, retention_days=1) as log:
        await log.append(record("old", time=now - 90_000, texts=Texts("t")))
        await log.append(record("new", time=now - 80_000, texts=Texts("t")))
        assert await log.expire_texts() == 1
    assert [(it.request_id, it.texts) for it in found(url, with_texts=True)] == [("old", None), ("new", Texts("t"))]


async def test_a_gateway_goes_on_while_old_records_are_purged(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_rows, "PAGE", 20)
    async with opened(url) as log:
        await asyncio.gather(*(log.append(record(f"old{number}", time=1.0)) for number in range(400)))
        purged = asyncio.create_task(asyncio.to_thread(purge, log.engine, 2.0))
        meanwhile = 0
        while not purged.done():
            await log.append(record(f"new{meanwhile}", time=3.0))
            meanwhile += 1
        assert await purged == 400
    assert len(ids(url)) == meanwhile >= 5


async def test_logs_of_workers_that_start_at_once(url: str) -> None:
    logs = await asyncio.gather(*(AuditLog.open(url) for _ in range(6)))
    await asyncio.gather(*(log.append(record(str(number))) for number, log in enumerate(logs)))
    await asyncio.gather(*(log.aclose() for log in logs))
    assert ids(url) == [str(number) for number in range(6)]


def test_reading_takes_constant_memory(tmp_path: Path) -> None:
    engine = open_engine(url_of(tmp_path / "audit.sqlite3"), create=True)
    rows = [row_of(record(str(number)), f"{number:08}", begun=False) for number in range(12_000)]
    with engine.begin() as connection:
        connection.exec_driver_sql("BEGIN")
        connection.exec_driver_sql(insertion(engine, requests), rows)
    del rows
    tracemalloc.start()
    count = sum(1 for _ in records(engine))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 12_000
    assert peak < 3 * 2**20


async def test_a_broken_connection_is_made_again_and_nothing_is_lost_or_doubled(server: postgres.Server) -> None:
    url = server.new_database()
    database = url.rpartition("/")[2]
    kill = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{database}'"
    async with opened(url) as log:
        for burst in range(5):
            tasks = [asyncio.create_task(log.append(record(f"{burst}-{number}"))) for number in range(300)]
            await asyncio.to_thread(server.execute, kill)
            await asyncio.gather(*tasks)
        assert log.healthy
    assert ids(url) == sorted(f"{burst}-{number}" for burst in range(5) for number in range(300))


async def test_a_server_that_restarts_is_waited_for(server: postgres.Server) -> None:
    url = server.new_database()
    async with opened(url) as log:
        await log.append(record("before"))
        server.stop(at_once=True)
        task = asyncio.create_task(log.append(record("meanwhile")))
        await asyncio.sleep(0.2)
        assert not task.done()
        await asyncio.to_thread(server.start)
        await task
        assert log.healthy
    assert ids(url) == ["before", "meanwhile"]


async def test_a_server_that_stays_away_is_an_error_without_its_password(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_log, "DOWN_SECONDS", 0.05)
    url = server.new_database()
    async with opened(url, patience=0.3) as log:
        await log.append(record("before"))
        server.stop()
        begun = time.monotonic()
        results = await asyncio.gather(*(log.append(record("lost")) for _ in range(600)), return_exceptions=True)
        assert time.monotonic() - begun < 5
        assert {type(result) for result in results} == {AuditLogError}
        message = str(results[0])
        assert "can't be reached" in message
        assert server.password not in message
        down = log.healthy
        with pytest.raises(AuditLogError, match="can't be reached") as caught:
            await AuditLog.open(url)
        assert server.password not in str(caught.value)
        await asyncio.to_thread(server.start)
        await until(lambda: log.healthy)
        await log.append(record("after"))
    assert not down
    assert ids(url) == ["after", "before"]


async def test_a_wrong_password_or_encoding_is_told_at_once(server: postgres.Server) -> None:
    with pytest.raises(AuditLogError, match="password authentication failed"):
        await AuditLog.open(server.url().replace(server.password, "wrong"))
    latin = server.new_database("ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(ConfigError, match="expected UTF8, got 'LATIN1'"):
        await AuditLog.open(latin)
    with pytest.raises(AuditLogError, match=r"there is no audit log in 127\.0\.0\.1/"):
        open_engine(server.new_database(), create=False)
