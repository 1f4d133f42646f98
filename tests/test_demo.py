import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import Result

from tests.stand_ins import ANALYSIS, Rewriter
from vlmguard.chat import Chat
from vlmguard.demo import SCENES, blocks, page
from vlmguard.drawing import bottles, card
from vlmguard.rewriter.protocol import Rewrite

Run = Callable[..., Result]


@pytest.fixture
def wary(rewriter: Rewriter, monkeypatch: pytest.MonkeyPatch) -> Rewriter:
    """The scripted rewriter, which finds the list and the bottles risky."""

    async def judge(self: Rewriter, chat: Chat) -> Rewrite:
        self.judged.append(chat)
        harmless = "bake" in chat.text or chat.text.startswith("Safely")
        return Rewrite(0.02) if harmless else Rewrite(0.97, "physical_danger")

    monkeypatch.setattr(Rewriter, "judge", judge)
    return rewriter


def test_the_demo_shows_what_changed(vlmguard: Run, wary: Rewriter) -> None:
    result = vlmguard("demo")
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    for scene in SCENES:
        assert scene.point in shown
        assert f"request {scene.text}" in shown
        assert f"unguarded You said: {scene.text}" in shown
    assert shown.count("rewrote risk 0.970") == 2
    assert shown.count("passed risk 0.020") == 1
    assert shown.count("guarded You said: Safely:") == 2
    assert [len(chat.images) for chat in wary.judged] == [1, 0, 1, 0, 1]  # a rewritten request is judged again


def test_it_writes_files_only_where_it_is_told_to(vlmguard: Run, wary: Rewriter, working_folder: Path) -> None:
    assert vlmguard("demo").exit_code == 0
    assert not list(working_folder.iterdir())
    assert vlmguard("demo", "--out", "demo").exit_code == 0
    names = {path.name for path in (working_folder / "demo").iterdir()}
    assert names == {f"{scene.name}{end}" for scene in SCENES for end in (".png", "-guarded.png")} | {"results.json"}
    results = json.loads((working_folder / "demo" / "results.json").read_text())
    assert [record["action"] for record in results] == ["rewrote", "rewrote", "passed"]
    assert all(record["unguarded"] == f"You said: {record['original']}" for record in results)


def test_the_picture_of_a_guarded_request(vlmguard: Run, wary: Rewriter, working_folder: Path) -> None:
    result = vlmguard("demo", "--png", "docs/images/guarded.png")
    assert (result.exit_code, len(wary.judged)) == (0, 2)
    with Image.open(working_folder / "docs/images/guarded.png") as picture:
        assert picture.size[0] == 2400
        assert picture.size[1] < 2400


def test_a_file_that_cannot_be_written_is_one_line(vlmguard: Run, wary: Rewriter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = vlmguard("demo", "--png", tmp_path / "file" / "a.png")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.name)
def test_the_pictures_are_ours_and_always_the_same(scene: object) -> None:
    first, second = scene.draw(), scene.draw()  # type: ignore[attr-defined]
    assert (first.mode, first.size) == ("RGB", (640, 640))
    assert first.tobytes() == second.tobytes()
    assert len(first.getcolors(first.width * first.height)) > 100


@pytest.mark.parametrize("action", ["passed", "rewrote", "refused", "flagged"])
def test_every_verdict_has_its_card(action: str) -> None:
    record = {
        "action": action,
        "risk": 0.5,
        "threshold": 0.4,
        "category": None if action == "passed" else "fraud",
        "analysis": None if action == "passed" else vars(ANALYSIS),
        "original": "",
        "prompt": "A long prompt. " * 200,
        "unguarded": "One.\n\nTwo.",
        "answer": None,
    }
    picture = card(record, bottles([("X", "y", "#2563eb")]))
    assert 600 < picture.height < 2500


def test_the_terminal_shows_the_picture_where_it_has_colours() -> None:
    picture = Image.new("RGB", (20, 10), "red")
    assert [len(line) for line in blocks(picture, 8).plain.splitlines()] == [8, 8]
    record = {
        **dict.fromkeys(("risk", "threshold", "category", "analysis", "answer", "prompt")),
        "action": "passed",
        "original": "hi",
        "unguarded": "ho",
        "usage": {"calls": 1, "tokens": 2, "seconds": 0.1},
        "models": {"rewriter": "r", "target": "t"},
    }
    for colours, blocks_shown in ((None, False), ("truecolor", True)):
        console = Console(file=io.StringIO(), force_terminal=True, color_system=colours, no_color=False, width=80)  # type: ignore[arg-type]
        with console.capture() as shown:
            console.print(page(SCENES[0], picture, record, console))
        assert ("▀" in shown.get()) == blocks_shown
