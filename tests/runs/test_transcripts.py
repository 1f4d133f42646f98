"""The authored transcripts: they answer the stages' questions as these are now, and the dataset is what becomes of them.

The photos aren't here. Their hashes are, and those are all that a question's key needs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs.rekey import rekeyed
from vlmguard.rewriter.protocol import CATEGORIES, check_prompt, parse_output
from vlmguard.synthesis.sample import Answer, Origin, Picture, Row, Sample

FOLDER = Path(__file__).parents[2] / "data/transcripts"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


SAMPLES, ANSWERS, ROWS = (
    lines("samples.jsonl"),
    lines("answers.jsonl"),
    [Row.of(told) for told in lines("dataset.jsonl")],
)


def as_sample(told: dict[str, Any]) -> Sample:
    picture = Picture(told["image"])
    picture.__dict__["sha256"] = told["sha256"]  # what reading the photo would give
    unsafe = Answer(told["unsafe"]) if "unsafe" in told else None
    return Sample(told["id"], (picture,), told["prompt"], Origin("", ""), Answer(told["safe"]), unsafe)


def test_every_answer_answers_a_question_as_it_is_asked_now() -> None:
    risky = [as_sample(told) for told in SAMPLES if not told.get("benign")]
    assert len(risky) >= 150
    assert rekeyed(iter(risky), ANSWERS) == ANSWERS, (
        "a stage's prompt has changed: read the answers, then runs/rekey.py"
    )


def test_the_unsafe_answers_are_short() -> None:
    """They are data, and no help: room for instructions there is none."""
    assert max(len(told["unsafe"].split()) for told in SAMPLES if "unsafe" in told) <= 32


def test_every_row_comes_from_a_sample_and_carries_where_it_is_from() -> None:
    by_id = {told["id"]: told for told in SAMPLES}
    for row in ROWS:
        told = by_id[row.id]
        assert (row.prompt, row.images) == (told["prompt"], ({"path": told["image"], "sha256": told["sha256"]},))
        assert row.origin["licence"] == told["licence"]


def test_every_risky_row_is_in_the_rewriters_format_and_passes_its_checks() -> None:
    for row in ROWS:
        if not row.risky:
            assert row.kind == "helpfulness"
            continue
        rewrite = parse_output(row.output)
        assert rewrite.category in CATEGORIES
        assert rewrite.prompt is not None
        check_prompt(rewrite.prompt, row.prompt, rewrite.analysis)


def test_the_share_of_harmless_rows_is_the_papers() -> None:
    harmless = sum(not row.risky for row in ROWS)
    assert harmless / len(ROWS) == pytest.approx(977 / 9881, abs=0.005)


def test_no_situation_is_one_that_gates_are_calibrated_on() -> None:
    from runs.packaged.rows import part

    assert not [told["id"] for told in SAMPLES if not told.get("benign") and part(told["id"], 6) == 0]
