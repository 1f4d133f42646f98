import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies
from typer.testing import Result

from tests.stand_ins import Rewriter, read_lines, write_lines
from vlmguard.batch import Batch, Setting, Summary, read_rows
from vlmguard.chat import Chat
from vlmguard.errors import AuthenticationFailed, ConfigError, TargetError
from vlmguard.record import Models

Run = Callable[..., Result]
SETTING = Setting(Models("rewriter"), 0.5)


def record(chat: Chat, **fields: Any) -> dict[str, Any]:
    return {
        "action": "passed",
        "threshold": 0.5,
        "prompt": chat.text,
        "models": {"rewriter": "rewriter", "target": None},
        **fields,
    }


async def work(chat: Chat) -> dict[str, Any]:
    """Later rows are done earlier."""
    await asyncio.sleep(0.02 / (1 + len(chat.text)))
    return record(chat)


def do(source: Path, out: Path, work: Any = work, **options: Any) -> Summary:
    with Batch(source, out) as batch:
        return asyncio.run(batch.run(work, options.pop("setting", SETTING), **options))


def numbered(folder: Path, count: int) -> Path:
    return write_lines(folder / "in.jsonl", *({"id": f"r{at}", "text": "x" * at or "."} for at in range(count)))


def test_rows_come_out_in_their_order(tmp_path: Path) -> None:
    summary = do(numbered(tmp_path, 50), tmp_path / "out.jsonl", at_once=8)
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == [f"r{at}" for at in range(50)]
    assert (summary.done, summary.actions) == (50, {"passed": 50})
    assert summary.rows_per_second > 0


def test_a_bounded_number_is_worked_on_together(tmp_path: Path, vlmguard: Run, rewriter: Rewriter) -> None:
    rewriter.slow_seconds = 0.02
    file = write_lines(tmp_path / "in.jsonl", *({"id": at, "text": "slow"} for at in range(40)))
    assert vlmguard("guard", "--batch", file, "--out", tmp_path / "out", "--at-once", "5").exit_code == 0
    assert rewriter.most == 5


def test_a_line_is_written_as_soon_as_it_is_first(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    seen: list[int] = []
    do(numbered(tmp_path, 9), out, at_once=2, report=lambda now: seen.append(len(read_lines(out))))
    assert seen == list(range(1, 10))


BAD_ROWS: list[tuple[Any, Any, str]] = [
    ("not json", 1, "BadRequest"),
    ("[1]", 1, "BadRequest"),
    ('{"id": "a", "text": "x", "text": "y"}', 1, "BadRequest"),
    ({"text": "no id"}, 1, "BadRequest"),
    ({"id": "", "text": "x"}, 1, "BadRequest"),
    ({"id": True, "text": "x"}, 1, "BadRequest"),
    ({"id": "a"}, "a", "BadRequest"),
    ({"id": "a", "text": "  "}, "a", "BadRequest"),
    ({"id": "a", "text": 3}, "a", "BadRequest"),
    ({"id": "a", "text": "x" * (2**20 + 1)}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "image": "absent.png"}, "a", "ImageUnreadable"),
    ({"id": "a", "text": "x", "image": "."}, "a", "ImageUnreadable"),
    ({"id": "a", "text": "x", "image": "in.jsonl"}, "a", "ImageUnreadable"),
    ({"id": "a", "text": "x", "image": "broken.png"}, "a", "ImageUnreadable"),
    ({"id": "a", "text": "x", "image": "http://127.0.0.1/a.png"}, "a", "ImageNotAllowed"),
    ({"id": "a", "text": "x", "image": "data:image/png;base64,xx"}, "a", "ImageUnreadable"),
    ({"id": "a", "text": "x", "images": "picture.png"}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "images": [3]}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "image": "picture.png", "images": ["picture.png"]}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "turns": "earlier"}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "turns": [{"content": "no role"}]}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "imgae": "picture.png"}, "a", "BadRequest"),
    ({"id": "a", "text": "x", "image_path": "picture.png"}, "a", "BadRequest"),
    ({"id": "a", "question": "x", "image": "picture.png"}, "a", "BadRequest"),
]


@pytest.mark.parametrize(("row", "name", "kind"), BAD_ROWS)
def test_a_bad_row_is_an_error_and_the_next_goes_on(
    tmp_path: Path, picture: Path, row: Any, name: Any, kind: str
) -> None:
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:60])
    file = write_lines(tmp_path / "in.jsonl", row, {"id": "next", "text": "hi", "label": "harmless"})
    summary = do(file, tmp_path / "out.jsonl")
    bad, good = read_lines(tmp_path / "out.jsonl")
    assert (bad["id"], bad["error"]["type"], set(bad)) == (name, kind, {"id", "error"})
    assert set(bad["error"]) == {"type", "message"}
    assert "\n" not in bad["error"]["message"]
    assert (good["id"], good["action"]) == ("next", "passed")
    assert summary.actions == {"error": 1, "passed": 1}


def test_an_id_may_be_there_once(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", *({"id": one, "text": "hi"} for one in ("a", 1, "1", "a", 1)))
    do(file, tmp_path / "out.jsonl")
    lines = read_lines(tmp_path / "out.jsonl")
    assert ["error" in line for line in lines] == [False, False, False, True, True]
    assert [line["id"] for line in lines] == ["a", 1, "1", "a", 1]


def test_pictures_are_seen_from_the_file_and_turns_stand_before(tmp_path: Path, picture: Path, png: bytes) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png)
    turns = [{"role": "user", "content": "earlier"}, {"role": "assistant", "content": "yes"}]
    file = write_lines(
        tmp_path / "in.jsonl",
        {"id": 1, "text": "x", "image": "sub/a.png", "system": "Be brief.", "turns": turns},
        {"id": 2, "text": "", "images": ["sub/a.png", str(picture)]},
        {"id": 3, "image": "sub/a.png", "images": [], "system": None, "turns": None},
    )
    chats = [row.chat() for row in read_rows(file)]
    assert [turn.role for turn in chats[0].messages] == ["system", "user", "assistant", "user"]
    assert [len(chat.images) for chat in chats] == [1, 2, 1]
    assert [chat.text for chat in chats] == ["x", "", ""]


def test_what_a_model_meets_is_the_row_s_error(tmp_path: Path) -> None:
    async def failing(chat: Chat) -> dict[str, Any]:
        if chat.text == ".":
            raise TargetError("the server is tired", "Wait.")
        if chat.text == "x":
            raise ZeroDivisionError("a bug of somebody's")
        return record(chat)

    do(numbered(tmp_path, 3), tmp_path / "out.jsonl", failing)
    first, second, third = read_lines(tmp_path / "out.jsonl")
    assert first["error"] == {"type": "TargetError", "message": "the server is tired. Wait."}
    assert second["error"] == {"type": "ZeroDivisionError", "message": "unexpected: a bug of somebody's"}
    assert third["action"] == "passed"


def test_what_every_row_would_meet_ends_the_run(tmp_path: Path, vlmguard: Run) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"id": 1, "text": "hi"}, {"id": 2, "text": "locked"})
    result = vlmguard("guard", "--batch", file, "--out", tmp_path / "out.jsonl", "--gate-only")
    assert result.exit_code == AuthenticationFailed.exit_code
    assert "1 of 2 rows are in" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: the server refused the key. Set VLMGUARD_API_KEY")
    assert len(read_lines(tmp_path / "out.jsonl")) == 1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=strategies.integers(min_value=0, max_value=2000))
def test_a_run_cut_anywhere_goes_on_without_a_gap_or_a_double(tmp_path: Path, cut: int) -> None:
    file, whole, out = numbered(tmp_path, 9), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    if not whole.exists():
        do(file, whole)
    out.write_bytes(whole.read_bytes()[:cut])
    asked: list[str] = []

    async def counting(chat: Chat) -> dict[str, Any]:
        asked.append(chat.text)
        return record(chat)

    do(file, out, counting)
    assert out.read_bytes() == whole.read_bytes()
    assert len(asked) == 9 - whole.read_bytes()[:cut].count(b"\n")


def test_rows_that_were_added_are_done(tmp_path: Path, vlmguard: Run) -> None:
    file, out = numbered(tmp_path, 3), tmp_path / "out.jsonl"
    vlmguard("guard", "--batch", file, "--out", out)
    with file.open("a") as more:
        more.write('\n{"id": "new", "text": "hi"}')
    result = vlmguard("guard", "--batch", file, "--out", out)
    assert "3 of 4 rows already" in result.stderr
    assert [line["id"] for line in read_lines(out)] == ["r0", "r1", "r2", "new"]


def test_a_finished_run_loads_no_model(tmp_path: Path, vlmguard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    file, out = numbered(tmp_path, 3), tmp_path / "out.jsonl"
    vlmguard("guard", "--batch", file, "--out", out)
    monkeypatch.setattr("vlmguard.load.rewriter", None)
    result = vlmguard("guard", "--batch", file, "--out", out)
    assert result.exit_code == 0
    assert "3 were done before" in result.stderr


@pytest.mark.parametrize(
    "found",
    [
        '{"id": "other", "action": "passed"}\n',
        '{"some": "thing"}\n{"id": "r1", "action": "passed"}\n',
        "my notes\nmore of them\n",
        "".join(f'{{"id": "r{at}", "error": {{}}}}\n' for at in range(4)),
    ],
)
def test_another_file_s_output_is_left_alone(tmp_path: Path, found: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(found)
    with pytest.raises(ConfigError, match=r"is not the output for .*in\.jsonl.*Give another --out"):
        Batch(numbered(tmp_path, 3), out)
    assert out.read_text() == found


@pytest.mark.parametrize(
    "other",
    [
        Setting(Models("another"), 0.5),
        Setting(Models("rewriter", "target"), 0.5),
        Setting(Models("rewriter"), 0.7),
        Setting(Models("rewriter"), 0.5, gate_only=True),
    ],
)
def test_lines_of_different_options_are_not_mixed(tmp_path: Path, other: Setting) -> None:
    file, out = numbered(tmp_path, 3), tmp_path / "out.jsonl"
    do(file, out)
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:1]))
    with pytest.raises(ConfigError, match="begun with other models or options"):
        do(file, out, setting=other)
    assert len(read_lines(out)) == 1


def test_two_processes_do_not_write_one_file(tmp_path: Path) -> None:
    file = numbered(tmp_path, 3)
    with Batch(file, tmp_path / "out.jsonl"), pytest.raises(ConfigError, match="another process is writing"):
        Batch(file, tmp_path / "out.jsonl")


def test_nothing_is_left_where_nothing_was_done(tmp_path: Path) -> None:
    with Batch(numbered(tmp_path, 3), tmp_path / "out.jsonl"):
        pass
    assert not (tmp_path / "out.jsonl").exists()


def test_an_empty_file_gives_an_empty_one(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text("\n\n")
    assert do(file, tmp_path / "out.jsonl").total == 0
    assert (tmp_path / "out.jsonl").read_text() == ""


def test_blank_lines_a_mark_and_a_missing_end_do_no_harm(tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1, "text": "a"}\r\n\r\n{"text": "no id"}\n{"id": "z", "text": "b"}')
    do(file, tmp_path / "out.jsonl")
    assert [line["id"] for line in read_lines(tmp_path / "out.jsonl")] == [1, 3, "z"]


def test_rows_on_which_the_guard_failed_are_counted(tmp_path: Path, vlmguard: Run) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"id": 1, "text": "hi"}, {"id": 2, "text": "unreadable"})
    result = vlmguard("guard", "--batch", file, "--out", tmp_path / "out.jsonl")
    assert "1 with a note" in result.stderr
    assert ["note" in line for line in read_lines(tmp_path / "out.jsonl")] == [False, True]


def started(file: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.scripted_cli", "guard", "--batch", str(file), "--out", str(out)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        [*command, "--at-once", "2"],
        cwd=root,
        env={**os.environ, "SLOW_SECONDS": "0.05", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_in(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while lines_in(out) < count and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()


def slow_rows(folder: Path, count: int) -> Path:
    return write_lines(folder / "in.jsonl", *({"id": at, "text": "slow"} for at in range(count)))


def test_after_kill_9_the_same_command_goes_on(tmp_path: Path) -> None:
    file, out = slow_rows(tmp_path, 60), tmp_path / "out.jsonl"
    process = started(file, out)
    wait_for_lines(process, out, 4)
    process.kill()
    process.communicate(timeout=120)
    done = lines_in(out)
    assert 4 <= done < 60
    with out.open("ab") as torn:
        torn.write(b'{"id": 99, "act')
    again = started(file, out, SLOW_SECONDS="0")
    _, stderr = again.communicate(timeout=180)
    assert again.returncode == 0, stderr
    assert f"{done} of 60 rows already" in stderr
    assert [line["id"] for line in read_lines(out)] == list(range(60))


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    file, out = slow_rows(tmp_path, 200), tmp_path / "out.jsonl"
    process = started(file, out)
    wait_for_lines(process, out, 3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stdout == ""
    assert stderr.startswith(
        f"interrupted: {len(read_lines(out))} of 200 rows are in {out}; run the same command again"
    )
    assert stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_line(tmp_path: Path, vlmguard: Run) -> None:
    result = vlmguard("guard", "--batch", numbered(tmp_path, 3), "--out", "/dev/full")
    assert result.exit_code == 1
    assert "error: /dev/full cannot be written: No space left on device; 0 of 3 rows are in it" in result.stderr


def test_a_disk_that_fills_up_leaves_whole_lines(tmp_path: Path) -> None:
    file, out = numbered(tmp_path, 30), tmp_path / "out.jsonl"
    do(file, tmp_path / "whole.jsonl")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(Exception, match=r"cannot be written: File too large.*same command again"):
            do(file, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    kept = len(read_lines(out))
    assert 0 < kept < 30
    do(file, out)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_lines_go_to_a_device_too(tmp_path: Path) -> None:
    process = started(numbered(tmp_path, 3), Path("/dev/stdout"))
    stdout, stderr = process.communicate(timeout=180)
    assert process.returncode == 0, stderr
    assert [json.loads(line)["id"] for line in stdout.splitlines()] == ["r0", "r1", "r2"]


def test_progress_is_said_where_there_is_no_terminal(
    tmp_path: Path, vlmguard: Run, rewriter: Rewriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmguard.commands.terminal.SHOW_AFTER_SECONDS", 0.05)
    rewriter.slow_seconds = 0.04
    file = slow_rows(tmp_path, 8)
    result = vlmguard("guard", "--batch", file, "--out", tmp_path / "out.jsonl", "--at-once", "1")
    assert " of 8 rows, " in result.stderr
    assert "rows/s" in result.stderr
