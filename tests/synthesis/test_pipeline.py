"""One sample on its way: every way in which it can end, with its reason and its costs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.synthesis.standing_in import REPORT, StandIn, png, sample
from vlmguard.chat import Chat, Response, Usage
from vlmguard.errors import AuthenticationFailed, BadAnswer, ContextTooLong, RateLimited, TargetError, Timeout, Upstream
from vlmguard.rewriter.protocol import Rewrite, parse_output
from vlmguard.synthesis.answers import Answers
from vlmguard.synthesis.pipeline import Interrupted, Pipeline
from vlmguard.synthesis.sample import Malformed, Outcome, Picture, Sample
from vlmguard.vlms.protocol import Capability


@dataclass
class Found:
    reason: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    usage: Usage = field(default_factory=Usage)


@dataclass
class Held:
    """A check that finds what it is told."""

    name: str
    found: Found

    async def __call__(self, sample: Sample, rewrite: Rewrite) -> Found:
        return self.found


class Model:
    """A VLM that says one thing."""

    name = "some-model"
    can = frozenset({Capability.TEXT})

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, list[Chat]()

    async def __call__(self, chat: Chat) -> Response:
        self.asked.append(chat)
        return Response(self.text, usage=Usage(1, 2, 3, 0.5))

    def stream(self, chat: Chat) -> Any:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Nothing is open."""


async def test_a_sample_becomes_a_row_that_tells_how_it_was_made() -> None:
    checks = [Held("one", Found(facts={"score": 0.5}, usage=Usage(1, 1, 1, 1.0))), Held("two", Found())]
    history = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"})
    outcome = await Pipeline(StandIn(), checks=checks)(sample(history=history))
    row = outcome.row
    assert row is not None
    assert (outcome.ended, outcome.reason, row.kind, row.risky, row.history) == ("kept", None, "safety", True, history)
    assert parse_output(row.output).category == "physical_danger"
    assert row.origin == {"name": "made-up", "licence": "CC0", "revision": "2026-01-01", "row": "1"}
    assert row.images == ({"path": "cliff.png", "sha256": sample().pictures[0].sha256},)
    assert row.made["analyst"] == "stand-in"
    assert row.made["unsafe"] == {"text": "Go right to the edge!"}
    assert row.made["checks"] == {"one": {"score": 0.5}, "two": {}}
    assert outcome.costs.keys() == {"hindsight", "causal", "optimize", "one"}
    assert Outcome.of(outcome.fields()) == outcome


async def test_a_harmless_sample_is_kept_as_it_is_and_asks_nobody() -> None:
    analyst = StandIn()
    outcome = await Pipeline(analyst, checks=[Held("one", Found("no"))])(sample(benign=True, unsafe=None))
    assert outcome.row is not None
    assert (outcome.row.output, outcome.row.kind, outcome.costs) == ("safe", "helpfulness", {})
    assert analyst.asked == []


@pytest.mark.parametrize(
    ("answers", "ended", "reason"),
    [
        ({"hindsight": "I cannot help with this."}, "hindsight", "is a refusal"),
        ({"causal": "{"}, "causal", "is not JSON"),
        ({"causal": {**REPORT, "risky": False}}, "causal", "finds no risk"),
        ({"optimize": {"intent": "A picture."}}, "optimize", "has a wrong prompt"),
        ({"causal": ContextTooLong("too long")}, "causal", "too long for a model"),
        ({"causal": Upstream("no", status=400)}, "causal", "refused the request (400)"),
        ({"causal": BadAnswer("garbage")}, "causal", "unreadable answer"),
    ],
)
async def test_what_the_analyst_cannot_do_drops_the_sample_with_a_reason(
    answers: dict[str, Any], ended: str, reason: str
) -> None:
    outcome = await Pipeline(StandIn(answers))(sample())
    assert (outcome.ended, outcome.row) == (ended, None)
    assert reason in (outcome.reason or "")
    assert outcome.costs["hindsight"].calls >= 1


@pytest.mark.parametrize(
    "error",
    [
        Timeout("late"),
        RateLimited("slower"),
        Upstream("broken", status=502),
        Upstream("none", status=404),
        TargetError("gone"),
    ],
)
async def test_a_model_that_cannot_be_reached_is_no_verdict(error: TargetError) -> None:
    with pytest.raises(Interrupted) as caught:
        await Pipeline(StandIn({"causal": error}))(sample())
    assert (caught.value.place, caught.value.cause) == ("causal", error)
    again = pickle.loads(pickle.dumps(caught.value))  # as Ray's actors send it
    assert (again.place, again.sample.id, type(again.cause)) == ("causal", "a", type(error))


async def test_a_refused_key_ends_the_run() -> None:
    with pytest.raises(AuthenticationFailed):
        await Pipeline(StandIn({"hindsight": AuthenticationFailed("no")}))(sample())


async def test_the_first_check_that_finds_a_reason_drops_the_row() -> None:
    checks = [Held("one", Found()), Held("two", Found("it is no better")), Held("three", Found("never asked"))]
    outcome = await Pipeline(StandIn(), checks=checks)(sample())
    assert (outcome.ended, outcome.reason, outcome.row) == ("two", "it is no better", None)
    assert outcome.costs.keys() == {"hindsight", "causal", "optimize"}


async def test_missing_answers_come_from_models_that_are_named() -> None:
    careful, careless = Model("Careful words."), Model("Careless words.")
    analyst = StandIn()
    outcome = await Pipeline(analyst, Answers(careful, careless))(sample(safe=None, unsafe=None))
    assert outcome.row is not None
    assert outcome.row.made["safe"] == {"text": "Careful words.", "model": "some-model"}
    assert outcome.row.made["unsafe"] == {"text": "Careless words.", "model": "some-model"}
    assert "Careless words." in analyst.asked[0].text
    assert outcome.costs["answers"] == Usage(2, 4, 6, 1.0)
    assert [len(chat.messages) for chat in (careful.asked[0], careless.asked[0])] == [2, 1]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (Answers(), "the source has no unsafe answer; --unsafe-from names a model that gives one"),
        (Answers(unsafe_from=Model("  ")), "some-model gave an empty unsafe answer"),
    ],
)
async def test_an_answer_that_nobody_gives_is_a_reason(answers: Answers, reason: str) -> None:
    outcome = await Pipeline(StandIn(), answers)(sample(unsafe=None))
    assert (outcome.ended, outcome.reason) == ("answers", reason)


async def test_what_is_no_sample_is_dropped_at_its_source(tmp_path: Path) -> None:
    outcome = await Pipeline(StandIn())(Malformed("7", "its prompt is no text"))
    assert (outcome.ended, outcome.reason) == ("source", "its prompt is no text")
    outcome = await Pipeline(StandIn())(sample(pictures=(Picture("x.png", tmp_path / "x.png"),)))
    assert outcome.ended == "source"
    assert "No such file" in (outcome.reason or "")


async def test_a_broken_picture_is_a_reason() -> None:
    outcome = await Pipeline(StandIn(), Answers(Model("a")))(
        sample(safe=None, pictures=(Picture("x", data=b"nothing"),))
    )
    assert outcome.row is None
    assert outcome.reason
    assert (await Pipeline(StandIn())(sample(pictures=(Picture("x", data=png()),)))).row is not None
