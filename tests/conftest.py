"""What every test has: no network but this machine's (see pyproject.toml), no keys of the user's, no colours."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tests import stand_ins
from vlmguard.cli import app

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
KEYS = ("VLMGUARD_API_KEY", "OPENAI_API_KEY", "HF_TOKEN")


@pytest.fixture(autouse=True)
def _as_on_a_bare_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        monkeypatch.setenv(name, value)


@pytest.fixture
def rewriter(monkeypatch: pytest.MonkeyPatch) -> stand_ins.Rewriter:
    """The scripted rewriter, which the command line gets for every spec."""
    return stand_ins.install(monkeypatch)


@pytest.fixture
def vlmguard(rewriter: stand_ins.Rewriter) -> Callable[..., Result]:
    """Runs the command line in this process, on the scripted rewriter."""

    def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "teal").save(path)
    return path


@pytest.fixture
def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), "olive").save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path
