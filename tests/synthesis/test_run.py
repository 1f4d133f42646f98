"""A run from its source to its dataset: interrupted at any moment, it ends with the same files."""

from __future__ import annotations

import errno
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.synthesis.standing_in import StandIn, png, sample
from vlmguard.errors import ConfigError, Timeout, VLMGuardError
from vlmguard.synthesis.engines import Found, local
from vlmguard.synthesis.pipeline import Pipeline
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.run import MOST_FAILURES, Folder, Progress, run, write_dataset
from vlmguard.synthesis.sample import Malformed, Picture, Row, Sample

RECIPE = Recipe("samples.jsonl", "authored:answers.jsonl")
Samples = Callable[[], Iterator[Sample | Malformed]]


def source(count: int = 12) -> Samples:
    def samples() -> Iterator[Sample | Malformed]:
        for number in range(count):
            if number % 5 == 4:
                yield Malformed(f"s{number}", "its prompt is no text")
            else:
                yield sample(f"s{number}", prompt=f"Pose number {number}?", benign=number % 5 == 3)

    return samples


async def made(folder: Path, samples: Samples, analyst: StandIn | None = None, **given: Any) -> Progress:
    pipeline = Pipeline(analyst or StandIn())

    def engine(todo: Iterator[Sample | Malformed]) -> AsyncIterator[Found]:
        return local(todo, pipeline, 3)

    resume = given.pop("resume", False)
    recipe = given.pop("recipe", RECIPE)
    with Folder(folder, recipe, resume=resume) as opened:
        progress = await run(opened, samples, engine, **given)
        write_dataset(opened, samples, lambda sample, row: None)
    return progress


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


async def test_every_sample_is_a_row_or_a_reason_in_the_sources_order(tmp_path: Path) -> None:
    progress = await made(tmp_path, source())
    rows, dropped = lines(tmp_path / "dataset.jsonl"), lines(tmp_path / "dropped.jsonl")
    assert [row["id"] for row in rows] == [f"s{n}" for n in range(12) if n % 5 != 4]
    assert [one["id"] for one in dropped] == ["s4", "s9"]
    assert all(one["reason"] for one in dropped)
    assert (progress.done, progress.kept, progress.calls) == (12, 10, 24)
    assert [Row.of(row).fields() for row in rows] == rows


async def test_a_picture_that_lay_in_no_file_is_written_down_once(tmp_path: Path) -> None:
    await made(tmp_path, source())
    first = lines(tmp_path / "dataset.jsonl")[0]["images"][0]
    assert (tmp_path / first["path"]).read_bytes() == png()
    assert [path.name for path in (tmp_path / "images").iterdir()] == [f"{first['sha256']}.png"]


async def test_a_picture_in_a_file_stays_there(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(png())
    one = sample("a", pictures=(Picture("x.png", tmp_path / "x.png"),))
    await made(tmp_path / "out", lambda: iter([one]))
    assert lines(tmp_path / "out/dataset.jsonl")[0]["images"][0]["path"] == "x.png"
    assert not (tmp_path / "out/images").exists()


async def test_a_run_that_was_torn_ends_like_one_that_was_not(tmp_path: Path) -> None:
    await made(tmp_path / "whole", source())
    outcomes = (tmp_path / "whole/outcomes.jsonl").read_bytes()
    for cut in (0, 1, len(outcomes) // 3, len(outcomes) - 7, len(outcomes)):
        torn = tmp_path / f"torn-{cut}"
        torn.mkdir()
        (torn / "run.json").write_text(json.dumps(RECIPE.fields()))
        (torn / "outcomes.jsonl").write_bytes(outcomes[:cut])
        (torn / "dataset.jsonl.unfinished").write_text("half")
        await made(torn, source(), resume=True)
        for name in ("dataset.jsonl", "dropped.jsonl"):
            assert (torn / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        ids = [told["id"] for told in lines(torn / "outcomes.jsonl")]
        assert len(ids) == len(set(ids)) == 12


async def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    await made(tmp_path, source())
    analyst = StandIn({"hindsight": AssertionError("asked again")})
    progress = await made(tmp_path, source(), analyst, resume=True)
    assert (progress.before, progress.done, progress.calls) == (12, 0, 24)


async def test_a_sample_whose_model_was_away_is_tried_again(tmp_path: Path) -> None:
    away = StandIn({"causal": lambda question: Timeout("late") if question.sample.id == "s2" else _report()})
    progress = await made(tmp_path, source(), away)
    assert progress.failed == 1
    assert "s2" not in {row["id"] for row in lines(tmp_path / "dataset.jsonl")}
    assert (await made(tmp_path, source(), resume=True)).done == 1
    assert [row["id"] for row in lines(tmp_path / "dataset.jsonl")][:3] == ["s0", "s1", "s2"]


def _report() -> dict[str, Any]:
    from tests.synthesis.standing_in import REPORT

    return REPORT


async def test_a_model_that_stays_away_ends_the_run_and_loses_nothing(tmp_path: Path) -> None:
    analyst = StandIn({"hindsight": Timeout("late")})
    with pytest.raises(VLMGuardError, match=r"20 samples in a row.*--resume"):
        await made(tmp_path, source(MOST_FAILURES * 3), analyst)
    assert all(told["ended"] in ("source", "kept") for told in lines(tmp_path / "outcomes.jsonl"))


async def test_no_sample_is_begun_beyond_the_budget(tmp_path: Path) -> None:
    progress = await made(tmp_path, source(60), budget_tokens=200)  # a sample costs 45
    assert progress.stopped == "the budget of 200 tokens is spent"
    assert 200 <= progress.tokens <= 200 + 45 * 9
    again = await made(tmp_path, source(60), budget_tokens=200, resume=True)
    assert (again.done, again.tokens) == (0, progress.tokens)
    assert (await made(tmp_path, source(60), resume=True)).stopped is None
    assert len(lines(tmp_path / "dataset.jsonl")) == 48


async def test_a_limit_takes_the_first_and_may_grow(tmp_path: Path) -> None:
    await made(tmp_path, source(), recipe=replace(RECIPE, limit=3))
    assert len(lines(tmp_path / "dataset.jsonl")) == 3
    await made(tmp_path, source(), recipe=replace(RECIPE, limit=6), resume=True)
    assert len(lines(tmp_path / "dataset.jsonl")) == 5


def test_a_folder_with_another_run_is_left_alone(tmp_path: Path) -> None:
    Folder(tmp_path, RECIPE, resume=False).__exit__()
    with pytest.raises(ConfigError, match="--resume"):
        Folder(tmp_path, RECIPE, resume=False)
    with pytest.raises(ConfigError, match="a run with other analyst, share"):
        Folder(tmp_path, replace(RECIPE, analyst="other", share=0.2), resume=True)
    with Folder(tmp_path, RECIPE, resume=True), pytest.raises(ConfigError, match="another process"):
        Folder(tmp_path, RECIPE, resume=True)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ConfigError, match="damaged"):
        Folder(tmp_path, RECIPE, resume=True)


async def test_a_full_disk_leaves_the_dataset_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await made(tmp_path, source(3))
    before = (tmp_path / "dataset.jsonl").read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Folder(tmp_path, RECIPE, resume=True) as opened:
        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(VLMGuardError, match="Make room"):
            write_dataset(opened, source(3), lambda sample, row: None)
    assert (tmp_path / "dataset.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"checks": ("form", "spelling")}, "spelling"),
        ({"checks": ("judged_safe",)}, "--judge-with"),
        ({"checks": ("better_answer",), "judge": "x"}, "--verify-with"),
        ({"share": 1.0}, "--share"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        replace(RECIPE, **given)
