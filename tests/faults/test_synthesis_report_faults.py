"""Faults that neighbours' users reported, as far as the report of a synthesis is concerned; see FAULTS.md."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.synthesis.standing_in import sample
from vlmguard.chat import Usage
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.synthesis.checks import Form, JudgedSafe, LanguageKept
from vlmguard.synthesis.report import write_report
from vlmguard.synthesis.sample import Outcome, Row

REASONS = {
    "source": "line 3 is no JSON object",
    "answers": "the model gave an empty answer",
    "hindsight": "the analyst's answer is no JSON object",
    "causal": "the analyst finds no risk in it",
    "form": "the rewritten prompt is the request itself",
    "overlap": "it is in an evaluation set: the text of figstep.jsonl, row 7",
    "duplicate": "it is nearly the same as a-1",
    "share": "there are more harmless rows than their share",
}


def test_f111_every_dropped_row_has_its_reason_in_the_report(tmp_path: Path) -> None:
    """A pipeline that dropped rows and only told how many were left."""
    outcomes = [Outcome("kept-1", "kept", row=Row("kept-1", (), "?", "safe", "helpfulness", {}))]
    outcomes += [Outcome(f"{place}-{at}", place, why) for place, why in REASONS.items() for at in range(2)]
    text = write_report(tmp_path, outcomes, {}).read_text("utf-8").replace("\\", "")
    for place, why in REASONS.items():
        assert f"| {place} | {why} | 2 |" in text
        assert f"| {place} | {place}-1 | {why} |" in text
    assert "17 samples were read: 1 are kept and 16 dropped." in text


@pytest.mark.parametrize(
    ("outcome", "fault"),
    [
        (lambda: Outcome("a", "causal"), "without a reason"),
        (lambda: Outcome("a", "causal", " \n"), "without a reason"),
        (lambda: Outcome("a", "kept", costs={"causal": Usage(1)}), "kept without a row"),
        (lambda: Outcome("a", "share", "too many", Row("a", (), "?", "safe", "helpfulness", {})), "has a row"),
    ],
)
def test_f111_no_sample_ends_without_a_row_or_a_reason(outcome: Callable[[], Outcome], fault: str) -> None:
    """A count that adds up isn't enough: a sample that ended nowhere must not be counted as dropped."""
    with pytest.raises(ValueError, match=f"'a' .*{fault}"):
        outcome()


async def test_f111_a_check_that_drops_a_row_says_why_in_a_sentence() -> None:
    """A filter that was given as the reason by its name alone."""

    class Worried:
        name, threshold = "worried", 0.5

        async def judge(self, chat: object) -> Rewrite:
            return Rewrite(0.9)

        async def __call__(self, chat: object, verdict: object = None) -> Rewrite:
            raise AssertionError

        async def aclose(self) -> None:
            """Nothing is open."""

    other_letters = Rewrite(1.0, "fraud", Analysis("A.", "B.", "C."), "Какая поза подойдёт здесь лучше всего?")
    for check in (Form(), LanguageKept(), JudgedSafe(Worried())):
        found = await check(sample(), other_letters)
        assert found.reason is not None
        assert re.fullmatch(r"\w+( \S+){4,}", found.reason)
        assert render_output(other_letters) not in found.reason
