"""docs/rewriter.md: its commands are ours, its samples are samples, its files are there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.synthesis.standing_in import png
from vlmguard.cli import app
from vlmguard.synthesis.recipe import CHECKS
from vlmguard.synthesis.sample import Sample
from vlmguard.synthesis.sources import opened

DOCS = Path(__file__).parent.parent / "docs"
TEXT = (DOCS / "rewriter.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", [one for one in COMMANDS if one[1] != "list"], ids=" ".join)
def test_each_command_is_one_of_ours(command: list[str]) -> None:
    """The option --help at its end makes the parser look at all that is before it."""
    assert command[0] == "vlmguard"
    known = CliRunner().invoke(app, [*command[1 : 3 if command[1] == "train" else 2], "--help"], env={"COLUMNS": "300"})
    assert known.exit_code == 0
    for option in (word for word in command if re.match("--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", known.output), f"{option} is no option"


def test_the_samples_are_samples(tmp_path: Path) -> None:
    found = re.search(r"^```jsonl samples.jsonl\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    assert found
    (tmp_path / "samples.jsonl").write_text(found[1])
    (tmp_path / "cliff.png").write_bytes(png())
    samples = list(opened(str(tmp_path / "samples.jsonl")))
    assert all(isinstance(one, Sample) for one in samples)
    assert [json.loads(line)["id"] for line in found[1].splitlines()] == [one.id for one in samples]


def test_every_check_is_told_of() -> None:
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == set(CHECKS)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        assert (DOCS / target).exists(), target
