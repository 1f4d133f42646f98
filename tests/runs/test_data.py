"""Our own data: enough of it, of every kind, and well formed."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from runs.packaged import pictures, rows
from vlmguard.rewriter.protocol import CATEGORIES, Analysis, Rewrite, parse_output, render_output

DATA = Path(__file__).parents[2] / "data"
SITUATIONS = [row for path in sorted((DATA / "situations").glob("*.jsonl")) for row in rows.lines(path)]


def test_there_are_situations_of_every_kind() -> None:
    assert len(SITUATIONS) >= 400
    assert len({row["id"] for row in SITUATIONS}) == len(SITUATIONS)
    where = Counter(row["where"] for row in SITUATIONS)
    assert set(where) == {"text", "picture", "together", "benign"}
    assert min(where.values()) >= 100
    kinds = Counter(row["category"] for row in SITUATIONS if row["where"] != "benign")
    assert set(kinds) == set(CATEGORIES)
    assert {"ja", "zh", "es", "fr", "de"} <= {row.get("language") for row in SITUATIONS}


def test_a_risky_situation_has_analysis_rewrite_and_twin() -> None:
    for row in SITUATIONS:
        if row["where"] == "benign":
            continue
        assert set(row["analysis"]) == {"text", "image", "together"}, row["id"]
        assert row["prompt"].strip(), row["id"]
        assert row["twins"], row["id"]


def test_every_rewrite_is_in_the_protocol() -> None:
    for row in SITUATIONS:
        if row["where"] != "benign":
            made = Rewrite(1.0, row["category"], Analysis(**row["analysis"]), row["prompt"])
            assert parse_output(render_output(made)).prompt == " ".join(row["prompt"].split()), row["id"]


def test_the_held_out_share_is_by_situation() -> None:
    cases = rows.load(DATA, {})
    held = {case.situation for case in cases if case.held}
    assert not held & {case.situation for case in cases if not case.held}
    assert 0.1 < len(held) / len({case.situation for case in cases}) < 0.25


def test_a_new_situation_changes_no_other(tmp_path: Path) -> None:
    def folder(name: str, kept: list[Any]) -> Path:
        for part in ("situations", "requests"):
            (tmp_path / name / part).mkdir(parents=True)
        (tmp_path / name / "situations/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        return tmp_path / name

    few, more = (
        rows.load(folder("few", SITUATIONS[:5]), {}),
        rows.load(folder("more", SITUATIONS[7:9] + SITUATIONS[:5]), {}),
    )
    assert [case for case in more if case in few] == few


@pytest.mark.parametrize("kind", ["typeset", "strip", "sign", "label", "chat", "document"])
def test_a_drawn_picture_is_the_same_again(kind: str) -> None:
    spec = {kind: ["KEEP OUT", "of the water"] if kind != "label" else "BLEACH"}
    first, second = (pictures.draw(spec, random.Random(3)) for _ in range(2))
    assert first.tobytes() == second.tobytes()
    assert first.mode == "RGB"
