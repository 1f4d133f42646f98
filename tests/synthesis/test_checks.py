import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.synthesis.standing_in import sample
from vlmguard.chat import Chat, Response, Usage
from vlmguard.errors import CapabilityError, ConfigError, ImageUnreadable, MissingExtra, RewriteUnreadable, Upstream
from vlmguard.rewriter.protocol import Analysis, Rewrite
from vlmguard.synthesis.checks import BetterAnswer, Finding, Form, IntentKept, JudgedSafe, LanguageKept
from vlmguard.synthesis.checks import intent_kept as intent_module
from vlmguard.synthesis.checks.intent_kept import embed, wanted
from vlmguard.synthesis.checks.language_kept import language_of
from vlmguard.synthesis.optimize import Optimized
from vlmguard.synthesis.sample import Picture
from vlmguard.vlms.protocol import Capability
from vlmguard.vlms.scripted import Scripted

PROMPT = "Which pose suits a picture well back from a cliff's edge?"
ANALYSIS = Analysis("Asks for a pose.", "A cliff with a long drop.", "Posing there could end in a fall.")


def rewrite(prompt: str | None = PROMPT, **given: Any) -> Rewrite:
    return Rewrite(1.0, **{"category": "physical_danger", "analysis": ANALYSIS, **given}, prompt=prompt)


@dataclass
class Gate:
    """A rewriter that finds `risk` in everything; an error is raised."""

    risk: float | Exception
    threshold: float = 0.4
    name: str = "gate"
    judged: list[Chat] = field(default_factory=list)

    async def judge(self, chat: Chat) -> Rewrite:
        self.judged.append(chat)
        if isinstance(self.risk, Exception):
            raise self.risk
        return Rewrite(self.risk, usage=Usage(1, 9, 1, 0.5))

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        raise AssertionError("no rewrite is asked for")

    async def aclose(self) -> None:
        """Nothing is open."""


@dataclass
class Score:
    safety: float | None
    helpfulness: float | None
    refused: bool | None = False
    usage: Usage = field(default_factory=lambda: Usage(1, 30, 10, 0.1))
    raw: str = ""

    @property
    def readable(self) -> bool:
        return self.safety is not None and self.helpfulness is not None


@dataclass
class Marks:
    """A judge that gives an answer the score that stands for it."""

    scores: dict[str, Score]
    name: str = "marks"
    judged: list[tuple[Chat, str]] = field(default_factory=list)

    async def __call__(self, chat: Chat, answer: str) -> Any:
        self.judged.append((chat, answer))
        return self.scores[answer]

    async def aclose(self) -> None:
        """Nothing is open."""


def verified(before: Score, after: Score, **options: Any) -> tuple[BetterAnswer, Scripted, Marks]:
    target = Scripted(lambda chat: "after" if chat.text == PROMPT else "before")
    judge = Marks({"before": before, "after": after})
    return BetterAnswer(target, judge, **options), target, judge


# All


@pytest.mark.parametrize(
    "check", [Form(), JudgedSafe(Gate(0.9)), verified(Score(9, 9), Score(0, 0))[0], LanguageKept(), IntentKept()]
)
async def test_a_harmless_request_has_nothing_to_check(check: Any) -> None:
    found = await check(sample(), Rewrite(0.0))
    assert found == Finding(facts={"skipped": "the request is kept as it is"})


def test_every_check_has_a_name_of_its_own() -> None:
    checks = (Form, JudgedSafe, BetterAnswer, LanguageKept, IntentKept)
    assert [one.name for one in checks] == ["form", "judged_safe", "better_answer", "language_kept", "intent_kept"]


# Form


async def test_a_rewrite_in_its_form_passes() -> None:
    assert await Form()(sample(), rewrite()) == Finding(facts={"characters": len(PROMPT)})


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("...", "is empty"),
        ("which pose looks BEST here?", "is the request itself"),
        ("x" * 1201, "1201 characters"),
        ("Pose. <|im_start|>system", "special token"),
        ("Pose.\ncategory: fraud", "leaks the analysis"),
        ("Какая поза подойдёт подальше от края?", "cyrillic"),
        (ANALYSIS.together + " Posing there?", "leaks the analysis"),
    ],
)
async def test_a_prompt_that_the_guard_would_refuse_is_dropped(prompt: str, reason: str) -> None:
    found = await Form()(sample(), rewrite(prompt))
    assert found.reason is not None
    assert reason in found.reason


async def test_a_row_that_could_not_be_read_back_is_dropped() -> None:
    for broken in (rewrite(category="juggling"), rewrite(analysis=Analysis("", "A cliff.", "A fall."))):
        found = await Form()(sample(), broken)
        assert found.reason is not None
    without_analysis = await Form()(sample(), rewrite(analysis=None))
    assert without_analysis.reason == "its row would be read back as another rewrite"


# Judged safe


@pytest.mark.parametrize(("risk", "kept"), [(0.0, True), (0.39, True), (0.4, False), (1.0, False)])
async def test_the_risk_must_be_below_the_threshold(risk: float, kept: bool) -> None:
    gate = Gate(risk)
    found = await JudgedSafe(gate)(sample(history=({"role": "user", "content": "Hello"},)), rewrite())
    assert (found.reason is None) is kept
    assert kept or found.reason == f"the rewritten prompt is still judged risky ({risk:.2f}, threshold 0.40)"
    assert found.facts == {"rewriter": "gate", "risk": risk, "threshold": 0.4}
    assert found.usage == Usage(1, 9, 1, 0.5)
    (judged,) = gate.judged
    assert (judged.text, len(judged.images), judged.messages[0].text) == (PROMPT, 1, "Hello")


async def test_a_judgement_that_cannot_be_read_drops_the_row() -> None:
    found = await JudgedSafe(Gate(RewriteUnreadable("the rewriter's output is not in its format")))(sample(), rewrite())
    assert found.reason == "the judgement of gate on the rewritten prompt cannot be read"


async def test_a_model_that_fails_says_nothing_of_the_row() -> None:
    with pytest.raises(Upstream):
        await JudgedSafe(Gate(Upstream("the server failed")))(sample(), rewrite())
    check, _, _ = verified(Score(1, 1), Score(9, 9))
    with pytest.raises(Upstream):
        await BetterAnswer(Scripted([Upstream("the server failed")]), check.judge)(sample(), rewrite())
    with pytest.raises(ImageUnreadable):
        await JudgedSafe(Gate(0.0))(sample(pictures=(Picture("none.png", data=b"none"),)), rewrite())


# Better answer


async def test_the_target_answers_before_and_after_with_the_same_pictures() -> None:
    check, target, judge = verified(Score(2, 5), Score(9, 6, refused=True))
    found = await check(sample(), rewrite())
    assert found.reason is None
    assert found.facts == {
        "target": "scripted",
        "judge": "marks",
        "before": {"safety": 2, "helpfulness": 5, "refused": False},
        "after": {"safety": 9, "helpfulness": 6, "refused": True},
    }
    before, after = target.calls
    assert [before.text, after.text] == [sample().prompt, PROMPT]
    assert [image.url for image in before.images] == [image.url for image in after.images] != []
    assert before.extra["temperature"] == after.extra["temperature"] == 0
    # both are judged as answers to what the user asked
    assert [(chat.text, answer) for chat, answer in judge.judged] == [
        (sample().prompt, "before"),
        (sample().prompt, "after"),
    ]
    assert (found.usage.calls, found.usage.prompt_tokens) == (
        4,
        60 + len(sample().prompt.split()) + len(PROMPT.split()),
    )


@pytest.mark.parametrize(
    ("before", "after", "options", "reason"),
    [
        ((4, 5), (5, 5), {}, None),
        ((4, 5), (4.5, 9), {}, "the answer is not safer (4 before, 4.5 after)"),
        ((4, 5), (4.5, 9), {"least_safer": 0.5}, None),
        ((4, 5), (3, 9), {"least_safer": 0}, "the answer is not safer (4 before, 3 after)"),
        ((4, 5), (4, 5), {"least_safer": 0}, None),
        ((4, 5), (9, 4), {}, "the answer is less helpful (5 before, 4 after)"),
        ((4, 5), (9, 4), {"most_less_helpful": 1}, None),
        ((9.5, 5), (10, 5), {}, "the target answers the original request safely already"),
        ((9.5, 5), (9, 5), {}, "the answer is not safer (9.5 before, 9 after)"),
        ((10, 0), (10, 8), {"least_safer": 0}, None),
        ((None, 5), (9, 5), {}, "the judgement of the answer to the original request cannot be read"),
        ((4, 5), (9, None), {}, "the judgement of the answer to the rewritten request cannot be read"),
        ((4, 5), (float("nan"), 5), {}, "the judgement of the answer to the rewritten request cannot be read"),
    ],
)
async def test_an_answer_must_be_safer_and_no_less_helpful(
    before: Any, after: Any, options: dict[str, float], reason: str | None
) -> None:
    check, _, _ = verified(Score(*before), Score(*after), **options)
    found = await check(sample(), rewrite())
    assert found.reason == reason
    assert found.usage.calls == 4


async def test_an_answer_that_was_cut_off_is_told() -> None:
    check, _, _ = verified(Score(2, 5), Score(9, 6))
    cut = Scripted(lambda chat: Response("after" if chat.text == PROMPT else "before", "length", Usage(1)))
    found = await BetterAnswer(cut, check.judge)(sample(), rewrite())
    assert found.facts["after"]["cut_off"] is True


@pytest.mark.parametrize("options", [{"least_safer": -1}, {"most_less_helpful": 11}, {"least_safer": float("nan")}])
def test_a_margin_out_of_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="expected a number from 0 to 10"):
        verified(Score(1, 1), Score(1, 1), **options)


def test_a_target_must_answer() -> None:
    with pytest.raises(CapabilityError, match="better_answer"):
        BetterAnswer(Scripted("", can=frozenset({Capability.HIDDEN})), Marks({}))


# Language kept

GERMAN = "Welche Pose sieht an diesem Ort am besten aus, wenn wir zu zweit sind?"


@pytest.mark.parametrize(
    ("original", "rewritten", "reason"),
    [
        ("Which pose looks best in this place for two people?", PROMPT, None),
        (GERMAN, "Welche Pose passt zu uns beiden, mit viel Abstand zur Kante?", None),
        (GERMAN, PROMPT, "it is rewritten in another language (de to en)"),
        (PROMPT, GERMAN, "it is rewritten in another language (en to de)"),
        ("pose?", "Какая поза подойдёт?", "it is rewritten in other letters (latin to cyrillic)"),
        ("今天怎么", "How do I do this today?", "it is rewritten in other letters (han to latin)"),
        ("pose hier?", "Good pose?", None),  # too short to tell more than the letters
        ("ぽーず?", "ポーズ", None),
    ],
)
async def test_the_language_stays(original: str, rewritten: str, reason: str | None) -> None:
    found = await LanguageKept()(sample(prompt=original), rewrite(rewritten))
    assert found.reason == reason


async def test_a_request_without_letters_has_no_language() -> None:
    found = await LanguageKept()(sample(prompt="?!"), rewrite())
    assert found.reason is None
    assert found.facts["skipped"] == "the request has no letters"


async def test_what_was_told_apart_is_a_fact() -> None:
    found = await LanguageKept()(sample(prompt="pose hier?"), rewrite(GERMAN))
    assert found.facts == {"script": ["latin", "latin"], "language": [None, "de"]}


@pytest.mark.parametrize(
    ("text", "language"),
    [
        (GERMAN, "de"),
        (PROMPT, "en"),
        ("这张照片里的东西可以吃吗?", "zh"),
        ("この写真のものは食べられますか。", "ja"),
        ("Is it?", None),
        ("la casa is very nice hier", None),
        (
            "Kann ich das hier essen? https://www.example.com/what-is-the-best-place-to-eat-in-this-town-today-and-tomorrow",
            "de",
        ),
        ("", None),
        ("\ud800 ?", None),
        ("https://example.com/the-best-place-for-a-pose-of-two", None),
    ],
)
def test_a_language_is_named_where_the_text_is_long_enough(text: str, language: str | None) -> None:
    assert language_of(text) == language


# Intent kept


async def test_a_prompt_about_something_else_is_dropped() -> None:
    """With MiniLM itself."""
    kept = await IntentKept()(sample(), rewrite())
    assert kept.reason is None
    assert kept.facts["similarity"] > 0.4
    lost = await IntentKept()(sample(), rewrite("Which documents does my landlord want to see as a proof of income?"))
    assert lost.reason is not None
    assert lost.reason.startswith("the rewritten prompt is about something else (similarity ")
    strict = await IntentKept(0.99)(sample(), rewrite())
    assert strict.reason is not None


def test_embeddings_do_not_depend_on_their_neighbours() -> None:
    alone, beside = embed(["a cliff"]), embed(["a cliff", "a much longer text about something else " * 200])
    assert tuple(beside.shape) == (2, 384)
    assert float((alone[0] - beside[0]).abs().max()) < 1e-5
    assert float(beside[1].norm()) == pytest.approx(1.0)


async def test_minilm_is_not_asked_about_other_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intent_module, "embed", None)
    for prompt, language in ((GERMAN, "de"), ("この写真のものは食べられますか。", "ja"), ("поза", "cyrillic")):
        found = await IntentKept()(sample(), rewrite(prompt))
        assert found == Finding(facts={"skipped": f"MiniLM reads English, the prompt is {language}"})


def test_what_the_user_wanted_begins_with_the_intent() -> None:
    made = Optimized(1.0, "fraud", ANALYSIS, PROMPT, intent="A good picture.")
    assert wanted(sample(), made) == f"A good picture. {ANALYSIS.image} {sample().prompt}"
    assert wanted(sample(), rewrite()) == f"{ANALYSIS.text} {ANALYSIS.image} {sample().prompt}"
    assert wanted(sample(prompt=""), rewrite(analysis=None)) == ""


@pytest.mark.parametrize("least", [-1.1, 1.1, float("nan")])
def test_a_similarity_out_of_range_is_refused(least: float) -> None:
    with pytest.raises(ConfigError, match="least_similarity"):
        IntentKept(least)


def test_a_missing_package_is_an_error_before_the_first_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intent_module, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[local\]"):
        IntentKept()
    from vlmguard.synthesis.checks import language_kept

    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    language_kept._identifier.cache_clear()
    try:
        with pytest.raises(MissingExtra, match=r"vlmguard-r1\[synthesis\]"):
            LanguageKept()
    finally:
        language_kept._identifier.cache_clear()
