"""A run of the pipeline over a source: what is written where, how it goes on after a kill, and how it ends.

    OUT/run.json         what the run is made of; a run that goes on must be made of the same
    OUT/answers.jsonl    the analyst's answers by question: can be given as authored:OUT/answers.jsonl
    OUT/outcomes.jsonl   one line a sample, as each is done
    OUT/dataset.jsonl    the rows, in the source's order; OUT/images/ those of their pictures that lay in no file
    OUT/dropped.jsonl    the others, each with its reason
    OUT/report.md        the funnel, categories, costs, samples

The last three are written from the outcomes when all are done (or the budget is spent), whole or not at all: they are the
same however often the run was interrupted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any, Final, Protocol, TypeAlias

from vlmguard.chat import Usage
from vlmguard.errors import ConfigError, ImageError, VLMGuardError
from vlmguard.journal import Journal
from vlmguard.synthesis.engines import Found
from vlmguard.synthesis.pipeline import Interrupted
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.sample import Malformed, Outcome, Row, Sample

MOST_FAILURES: Final = 20  # in a row, of calls that reach no model: then the run ends


Engine: TypeAlias = Callable[[Iterator[Sample | Malformed]], AsyncIterator[Found]]  # works on samples, in any order


@dataclass
class Progress:
    """How far a run is."""

    before: int = 0  # done by earlier runs
    done: int = 0
    kept: int = 0
    failed: int = 0  # their models could not be reached; they are tried again by the next run
    tokens: int = 0  # of all runs
    calls: int = 0
    stopped: str | None = None  # why it ended before its source


@dataclass
class Ended:
    """What stands in the folder at the end."""

    folder: Path
    progress: Progress
    ended: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        return self.ended["kept"]


class Folder:
    """The folder of a run, locked. A context.

    Raises:
        ConfigError: it holds another run, or one and `resume` is not asked for; or it is in use.
    """

    def __init__(self, path: Path, recipe: Recipe, *, resume: bool) -> None:
        self.path, self.recipe = path, recipe
        told = path / "run.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            if told.exists():
                if not resume:
                    raise ConfigError(
                        f"{path} holds a run already", "Go on with it by --resume, or give another --out."
                    )
                self._check(json.loads(told.read_text("utf-8")))
            write_whole(told, json.dumps(recipe.fields(), indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}", "Check the path and your rights."
            ) from None
        except ValueError:
            raise ConfigError(f"{told} is damaged", "Give another --out.") from None
        self.outcomes = Journal(path / "outcomes.jsonl", "id")

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.outcomes.__exit__()

    def _check(self, before: dict[str, Any]) -> None:
        now = self.recipe.fields()
        free = {"limit"}  # a run may go on to more samples
        differing = sorted(name for name in now if name not in free and before.get(name) != now[name])
        if differing:
            names = ", ".join(differing)
            raise ConfigError(f"{self.path} holds a run with other {names}", "Give the same options, or another --out.")


async def run(
    folder: Folder,
    samples: Callable[[], Iterator[Sample | Malformed]],
    engine: Engine,
    *,
    budget_tokens: int | None = None,
    report: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Works on what is not done yet.

    Args:
        samples: the source from its beginning, the same every time.
        budget_tokens: prompt and written tokens together, earlier runs' included; no sample is begun beyond.

    Raises:
        VLMGuardError: the models cannot be reached MOST_FAILURES times in a row, or an error that every sample would meet.
    """
    progress = Progress(before=len(folder.outcomes))
    for told in folder.outcomes:
        _count(progress, Outcome.of(told))
    progress.done = progress.kept = 0
    in_a_row = 0
    async for found in engine(_to_do(samples(), folder, progress, budget_tokens)):
        if isinstance(found, Interrupted):
            progress.failed += 1
            in_a_row += 1
            if in_a_row >= MOST_FAILURES:
                raise _unreachable(found, progress) from found
        else:
            in_a_row = 0 if found.costs else in_a_row  # without costs no model was asked
            folder.outcomes.append(found.fields())
            _count(progress, found)
        report(progress)
    return progress


def _to_do(
    samples: Iterator[Sample | Malformed], folder: Folder, progress: Progress, budget: int | None
) -> Iterator[Sample | Malformed]:
    for sample in islice(samples, folder.recipe.limit):
        if sample.id in folder.outcomes:
            continue
        if budget is not None and progress.tokens >= budget:
            progress.stopped = f"the budget of {budget:,} tokens is spent"
            return
        yield sample


def _count(progress: Progress, outcome: Outcome) -> None:
    spent = sum(outcome.costs.values(), Usage())
    progress.done += 1
    progress.kept += outcome.row is not None
    progress.tokens += spent.prompt_tokens + spent.completion_tokens
    progress.calls += spent.calls


def _unreachable(last: Interrupted, progress: Progress) -> VLMGuardError:
    done = progress.before + progress.done
    return VLMGuardError(
        f"{MOST_FAILURES} samples in a row could not be worked on, the last at {last.place}: {last.cause.message}",
        f"{done} samples are done. When the model answers again, run the same command with --resume.",
    )


def write_whole(path: Path, text: str) -> None:
    """The file is there whole or not at all."""
    with _Whole(path) as file:
        file.write(text)


class _Whole:
    """A text file that takes its name when it is complete. A context."""

    def __init__(self, path: Path) -> None:
        self.path, self.unfinished = path, path.with_name(path.name + ".unfinished")

    def __enter__(self) -> IO[str]:
        self.file = self.unfinished.open("w", encoding="utf-8", errors="backslashreplace")
        return self.file

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.file.close()
        finally:
            if kind is not None:
                self.unfinished.unlink(missing_ok=True)
        if kind is None:
            self.unfinished.replace(self.path)


class Sieve(Protocol):
    """Looks at the rows together, in the source's order; gives where a row ends and why, or None."""

    def __call__(self, sample: Sample, row: Row) -> tuple[str, str] | None: ...


def outcomes_in_order(
    folder: Folder, samples: Iterator[Sample | Malformed], sieve: Sieve
) -> Generator[tuple[Sample | Malformed, Outcome], None, None]:
    """The outcomes of what is done, in the source's order, through the sieve."""
    for sample in islice(samples, folder.recipe.limit):
        told = folder.outcomes.get(sample.id)
        if told is None:
            continue
        outcome = Outcome.of(told)
        if outcome.row is not None and isinstance(sample, Sample):
            taken = sieve(sample, outcome.row)
            if taken is not None:
                outcome = replace(outcome, ended=taken[0], reason=taken[1], row=None)
        yield sample, outcome


def write_dataset(folder: Folder, samples: Callable[[], Iterator[Sample | Malformed]], sieve: Sieve) -> Counter[str]:
    """Writes dataset.jsonl and dropped.jsonl; gives how many samples ended where.

    Raises:
        VLMGuardError: the disk takes no more; what stood there before still stands.
    """
    ended: Counter[str] = Counter()
    path = folder.path
    try:
        with ExitStack() as stack:
            dropped = stack.enter_context(_Whole(path / "dropped.jsonl"))
            rows = stack.enter_context(_Whole(path / "dataset.jsonl"))
            for sample, outcome in outcomes_in_order(folder, samples(), sieve):
                ended[outcome.ended] += 1
                if outcome.row is None:
                    line = {"id": outcome.id, "ended": outcome.ended, "reason": outcome.reason}
                    dropped.write(json.dumps(line, ensure_ascii=False) + "\n")
                    continue
                assert isinstance(sample, Sample)
                row = replace(outcome.row, images=_kept(sample, path))
                rows.write(json.dumps(row.fields(), ensure_ascii=False) + "\n")
    except OSError as error:
        remedy = "Make room, then run the same command with --resume: nothing is asked again."
        raise VLMGuardError(f"{path} cannot be written: {error.strerror}", remedy) from error
    return ended


def _kept(sample: Sample, folder: Path) -> tuple[dict[str, str], ...]:
    """The row's pictures: those that lie in files by their place below the source's folder, others are written down."""
    kept = []
    for picture in sample.pictures:
        path = picture.reference
        if picture.file is None:
            try:
                path = f"images/{picture.sha256}{_suffix(picture.read())}"
            except ImageError:
                path = f"images/{picture.sha256}"
            if not (folder / path).exists():
                (folder / "images").mkdir(exist_ok=True)
                unfinished = folder / f"{path}.unfinished"
                unfinished.write_bytes(picture.read())
                unfinished.replace(folder / path)
        kept.append({"path": path, "sha256": picture.sha256})
    return tuple(kept)


def _suffix(data: bytes) -> str:
    from vlmguard.pixels import format_of

    return "." + format_of(data).lower()
