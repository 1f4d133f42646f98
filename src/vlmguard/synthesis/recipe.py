"""What a run is made of, as names: what must be the same when it goes on, and what every worker builds its pipeline from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from vlmguard.errors import ConfigError
from vlmguard.journal import Journal
from vlmguard.synthesis.analyst import Analyst, Authored, Recorded, analyst_of
from vlmguard.synthesis.answers import Answers
from vlmguard.synthesis.pipeline import Check, Pipeline

CHECKS: Final = ("form", "language_kept", "intent_kept", "judged_safe", "better_answer")
DEFAULT_CHECKS: Final = ("form", "language_kept")  # what needs no further model


@dataclass(frozen=True)
class Recipe:
    """
    Args:
        source, split, revision, images: see `sources.opened`.
        analyst, safe_from, unsafe_from: specs of models.
        checks: of CHECKS, by name.
        judge_with: spec of the rewriter that judges rewritten prompts, for judged_safe.
        verify_with, judge: specs of the target and of the judge of its answers, for better_answer.
        share: of harmless rows among all, at most (the paper: 977 of 9,881).
        overlap: files and folders of evaluation sets, whose items must not come back in the dataset.
        limit: samples that are read; None reads all.
    """

    source: str
    analyst: str
    split: str | None = None
    revision: str | None = None
    images: str | None = None
    safe_from: str | None = None
    unsafe_from: str | None = None
    checks: tuple[str, ...] = DEFAULT_CHECKS
    judge_with: str | None = None
    verify_with: str | None = None
    judge: str | None = None
    share: float = 977 / 9881
    overlap: tuple[str, ...] = ()
    limit: int | None = None
    repairs: int = 1

    def __post_init__(self) -> None:
        if wrong := set(self.checks) - set(CHECKS):
            raise ConfigError.wrong("--check", expected=f"some of {', '.join(CHECKS)}", got=", ".join(sorted(wrong)))
        for name, needed in (("judged_safe", ("judge_with",)), ("better_answer", ("verify_with", "judge"))):
            lacking = [option for option in needed if getattr(self, option) is None]
            if name in self.checks and lacking:
                options = " and ".join(f"--{option.replace('_', '-')}" for option in lacking)
                raise ConfigError(f"the check {name} needs a model", f"Name it with {options}.")
        if not 0 <= self.share < 1:
            raise ConfigError.wrong("--share", expected="a number from 0 to below 1", got=self.share)

    def fields(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @asynccontextmanager
    async def open(self, answers: Path | None = None) -> AsyncIterator[Pipeline]:
        """The pipeline with its models loaded.

        Args:
            answers: where the analyst's answers are written down, and taken from; None keeps none.

        Raises:
            ConfigError, ModelError: as loading them.
        """
        async with AsyncExitStack() as stack:
            analyst: Analyst = analyst_of(self.analyst)
            if answers is not None and not isinstance(analyst, Authored):
                analyst = Recorded(analyst, stack.enter_context(Journal(answers, "key")))
            stack.push_async_callback(analyst.aclose)
            vlms = {name: self._vlm(name, stack) for name in ("safe_from", "unsafe_from", "verify_with")}
            checks = [self._check(name, vlms["verify_with"], stack) for name in self.checks]
            yield Pipeline(analyst, Answers(vlms["safe_from"], vlms["unsafe_from"]), checks, self.repairs)

    def _vlm(self, name: str, stack: AsyncExitStack) -> Any:
        from vlmguard import load

        if (spec := getattr(self, name)) is None:
            return None
        vlm = load.vlm(spec)
        stack.push_async_callback(vlm.aclose)
        return vlm

    def _check(self, name: str, target: Any, stack: AsyncExitStack) -> Check:
        from vlmguard import load
        from vlmguard.evaluation import judges
        from vlmguard.synthesis import checks

        if name == "judged_safe":
            assert self.judge_with is not None
            rewriter = load.rewriter(self.judge_with)
            stack.push_async_callback(rewriter.aclose)
            return checks.JudgedSafe(rewriter)
        if name == "better_answer":
            assert self.judge is not None
            return checks.BetterAnswer(target, judges.judge(self.judge))
        plain: dict[str, type[Check]] = {
            "form": checks.Form,
            "language_kept": checks.LanguageKept,
            "intent_kept": checks.IntentKept,
        }
        return plain[name]()
