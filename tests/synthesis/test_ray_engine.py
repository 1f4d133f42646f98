"""The engine on a local Ray: the same rows as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.synthesis.test_command import ANALYST, samples
from vlmguard.cli import app

pytestmark = [
    pytest.mark.slow,  # Ray takes a minute to begin and to end on two cores
    pytest.mark.filterwarnings("ignore"),  # Ray warns of its own deprecations and open files
    pytest.mark.enable_socket,
]
__all__ = ["samples"]


def test_ray_makes_the_same_rows_as_one_process(samples: Path, tmp_path: Path) -> None:
    for engine in ("local", "ray"):
        arguments = ["synthesize", str(samples), "--analyst", ANALYST, "--out", str(tmp_path / engine)]
        done = CliRunner().invoke(app, [*arguments, "--concurrency", "4", "--engine", engine])
        assert done.exit_code == 0, done.output
    for name in ("dataset.jsonl", "dropped.jsonl"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
