"""One sample, from its source to a row, or to the reason why it is none.

    sample -> answers -> hindsight -> causal -> optimize -> checks -> row

Whatever one sample meets, the others go on. A model that cannot be reached just now is no verdict on the sample: that is
raised (`Interrupted`), and the sample is tried again in the next run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from vlmguard.chat import Usage
from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    ContextTooLong,
    ImageError,
    RateLimited,
    TargetError,
    Timeout,
    Upstream,
)
from vlmguard.rewriter.protocol import Rewrite, render_output
from vlmguard.synthesis.analyst import Analyst, AnswerUnusable, Desk
from vlmguard.synthesis.answers import Answers, NoAnswer
from vlmguard.synthesis.causal import causal
from vlmguard.synthesis.hindsight import hindsight
from vlmguard.synthesis.optimize import optimize
from vlmguard.synthesis.sample import Answer, Malformed, Outcome, Row, Sample


class Finding(Protocol):
    """What a check found; see `checks`."""

    @property
    def reason(self) -> str | None: ...

    @property
    def facts(self) -> Mapping[str, Any]: ...

    @property
    def usage(self) -> Usage: ...


class Check(Protocol):
    """Holds a rewrite against its sample."""

    @property
    def name(self) -> str: ...

    async def __call__(self, sample: Sample, rewrite: Rewrite) -> Finding: ...


class Interrupted(Exception):
    """A model could not be reached while a sample was at `place`; `cause` says why. Nothing is known of the sample."""

    def __init__(self, sample: Sample, place: str, cause: TargetError) -> None:
        super().__init__(f"{sample.id}: {cause}")
        self.sample, self.place, self.cause = sample, place, cause

    def __reduce__(self) -> tuple[type[Interrupted], tuple[Sample, str, TargetError]]:
        return Interrupted, (self.sample, self.place, self.cause)  # else one comes back from another process in pieces


@dataclass
class Pipeline:
    """
    Args:
        checks: in order; the first that finds a reason drops the row.
        repairs: see `Desk`.
    """

    analyst: Analyst
    answers: Answers = field(default_factory=Answers)
    checks: Sequence[Check] = ()
    repairs: int = 1

    async def __call__(self, sample: Sample | Malformed) -> Outcome:
        """Raises Interrupted; AuthenticationFailed, which every other sample would meet too."""
        if isinstance(sample, Malformed):
            return Outcome(sample.id, "source", sample.reason)
        try:
            images = tuple({"path": one.reference, "sha256": one.sha256} for one in sample.pictures)
        except ImageError as error:
            return Outcome(sample.id, "source", error.message)
        if sample.benign:
            return Outcome(sample.id, "kept", row=_row(sample, images, "safe", "helpfulness", {}))
        return await _Making(self, sample, images, Desk(self.analyst, self.repairs))()


@dataclass
class _Making:
    """One risky sample on its way; `place` is where it is."""

    pipeline: Pipeline
    sample: Sample
    images: tuple[Mapping[str, str], ...]
    desk: Desk
    place: str = "answers"

    async def __call__(self) -> Outcome:
        try:
            return await self._make()
        except (AnswerUnusable, NoAnswer) as problem:
            if isinstance(problem, NoAnswer):
                return self._dropped(str(problem))
            return self._dropped(problem.message)
        except ImageError as error:
            return self._dropped(error.message)
        except AuthenticationFailed:
            raise
        except (Timeout, RateLimited) as error:
            raise Interrupted(self.sample, self.place, error) from error
        except Upstream as error:
            if error.status in (400, 413, 422):  # the server looked at the request and refused it
                return self._dropped(f"a model's server refused the request ({error.status})")
            raise Interrupted(self.sample, self.place, error) from error
        except ContextTooLong:
            return self._dropped("the request is too long for a model")
        except BadAnswer as error:
            return self._dropped(f"a model's server gave an unreadable answer: {type(error).__name__}")
        except TargetError as error:
            raise Interrupted(self.sample, self.place, error) from error

    async def _make(self) -> Outcome:
        sample, spent = await self.pipeline.answers(self.sample)
        if spent.calls:
            self.desk.costs["answers"] = spent
        self.place = "hindsight"
        features = await hindsight(sample, self.desk)
        self.place = "causal"
        report = await causal(sample, features, self.desk)
        if not report.risky:
            return self._dropped("the analyst finds no risk in it")
        self.place = "optimize"
        rewrite = await optimize(sample, report, self.desk)
        facts: dict[str, Any] = {}
        for check in self.pipeline.checks:
            self.place = check.name
            found = await check(sample, rewrite)
            if found.usage != Usage():
                self.desk.costs[check.name] = found.usage
            if found.reason is not None:
                return self._dropped(found.reason)
            facts |= {check.name: dict(found.facts)}
        made = {
            "analyst": self.pipeline.analyst.name,
            "safe": _told(sample.safe),
            "unsafe": _told(sample.unsafe),
            "features": [feature.model_dump() for feature in features.features],
            "triggers": report.triggers.model_dump(mode="json"),
            "interactions": list(report.interactions),
            "intent": rewrite.intent,
            "checks": facts,
        }
        row = _row(sample, self.images, render_output(rewrite), "safety", made)
        return Outcome(sample.id, "kept", row=row, costs=self.desk.costs)

    def _dropped(self, reason: str) -> Outcome:
        return Outcome(self.sample.id, self.place, reason, costs=self.desk.costs)


def _told(answer: Answer | None) -> dict[str, str]:
    assert answer is not None
    return {"text": answer.text, **({"model": answer.model} if answer.model else {})}


def _row(sample: Sample, images: tuple[Mapping[str, str], ...], output: str, kind: str, made: Mapping[str, Any]) -> Row:
    origin = {name: value for name, value in vars(sample.origin).items() if value is not None}
    return Row(sample.id, images, sample.prompt, output, kind, origin, sample.history, made)
