"""`vlmguard audit-log`: what its three commands print, write and refuse."""

from __future__ import annotations

import csv
import io
import json
import stat
import time
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.gateway.audit_logs import found, ids, opened, record, url_of
from vlmguard.commands.audit_log import Filter, Where, export_log, moment, purge_log, query_log
from vlmguard.errors import ConfigError
from vlmguard.gateway.audit_log import AuditLogError, ImageFacts, Texts

DAY = 86_400


@pytest.fixture
async def where(tmp_path: Path) -> Where:
    """Three records: one of three days ago, with texts; one of an hour ago; one that has begun."""
    path = tmp_path / "audit.sqlite3"
    now = time.time()
    risky = record("old", time=now - 3 * DAY, action="rewrote", category="fraud", risk=0.9, total_ms=12.4)
    async with opened(path) as log:
        image = ImageFacts("ab" * 32, 10, 4, 3)
        await log.append(replace(risky, images=(image,), texts=Texts("=SUM(A1)", "safe")))
        await log.append(record("new", time=now - 3600, model='=cmd|"/C calc"!A0, [bold]x'))
        await log.begin(record("open", time=now - 10))
    return Where(url_of(path))


def exported(capsysbinary: pytest.CaptureFixture[bytes], where: Where, **options: Any) -> str:
    chosen = {"out": None, "format": None, "texts": False, **options}
    export_log(where, chosen.pop("chosen", Filter()), **chosen)
    return capsysbinary.readouterr().out.decode()


def test_query_prints_the_newest_first(where: Where, capsys: pytest.CaptureFixture[str]) -> None:
    query_log(where, Filter(), limit=2, as_json=False)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["time", "action", "status", "risk", "category", "key", "model", "ms", "request"]
    assert [line[2] for line in lines[1:] if line[0].startswith("20")] == ["begun", "passed"]
    query_log(where, Filter(action="rewrote"), limit=50, as_json=False)
    row = capsys.readouterr().out.splitlines()[1].split()
    assert row[2:] == ["rewrote", "200", "0.90", "fraud", "app", "m", "12", "old"]
    query_log(where, Filter(key="nobody"), limit=50, as_json=False)
    assert capsys.readouterr() == ("", "no such records\n")


def test_query_as_json_is_one_object_without_texts(where: Where, capsys: pytest.CaptureFixture[str]) -> None:
    query_log(where, Filter(until="2d"), limit=50, as_json=True)
    (only,) = json.loads(capsys.readouterr().out)["records"]
    came = datetime.fromisoformat(only.pop("time"))
    assert came.utcoffset() == timedelta(0)
    assert came.timestamp() == pytest.approx(time.time() - 3 * DAY, abs=60)
    assert only == {
        "request_id": "old",
        "key_id": "app",
        "route": "/v1/chat/completions",
        "model": "m",
        "stream": True,
        "status": 200,
        "action": "rewrote",
        "mode": "rewrite",
        "risk": 0.9,
        "threshold": None,
        "category": "fraud",
        "note": None,
        "images": [{"sha256": "ab" * 32, "bytes": 10, "width": 4, "height": 3}],
        "latency_ms": {"guard": None, "first_byte": None, "total": 12.4},
        "prompt_tokens": None,
        "completion_tokens": None,
        "versions": {},
    }


def test_export_is_a_json_line_a_record(where: Where, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    rows = [json.loads(line) for line in exported(capsysbinary, where).splitlines()]
    assert [row["request_id"] for row in rows] == ["old", "new", "open"]
    assert [row["action"] for row in rows] == ["rewrote", "passed", "begun"]
    assert not any("texts" in row for row in rows)
    told = [json.loads(line) for line in exported(capsysbinary, where, texts=True).splitlines()]
    assert told[0].pop("texts") == {"original": "=SUM(A1)", "sent": "safe", "answer": None}
    assert told == rows


def test_csv_has_no_cell_that_a_spreadsheet_carries_out(
    where: Where, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    rows = list(csv.DictReader(io.StringIO(exported(capsysbinary, where, format="csv", texts=True))))
    assert [row["request_id"] for row in rows] == ["old", "new", "open"]
    assert rows[1]["model"] == '\'=cmd|"/C calc"!A0, [bold]x'
    assert (rows[0]["original"], rows[0]["sent"], rows[0]["answer"]) == ("'=SUM(A1)", "safe", "")
    assert (rows[0]["total_ms"], rows[0]["risk"], rows[1]["risk"]) == ("12.4", "0.9", "")
    assert json.loads(rows[0]["images"]) == [{"sha256": "ab" * 32, "bytes": 10, "width": 4, "height": 3}]
    assert "original" not in exported(capsysbinary, where, format="csv").splitlines()[0]


def test_export_to_a_file_is_whole_or_not_there(
    where: Where, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "copy.CSV"
    export_log(where, Filter(since="1d"), out=out, format=None, texts=False)
    assert capsys.readouterr() == ("", f"2 records are in {out}\n")
    assert len(out.read_text().splitlines()) == 3
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match="is there already"):
        export_log(where, Filter(), out=out, format=None, texts=False)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        export_log(where, Filter(), out=tmp_path / "other.jsonl", format=None, texts=False)
    assert sorted(name for name in [file.name for file in tmp_path.iterdir()] if "audit" not in name) == ["copy.CSV"]


def test_purge_asks_first_and_says_how_many(where: Where, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="Add --yes"):
        purge_log(where, before="2d", sure=False, as_json=False)
    assert len(found(where.find())) == 3
    purge_log(where, before="2d", sure=True, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"deleted": 1}
    assert ids(where.find()) == ["new", "open"]
    purge_log(where, before="2000-01-01", sure=True, as_json=False)
    assert capsys.readouterr() == ("", "0 records from before 2000-01-01 00:00:00Z are deleted\n")


def test_the_log_is_that_of_the_configuration(where: Where, tmp_path: Path) -> None:
    config = tmp_path / "vlmguard.toml"
    config.write_text(f'[audit_log]\nurl = "{where.url}"\n')
    assert Where(config=config).find() == where.url
    assert Where().find() == "sqlite:///vlmguard-audit.sqlite3"
    with pytest.raises(AuditLogError, match="there is no audit log at"):
        query_log(Where(url_of(tmp_path / "none.sqlite3")), Filter(), limit=1, as_json=False)
    assert not (tmp_path / "none.sqlite3").exists()


def test_moments() -> None:
    now = time.time()
    assert moment(None, "--since") is None
    assert moment("1970-01-02", "--since") == DAY
    assert moment("1970-01-02T00:00:01+01:00", "--since") == DAY - 3599
    assert moment("2h", "--since") == pytest.approx(now - 7200, abs=5)
    assert moment("1w", "--since") == pytest.approx(now - 7 * DAY, abs=5)
    for wrong in ("", "yesterday", "2 h", "-1d", "2026-13-01"):
        with pytest.raises(ConfigError, match=r"--until: expected a time such as .*, got"):
            moment(wrong, "--until")
