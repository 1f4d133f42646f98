"""Audit logs for tests: how they are opened, what goes in, and what is found in them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlmguard.gateway.audit_database import open_engine
from vlmguard.gateway.audit_log import AuditLog, Record
from vlmguard.gateway.audit_rows import Wanted, records


@asynccontextmanager
async def opened(where: Path | str, **options: Any) -> AsyncIterator[AuditLog]:
    log = await AuditLog.open(url_of(where), **options)
    try:
        yield log
    finally:
        await log.aclose()


def url_of(where: Path | str) -> str:
    return f"sqlite:///{where}" if isinstance(where, Path) else where


def record(request_id: str = "req_1", **fields: Any) -> Record:
    ordinary = Record(1000.0, request_id, "app", "/v1/chat/completions", "m", True, 200, "passed", "rewrite")
    return replace(ordinary, **fields)


def found(where: Path | str, wanted: Wanted | None = None, **options: Any) -> list[Record]:
    return list(records(open_engine(url_of(where), create=False), wanted, **options))


def ids(where: Path | str) -> list[str]:
    return sorted(one.request_id for one in found(where))


def files(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


def raw(path: Path) -> bytes:
    """All that lies on the disk of a log in a file."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.glob(f"{path.name}*")))


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 what is waited for is in another thread
            await asyncio.sleep(0.01)
