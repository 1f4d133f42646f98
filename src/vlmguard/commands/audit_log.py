"""`vlmguard audit-log`: what is in the audit log, a copy of it, and the removal of what is old."""

from __future__ import annotations

import csv
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, TypeAlias

import orjson
import typer
from rich.table import Table

from vlmguard.commands.terminal import print_json, say, shown, stdout
from vlmguard.errors import ConfigError

if TYPE_CHECKING:
    from vlmguard.gateway.audit_record import Action, Record
    from vlmguard.gateway.audit_rows import Wanted

Format: TypeAlias = Literal["jsonl", "csv"]

UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
STYLES: Final = {"passed": "green", "rewrote": "yellow", "refused": "red", "flagged": "magenta", "error": "bold red"}
COLUMNS: Final = (
    *("time", "request_id", "key_id", "route", "model", "stream", "status", "action", "mode"),
    *("risk", "threshold", "category", "note", "guard_ms", "first_byte_ms", "total_ms"),
    *("prompt_tokens", "completion_tokens", "images", "versions"),
)
TEXTS: Final = ("original", "sent", "answer")
OWNERS_ALONE: Final = 0o600  # the export may hold texts
FORMULA: Final = tuple("=+-@\t\r")  # what a spreadsheet would carry out instead of showing it


@dataclass(frozen=True)
class Where:
    """Which log: its URL, else the one in the gateway's configuration, else the default's."""

    url: str | None = None
    config: Path | None = None

    def find(self) -> str:
        from vlmguard.gateway.config import load

        return self.url or load(self.config).audit_log.url


@dataclass(frozen=True)
class Filter:
    """Which records, as a command line says it; see `moment` for the two times."""

    since: str | None = None
    until: str | None = None
    action: Action | None = None
    category: str | None = None
    key: str | None = None
    route: str | None = None
    request_id: str | None = None

    def wanted(self) -> Wanted:
        from vlmguard.gateway.audit_rows import Wanted

        since, until = moment(self.since, "--since"), moment(self.until, "--until")
        return Wanted(since, until, self.action, self.category, self.key, self.route, self.request_id)


def query_log(where: Where, chosen: Filter, *, limit: int, as_json: bool) -> None:
    """Prints the newest records, the newest first."""
    from vlmguard.gateway.audit_database import open_engine
    from vlmguard.gateway.audit_rows import records

    wanted = chosen.wanted()
    found = list(records(open_engine(where.find(), create=False), wanted, limit=limit, newest_first=True))
    if as_json:
        print_json({"records": [record.fields() for record in found]})
    elif found:
        stdout().print(_table(found))
    else:
        say("no such records")


def export_log(where: Where, chosen: Filter, *, out: Path | None, format: Format | None, texts: bool) -> None:  # noqa: A002
    """Copies records, the oldest first, to a file that is there only when it is whole, or to standard output."""
    from vlmguard.gateway.audit_database import open_engine
    from vlmguard.gateway.audit_rows import records

    wanted = chosen.wanted()
    form = format or ("csv" if out and out.suffix.lower() == ".csv" else "jsonl")
    if out is not None and out.exists():
        raise ConfigError(f"{out} is there already", "Name another file.")
    found = records(open_engine(where.find(), create=False), wanted, with_texts=texts)
    lines = _csv(found, texts) if form == "csv" else _json_lines(found)
    if out is None:
        _copy(lines, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    part = out.with_name(f"{out.name}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, OWNERS_ALONE), "wb") as file:
            count = _copy(lines, file)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    say(f"{count - (form == 'csv')} records are in {out}")


def purge_log(where: Where, *, before: str, sure: bool, as_json: bool) -> None:
    """Deletes the records from before that time, once somebody is sure."""
    from vlmguard.gateway.audit_database import open_engine, place_of
    from vlmguard.gateway.audit_rows import purge

    limit = moment(before, "--before")
    assert limit is not None
    engine = open_engine(where.find(), create=False)
    if not sure:
        if not sys.stdin.isatty():
            raise ConfigError("a purge deletes for good", "Add --yes if that is meant.")
        typer.confirm(
            f"Delete every record from before {_shown_time(limit)} in {place_of(engine)}?", abort=True, err=True
        )
    deleted = purge(engine, limit)
    if as_json:
        print_json({"deleted": deleted})
    else:
        say(f"{deleted} records from before {_shown_time(limit)} are deleted")


def moment(text: str | None, option: str) -> float | None:
    """A time in seconds since 1970: "2h" is two hours ago (s, m, h, d, w), "2026-01-31T12:00" is in UTC unless it says.

    Raises ConfigError.
    """
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d{1,6})([smhdw])", text.strip()):
        return time.time() - int(ago[1]) * UNITS[ago[2]]
    try:
        found = datetime.fromisoformat(text.strip())
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        expected = "a time such as 2026-01-31T12:00 or 24h"
        raise ConfigError.wrong(option, expected=expected, got=text) from None


def _table(found: list[Record]) -> Table:
    table = Table.grid(padding=(0, 2))
    columns: tuple[tuple[str, Callable[[Record], str]], ...] = (
        ("time", lambda record: _shown_time(record.time)),
        ("action", lambda record: record.action),
        ("status", lambda record: str(record.status or "")),
        ("risk", lambda record: "" if record.risk is None else f"{record.risk:.2f}"),
        ("category", lambda record: record.category or record.note or ""),
        ("key", lambda record: record.key_id),
        ("model", lambda record: record.model),
        ("ms", lambda record: "" if record.total_ms is None else f"{record.total_ms:.0f}"),
        ("request", lambda record: record.request_id),
    )
    for name, _ in columns:
        table.add_column(no_wrap=name in ("time", "action", "status", "risk", "ms"), overflow="fold")
    table.add_row(*(shown(name, "dim") for name, _ in columns))
    for record in found:
        style = {"action": STYLES.get(record.action, "")}
        table.add_row(*(shown(cell(record), style.get(name, "")) for name, cell in columns))
    return table


def _shown_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def _copy(lines: Iterator[bytes], file: BinaryIO) -> int:
    count = 0
    for line in lines:
        file.write(line)
        count += 1
    return count


def _json_lines(found: Iterator[Record]) -> Iterator[bytes]:
    return (orjson.dumps(record.fields(), option=orjson.OPT_APPEND_NEWLINE) for record in found)


def _csv(found: Iterator[Record], texts: bool) -> Iterator[bytes]:
    """A line of names, then the records; pictures and versions as JSON."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)

    def line(cells: list[Any]) -> bytes:
        buffer.seek(0)
        buffer.truncate()
        writer.writerow(cells)
        return buffer.getvalue().encode()

    yield line([*COLUMNS, *(TEXTS if texts else ())])
    for record in found:
        cells = _cells(record)
        yield line([cells.get(name) for name in (*COLUMNS, *(TEXTS if texts else ()))])


def _cells(record: Record) -> dict[str, Any]:
    fields = record.fields()
    latency = {f"{part}_ms": value for part, value in fields.pop("latency_ms").items()}
    nested = {name: orjson.dumps(fields.pop(name)).decode() for name in ("images", "versions")}
    written = fields.pop("texts", {})
    return {name: _cell(value) for name, value in (fields | latency | nested | written).items()}


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
