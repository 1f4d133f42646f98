"""The README's examples run, its tree is the real one, and its links lead somewhere."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vlmguard.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
Run = Callable[..., Result]


def blocks(info: str) -> list[str]:
    """The fenced blocks whose opening line says exactly `info`."""
    return re.findall(rf"^```{re.escape(info)}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands(info: str) -> list[list[str]]:
    lines = [line for block in blocks(info) for line in block.splitlines()]
    return [shlex.split(re.sub(r"\s#\s.*", "", line)) for line in lines]


@pytest.fixture
def as_the_readme_says(working_folder: Path) -> Path:
    """The files that the examples name."""
    Image.new("RGB", (64, 48), "white").save(working_folder / "label.png")
    (working_folder / "requests.jsonl").write_text(blocks("jsonl requests.jsonl")[0])
    return working_folder


@pytest.mark.parametrize("command", [it for it in commands("sh") if it[0] == "vlmguard"], ids=" ".join)
def test_each_command_runs(vlmguard: Run, as_the_readme_says: Path, command: list[str]) -> None:
    result = vlmguard(*command[1:])
    assert result.exit_code == 0, result.output
    assert "0 with an error" in result.stderr or "--batch" not in command


@pytest.mark.parametrize("command", commands("sh server"), ids=" ".join)
def test_each_command_for_a_server_is_one_of_ours(vlmguard: Run, as_the_readme_says: Path, command: list[str]) -> None:
    result = vlmguard(*command[1:])
    assert "No such" not in result.output
    assert result.exit_code in (0, 1, 4), result.output  # understood, whether a server is there or not


def test_every_make_target_is_there() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = README + (ROOT / "CONTRIBUTING.md").read_text()
    named = re.findall(r"^make ([a-z]+)|`make ([a-z]+)", text, re.MULTILINE)
    assert named
    assert {first or second for first, second in named} <= set(targets)


def test_every_extra_is_there() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\[([a-z]+)\](?!\()", README)) <= set(extras)


def test_the_python_runs(vlmguard: Run, as_the_readme_says: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out == "passed 0.1 None\nYou said: What does this label say?\n"


def tree() -> Iterator[str]:
    """The paths in the README's tree, folders with a slash."""
    folder = ""
    for line in blocks("text")[0].splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if len(line.split()) == 1 else ""
        yield folder + name if line.startswith(" ") else name


def test_the_tree_is_the_real_one() -> None:
    drawn = set(tree())
    package = ROOT / "src" / "vlmguard"
    own = {path for path in package.iterdir() if path.name[0] not in "_." and path.suffix != ".typed"}
    top = {path for path in ROOT.iterdir() if path.name[0] != "." and path.name not in ("README.md", "src")}
    made = {"build", "dist", "demo", "out"}
    real = {f"{path.relative_to(ROOT)}{'/' * path.is_dir()}" for path in own | top if path.name not in made}
    assert drawn - {"src/vlmguard/"} == real


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", commands("sh gateway"), ids=" ".join)
def test_each_command_of_the_gateway_is_one_of_ours(command: list[str]) -> None:
    """They serve until they are stopped: here their options are read, and no more."""
    result = CliRunner().invoke(app, [*command[1:], "--help"])
    assert result.exit_code == 0, result.output
    wrong = CliRunner().invoke(app, [*command[1:], "--wrong", "--help"])
    assert wrong.exit_code == 2
