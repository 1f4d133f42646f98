import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import Result

from tests.chat_server import ChatServer
from tests.stand_ins import ANALYSIS, THRESHOLD, Rewriter, read_lines, write_lines
from vlmguard.commands import doctor
from vlmguard.commands.terminal import one_line, shown
from vlmguard.rewriter.protocol import CATEGORIES

Run = Callable[..., Result]
TARGET = "packaged:assistant"


def guarded(vlmguard: Run, *arguments: object, **more: Any) -> dict[str, Any]:
    result = vlmguard("guard", *arguments, "--json", **more)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    record: dict[str, Any] = json.loads(result.stdout)
    return record


def test_json_is_one_object_with_every_field(vlmguard: Run, picture: Path) -> None:
    record = guarded(vlmguard, "a risky thing", "--image", picture, "--target", TARGET)
    usage = record.pop("usage")
    assert record == {
        "action": "rewrote",
        "risk": 0.9,
        "threshold": THRESHOLD,
        "category": "fraud",
        "analysis": vars(ANALYSIS),
        "prompt": "Safely: a risky thing",
        "original": "a risky thing",
        "answer": "You said: Safely: a risky thing",
        "models": {"rewriter": "scripted:rewriter", "target": TARGET},
    }
    assert set(usage) == {"calls", "tokens", "seconds"}
    assert usage["calls"] == 4  # the gate, the rewriter, the gate on its output, the target
    assert usage["tokens"] > 0


def test_a_harmless_request_passes_as_it_is(vlmguard: Run) -> None:
    record = guarded(vlmguard, "what is this?", "--target", TARGET)
    assert (record["action"], record["prompt"], record["analysis"]) == ("passed", "what is this?", None)
    assert record["answer"] == "You said: what is this?"


def test_without_a_target_nothing_is_asked(vlmguard: Run) -> None:
    record = guarded(vlmguard, "a risky thing")
    assert record["answer"] is None
    assert record["models"]["target"] is None
    assert record["prompt"] == "Safely: a risky thing"


@pytest.mark.parametrize(
    ("policy", "action", "prompt"),
    [
        ("off", "passed", "a risky thing"),
        ("shadow", "flagged", "a risky thing"),
        ("rewrite", "rewrote", "Safely: a risky thing"),
        ("block", "refused", None),
    ],
)
def test_each_policy(vlmguard: Run, policy: str, action: str, prompt: str | None) -> None:
    record = guarded(vlmguard, "a risky thing", "--policy", policy)
    assert (record["action"], record["prompt"]) == (action, prompt)


def test_the_threshold_decides(vlmguard: Run) -> None:
    record = guarded(vlmguard, "a risky thing", "--threshold", "0.95")
    assert (record["action"], record["threshold"]) == ("passed", 0.95)


def test_a_picture_without_words_is_guarded(vlmguard: Run, picture: Path, rewriter: Rewriter) -> None:
    for arguments in (("--image", picture), ("", "--image", picture)):
        record = guarded(vlmguard, *arguments)
        assert (record["action"], record["original"]) == ("passed", "")
    assert [len(chat.images) for chat in rewriter.judged] == [1, 1]


def test_pictures_keep_their_order_and_the_system_message_stands_first(
    vlmguard: Run, picture: Path, tmp_path: Path, png: bytes, rewriter: Rewriter
) -> None:
    second = tmp_path / "second.png"
    second.write_bytes(png)
    guarded(vlmguard, "compare", "-i", picture, "-i", second, "--system", "Be brief.")
    (chat,) = rewriter.judged
    assert [turn.role for turn in chat.messages] == ["system", "user"]
    assert len(chat.images) == 2
    assert len(chat.images[0].url) != len(chat.images[1].url)


def test_a_dash_reads_standard_input(vlmguard: Run) -> None:
    assert guarded(vlmguard, "-", stdin="¿qué es esto?\n")["original"] == "¿qué es esto?\n"


def test_a_path_in_the_text_is_not_opened(vlmguard: Run, rewriter: Rewriter) -> None:
    guarded(vlmguard, "/etc/hostname")
    assert rewriter.judged[0].text == "/etc/hostname"
    assert not rewriter.judged[0].images


def test_a_reader_sees_the_verdict_and_why(vlmguard: Run) -> None:
    result = vlmguard("guard", "a risky thing", "--target", TARGET)
    assert result.exit_code == 0
    for text in ("rewrote", "risk 0.900, threshold 0.500", "fraud", *vars(ANALYSIS).values()):
        assert text in result.stdout
    assert "You said: Safely: a risky thing" in result.stdout
    assert "4 calls" in result.stdout


def test_nothing_from_outside_steers_the_terminal(vlmguard: Run) -> None:
    result = vlmguard("guard", "\x1b[2J\x9b31m\x07 [red]hi[/] \x00")
    assert not set("\x1b\x9b\x07\x00") & set(result.stdout)
    assert "[red]hi[/]" in result.stdout
    console = Console(file=io.StringIO(), force_terminal=True)
    console.print(shown("\x1b]0;title\x07"))
    assert "\x1b" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_emoji_and_halves_of_them_print(vlmguard: Run) -> None:
    assert guarded(vlmguard, "👍 ça va 日本")["original"] == "👍 ça va 日本"
    result = vlmguard("guard", "half \ud83d", "--json")
    assert (result.exit_code, json.loads(result.stdout)["error"]["type"]) == (2, "BadRequest")


def test_batch(vlmguard: Run, tmp_path: Path, picture: Path) -> None:
    file = write_lines(
        tmp_path / "in.jsonl", {"id": "a", "text": "hi"}, {"id": 2, "text": "risky", "image": picture.name}
    )
    out = tmp_path / "out.jsonl"
    result = vlmguard("guard", "--batch", file, "--out", out, "--target", TARGET)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "2 rows; 1 passed, 1 rewrote; 0 with an error" in result.stderr
    assert str(out) in result.stderr.replace("\n", "")
    first, second = read_lines(out)
    assert (first["id"], first["action"], first["answer"]) == ("a", "passed", "You said: hi")
    assert list(second) == ["id", *json.loads(vlmguard("guard", "hi", "--json").stdout)]
    assert second["id"] == 2


def test_batch_gate_only_says_what_the_policy_would_do(vlmguard: Run, tmp_path: Path) -> None:
    file = write_lines(tmp_path / "in.jsonl", {"id": "a", "text": "hi"}, {"id": "b", "text": "risky"})
    out = tmp_path / "out.jsonl"
    result = vlmguard("guard", "--batch", file, "--out", out, "--gate-only", "--json")
    assert json.loads(result.stdout)["actions"] == {"flagged": 1, "passed": 1}
    records = read_lines(out)
    assert [record["action"] for record in records] == ["passed", "flagged"]
    assert [(record["prompt"], record["analysis"], record["risk"]) for record in records] == [
        (None, None, 0.1),
        (None, None, 0.9),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["guard", "hi", "--gate-only"], "belong to --batch"),
        (["guard", "hi", "--batch", "in.jsonl", "--out", "o"], "takes its requests from the file"),
        (["guard", "--batch", "in.jsonl"], "--out"),
        (
            ["guard", "--batch", "in.jsonl", "--out", "o", "--gate-only", "--target", TARGET],
            "--gate-only asks no target",
        ),
        (["guard", "--batch", "absent.jsonl", "--out", "o"], "cannot be read"),
        (["guard", "--batch", "in.jsonl", "--out", "in.jsonl"], "the output is the input"),
        (["guard", "--batch", "in.jsonl", "--out", "no/folder"], "cannot be written"),
        (["guard", "--batch", ".", "--out", "o"], "is not a file"),
    ],
)
def test_wrong_combinations(vlmguard: Run, working_folder: Path, arguments: list[str], said: str) -> None:
    write_lines(working_folder / "in.jsonl", {"id": 1, "text": "hi"})
    result = vlmguard(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert said in result.stderr.replace("\n", " ")
    assert not (working_folder / "o").exists()


def test_list(vlmguard: Run) -> None:
    everything = json.loads(vlmguard("list", "--json").stdout)
    assert list(everything) == ["guards", "vlms", "rewriters", "sources", "judges", "categories"]
    assert {entry["name"] for entry in everything["categories"]} == set(CATEGORIES)
    assert json.loads(vlmguard("list", "guards", "--json").stdout) == {"guards": everything["guards"]}
    assert all(entry["what"].endswith(".") for entry in everything["guards"])
    page = vlmguard("list").stdout
    assert all(entry["name"] in page for entries in everything.values() for entry in entries)


def test_pull_says_where(monkeypatch: pytest.MonkeyPatch, vlmguard: Run, tmp_path: Path) -> None:
    monkeypatch.setenv("VLMGUARD_CACHE", str(tmp_path))
    monkeypatch.setattr("vlmguard.vlms.assemble.ensure", lambda report: report("Fetching"))
    result = vlmguard("pull")
    assert result.exit_code == 0
    assert "Fetching" in result.stderr
    assert f"{tmp_path}/base-1" in result.stdout


def test_doctor_on_a_sound_machine(monkeypatch: pytest.MonkeyPatch, vlmguard: Run) -> None:
    monkeypatch.setattr("vlmguard.vlms.assemble.state", lambda: "ready")
    monkeypatch.setenv("VLMGUARD_API_KEY", "sk-secret")
    result = vlmguard("doctor", "--json")
    report = json.loads(result.stdout)
    checks = {check["name"]: check for check in report["checks"]}
    assert (result.exit_code, report["ok"]) == (0, True), report
    assert {"Python", "vlmguard-r1", "torch", "packaged base", "disk", "CPU"} <= set(checks)
    assert checks["VLMGUARD_API_KEY"]["detail"] == "set"
    assert "sk-secret" not in result.stdout
    assert "OPENAI_API_KEY" in vlmguard("doctor").stdout


@pytest.mark.parametrize(("state", "code"), [("damaged", 1), ("absent", 0)])
def test_doctor_says_what_to_do_about_the_cache(
    monkeypatch: pytest.MonkeyPatch, vlmguard: Run, state: str, code: int
) -> None:
    monkeypatch.setattr("vlmguard.vlms.assemble.state", lambda: state)
    result = vlmguard("doctor")
    assert result.exit_code == code
    assert "run: vlmguard pull" in result.stdout


def test_doctor_asks_for_local_packages_only_where_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, vlmguard: Run
) -> None:
    monkeypatch.setattr(doctor, "_installed", lambda name: None)
    monkeypatch.setattr("vlmguard.vlms.assemble.state", lambda: "ready")
    result = vlmguard("doctor", "--json")
    assert result.exit_code == 1
    broken = [check for check in json.loads(result.stdout)["checks"] if check["state"] == "broken"]
    assert [check["remedy"] for check in broken] == ['pip install "vlmguard-r1[local]"']
    assert [check.state for check in doctor.packages("local", needed=False)] == ["note"]


async def test_doctor_reaches_an_endpoint() -> None:
    async with ChatServer({}) as server:
        check = await doctor.reach(f"{server.url}#some-model")
    assert check.state in ("note", "broken")
    assert (await doctor.reach(f"{server.url}#some-model")).detail.startswith("cannot be reached")
    assert (await doctor.reach("http://127.0.0.1:1/v1")).state == "broken"


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [(200, '{"data":[{"id":"m"}]}', "ok"), (200, "{}", "broken"), (401, "", "broken"), (404, "", "note")],
)
def test_what_an_endpoint_answers(status: int, body: str, state: str) -> None:
    assert doctor._answered("name", status, body, "m").state == state


def test_version(vlmguard: Run) -> None:
    result = vlmguard("--version")
    assert (result.exit_code, result.stdout.split()[0]) == (0, "vlmguard")


@pytest.mark.parametrize("command", ["guard", "list", "pull", "doctor", "demo"])
def test_every_command_has_help_that_fits(vlmguard: Run, command: str) -> None:
    result = vlmguard(command, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom vlmguard.cli import app\n"
        "try: app(['guard', '--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'aiohttp', 'PIL', 'numpy') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True)
    assert done.stderr.strip() == "[]"


def test_an_error_is_one_line_though_its_remedy_is_a_list() -> None:
    assert one_line("no VLM. Write one of:\n  a: b\n  c: d\n") == "no VLM. Write one of: a: b; c: d"
