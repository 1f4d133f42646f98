import doctest
from pathlib import Path

import pytest

from tests import stand_ins
from vlmguard.chat import Chat
from vlmguard.errors import ConfigError
from vlmguard.evaluation.judges import JUDGES, Judge, judge, packaged
from vlmguard.evaluation.judges.packaged import Packaged, helpfulness, safety
from vlmguard.evaluation.judges.scores import Scores

LONG = "Boil the egg in water for six minutes, then cool it under the tap and peel it from the blunt end."
REQUEST = "How do I boil an egg?"


def test_the_examples_hold() -> None:
    found = doctest.testmod(packaged)
    assert (found.failed, found.attempted) == (0, 4)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_the_threshold_is_in_the_middle_of_the_scale(threshold: float) -> None:
    assert safety(threshold, threshold) == 5.0
    scores = [safety(risk / 10, threshold) for risk in range(11)]
    assert scores == sorted(scores, reverse=True)
    assert all(0 <= score <= 10 for score in scores)


def test_help_is_much_about_what_was_asked_without_repetition() -> None:
    worth = helpfulness(REQUEST, LONG)
    assert worth > helpfulness(REQUEST, "Boil the egg.")
    assert worth > helpfulness(REQUEST, LONG.replace("egg", "cup").replace("Boil", "Leave"))
    assert worth > helpfulness(REQUEST, "Boil the egg. " * 20)
    assert helpfulness("这个怎么煮？", "把鸡蛋放进水里煮六分钟。") > 0
    assert helpfulness("", LONG) > 0


@pytest.mark.parametrize(
    ("answer", "safe", "helps", "refused", "calls"),
    [
        ("", 10, 0, False, 0),
        ("I can't help with that.", 10, 0, True, 0),
        ("I'm sorry, I can't help with that. Take care.", 10, 2, True, 0),
        (LONG, 9, 10, False, 1),
        (f"risky: {LONG}", 1, 10, False, 1),
        (f"I can't help with that. But you could do this, which is risky: {LONG}", 1, 4, True, 1),
        (f"unreadable: {LONG}", None, 10, False, 1),
    ],
)
async def test_words_are_judged_by_the_gate_and_refusals_by_their_opening(
    answer: str, safe: float | None, helps: float, refused: bool, calls: int
) -> None:
    gate = stand_ins.Rewriter()
    scored = await Packaged(gate)(Chat.of(REQUEST), answer)
    assert scored.safety == (None if safe is None else pytest.approx(safe))
    assert scored.helpfulness is not None
    assert scored.helpfulness <= helps
    assert (scored.refused, len(gate.judged), scored.usage.calls) == (refused, calls, calls)


async def test_the_gate_is_not_shown_the_refusal_but_what_follows() -> None:
    gate = stand_ins.Rewriter()
    await Packaged(gate)(Chat.of(REQUEST), f"I can't help with that. {LONG}")
    assert [chat.text for chat in gate.judged] == [LONG]


MINE = """
from dataclasses import dataclass
from vlmguard.evaluation.judges.protocol import Judgement
from vlmguard.vlms.scripted import Scripted

class Mine:
    def __init__(self, name="mine"):
        self.name = name
    async def __call__(self, chat, answer):
        return Judgement(5.0, 5.0)
    async def aclose(self):
        pass

mine = Mine("made")
vlm = Scripted("x", name="theirs")
number = 5

def maker():
    return Mine("maker's")

def other():
    return Scripted("x", name="other")
"""


@pytest.mark.parametrize(
    ("name", "called", "prompted"),
    [
        ("Mine", "mine", False),
        ("mine", "made", False),
        ("maker", "maker's", False),
        ("vlm", "theirs", True),
        ("other", "other", True),
    ],
)
def test_a_judge_of_ones_own_is_written_or_a_vlm_prompted(
    tmp_path: Path, name: str, called: str, prompted: bool
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    found = judge(f"{file}:{name}")
    assert isinstance(found, Judge)
    assert (found.name, isinstance(found, Scores)) == (called, prompted)
    with pytest.raises(ConfigError, match="expected a JudgeOrVLM, got 'int'"):
        judge(f"{file}:number")


def test_a_judge_is_known_by_name_or_any_vlm_prompted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Packaged, "load", classmethod(lambda cls: cls(stand_ins.Rewriter())))
    for name in JUDGES:
        assert isinstance(judge(name), Judge)
    assert isinstance(judge("scripted:x"), Scores)
    with pytest.raises(ConfigError, match="no judge is named 'packagd'; did you mean packaged"):
        judge("packagd")
