"""`vlmguard synthesize` as its user meets it: a real process, killed at any moment, ends with the files of a whole run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.synthesis.standing_in import png
from vlmguard.cli import app

ANALYST = f"{Path(__file__).parent / 'slow_analyst.py'}:SlowAnalyst"
ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "black", "white", "orange")
THINGS = ("cliff", "ladder", "bridge", "roof", "river", "train", "horse", "oven", "saw", "rope", "boat", "car")


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """40 samples: six pictures, requests that differ, some harmless, one without its picture, one that is none."""
    for colour in COLOURS:
        (tmp_path / f"{colour}.png").write_bytes(png(colour))
    lines = [
        {
            "id": f"s{number}",
            "image": f"{COLOURS[number % 6]}.png",
            "prompt": f"Which {thing} pose looks best near this {THINGS[-number % 12]} number {number}?",
            "safe": "Stay back.",
            "unsafe": "Go ahead!",
            **({"benign": True} if number % 9 == 8 else {}),
        }
        for number, thing in enumerate(THINGS * 4)
    ]
    lines[5]["image"] = "none.png"
    lines[7]["prompt"] = 7
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[:40]))
    return path


def command(samples: Path, out: Path, *more: str) -> list[str]:
    return ["synthesize", str(samples), "--analyst", ANALYST, "--out", str(out), "--concurrency", "4", *more]


def started(arguments: list[str], seconds: float) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vlmguard", *arguments],
        env={**os.environ, "ANSWER_SECONDS": str(seconds), "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(path: Path, lines: int) -> None:
    until = time.monotonic() + 30
    while lines_in(path) < lines:
        assert time.monotonic() < until, f"{path} has {lines_in(path)} lines"
        time.sleep(0.02)


def test_a_run_that_is_killed_again_and_again_ends_like_one_that_is_not(samples: Path, tmp_path: Path) -> None:
    """F112: a run that took up recorded answers and gave other rows than a first one."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = CliRunner().invoke(app, command(samples, whole))
    assert done.exit_code == 0, done.output
    for lines in (3, 14, 30):
        resume = ["--resume"] if lines > 3 else []
        process = started(command(samples, out, *resume), 0.03)
        wait_for(out / "outcomes.jsonl", lines)
        process.kill()
        process.communicate()
    finished = started(command(samples, out, "--resume"), 0.0)
    _, said = finished.communicate(timeout=60)
    assert finished.returncode == 0, said
    for name in ("dataset.jsonl", "dropped.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    ids = [json.loads(line)["id"] for line in (out / "outcomes.jsonl").read_text().splitlines()]
    assert len(ids) == len(set(ids)) == 40
    keys = [json.loads(line)["key"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys))


def test_what_was_answered_before_a_kill_is_not_asked_again(samples: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert CliRunner().invoke(app, command(samples, out)).exit_code == 0
    (out / "outcomes.jsonl").unlink()
    silent = ANALYST.replace("SlowAnalyst", "Silent")
    (out / "run.json").write_text((out / "run.json").read_text().replace(ANALYST, silent))
    again = [silent if word == ANALYST else word for word in command(samples, out, "--resume")]
    before = (out / "dataset.jsonl").read_bytes()
    done = CliRunner().invoke(app, again)
    assert done.exit_code == 0, done.output
    assert (out / "dataset.jsonl").read_bytes().replace(b"Silent", b"SlowAnalyst") == before


def test_the_answers_of_a_run_can_be_given_as_authored_ones(samples: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert CliRunner().invoke(app, command(samples, first)).exit_code == 0
    authored = f"authored:{first / 'answers.jsonl'}"
    arguments = ["synthesize", str(samples), "--analyst", authored, "--out", str(second)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    rows = [json.loads(line)["output"] for line in (second / "dataset.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line)["output"] for line in (first / "dataset.jsonl").read_text().splitlines()]
    assert (first / "report.md").exists()


def test_ctrl_c_says_how_to_go_on(samples: Path, tmp_path: Path) -> None:
    process = started(command(samples, tmp_path / "out"), 0.1)
    wait_for(tmp_path / "out" / "outcomes.jsonl", 2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command with --resume goes on" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--no-checks", "--check", "form"], "exclude each other"),
        (["--check", "spelling"], "spelling"),
        (["--check", "judged_safe"], "--judge-with"),
        (["--share", "2"], "--share"),
        (["--overlap", "nowhere"], "nowhere"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(
    samples: Path, tmp_path: Path, more: list[str], problem: str
) -> None:
    done = CliRunner().invoke(app, command(samples, tmp_path / "out", *more))
    assert done.exit_code == 2
    assert problem in done.output
    assert not (tmp_path / "out" / "dataset.jsonl").exists()


def test_a_folder_with_a_run_is_not_begun_anew(samples: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, command(samples, tmp_path / "out", "--limit", "3")).exit_code == 0
    done = CliRunner().invoke(app, command(samples, tmp_path / "out"))
    assert done.exit_code == 2
    assert "--resume" in done.output
