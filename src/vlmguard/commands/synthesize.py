"""`vlmguard synthesize`: samples to a dataset for rewriters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Literal

from vlmguard.commands.guard import make_base
from vlmguard.commands.terminal import Bar, busy, quietly, say
from vlmguard.errors import VLMGuardError
from vlmguard.synthesis import engines
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.run import Ended, Folder, Progress, outcomes_in_order, run, write_dataset
from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources import Source, opened

INTERRUPTED = 130


def synthesize(
    recipe: Recipe,
    out: Path,
    *,
    concurrency: int,
    budget_tokens: int | None,
    engine: Literal["local", "ray"],
    resume: bool,
) -> int:
    """Makes a dataset in `out` and says how it went; gives the exit code."""
    images = Path(recipe.images) if recipe.images else None
    source = opened(recipe.source, split=recipe.split, revision=recipe.revision, images=images)
    for spec in (recipe.analyst, recipe.judge_with, recipe.verify_with, recipe.judge):
        make_base(spec)
    with Folder(out, recipe, resume=resume) as folder:
        progress = Progress(before=len(folder.outcomes))
        try:
            progress = asyncio.run(_work(folder, source, concurrency, budget_tokens, engine))
        except KeyboardInterrupt:
            say(
                f"interrupted: {len(folder.outcomes)} samples are done in {out}; the same command with --resume goes on"
            )
            return INTERRUPTED
        except VLMGuardError:
            if len(folder.outcomes):
                say(f"{len(folder.outcomes)} samples are done in {out}")
            raise
        with busy("Comparing the rows"), quietly():
            ended = finish(folder, source, progress)
    say(_line(ended))
    if progress.failed:
        say(f"{progress.failed} samples met a model that could not be reached: run the same command with --resume")
    return 4 if progress.failed else 0


async def _work(
    folder: Folder,
    source: Source,
    concurrency: int,
    budget_tokens: int | None,
    engine: Literal["local", "ray"],
) -> Progress:
    begun = time.monotonic()
    with Bar(folder.recipe.limit, len(folder.outcomes), "Reasoning") as bar:

        def report(now: Progress) -> None:
            rate = now.done / max(time.monotonic() - begun, 1e-9)
            bar.update(now.before + now.done, folder.recipe.limit, rate, f", {now.kept} kept, {now.tokens:,} tokens")

        def samples() -> Iterator[Sample | Malformed]:
            return iter(source)

        if engine == "ray":
            from vlmguard.synthesis.ray_engine import RayEngine

            with RayEngine(folder.recipe, concurrency) as on_ray:
                return await run(folder, samples, on_ray, budget_tokens=budget_tokens, report=report)
        with quietly():
            async with folder.recipe.open(folder.path / "answers.jsonl") as pipeline:

                def here(todo: Iterator[Sample | Malformed]) -> AsyncIterator[engines.Found]:
                    return engines.local(todo, pipeline, concurrency)

                return await run(folder, samples, here, budget_tokens=budget_tokens, report=report)


def finish(folder: Folder, source: Source, progress: Progress) -> Ended:
    """Writes the dataset, what was dropped, and the report."""
    from vlmguard.synthesis.report import write_report
    from vlmguard.synthesis.sieve import Together, share_of

    sieve = Together.of(folder.recipe)
    with closing(outcomes_in_order(folder, iter(source), sieve)) as counted:
        rows = ((one.id, one.row.kind) for _, one in counted if one.row is not None)
        staying = share_of(rows, folder.recipe.share)
    ended = Ended(folder.path, progress, write_dataset(folder, lambda: iter(source), sieve.again(staying)))
    told = {
        **folder.recipe.fields(),
        "source": source.name,
        "licence": source.licence,
        "revision": source.revision,
        "stopped": progress.stopped,
        "failed": progress.failed,
        "not compared with": sieve.overlap.unread if sieve.overlap else None,
    }
    outcomes = (one for _, one in outcomes_in_order(folder, iter(source), sieve.again(staying)))
    write_report(folder.path, outcomes, told)
    return ended


def _line(ended: Ended) -> str:
    dropped = ", ".join(f"{count} {place}" for place, count in ended.ended.most_common() if place != "kept")
    parts = [f"{ended.rows} rows", f"dropped: {dropped or 'none'}"]
    if ended.progress.stopped:
        parts.append(ended.progress.stopped)
    return f"{'; '.join(parts)}; written to {ended.folder}"
