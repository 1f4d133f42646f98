"""The part of the command line that makes a rewriter: synthesize, train."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def synthesize(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="NAME, NAME:PATH or FILE.jsonl; see: vlmguard list sources.")
    ],
    analyst: Annotated[
        str, typer.Option(metavar="SPEC", help="Who reasons: any model, or authored:FILE.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the dataset goes.", show_default=False)],
    split: Annotated[str | None, typer.Option(metavar="NAME", help="Of the source.")] = None,
    revision: Annotated[str | None, typer.Option(metavar="COMMIT", help="Of a source on the hub.")] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the samples' pictures lie.", show_default="the source's")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only the first N samples.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=4096, help="Samples that are worked on together.")] = 16,
    budget_tokens: Annotated[int | None, typer.Option(min=1, metavar="N", help="Begin no sample beyond.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Where the work is done.")] = "local",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is in --out.")] = False,
    safe_from: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Gives safe answers that the source lacks.")
    ] = None,
    unsafe_from: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Gives unsafe ones: a model that nobody guards.")
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="form, language_kept, intent_kept, judged_safe or better_answer; repeat it.",
            show_default="form, language_kept",
            rich_help_panel="Verification",
        ),
    ] = None,
    no_checks: Annotated[
        bool, typer.Option("--no-checks", help="None at all.", rich_help_panel="Verification")
    ] = False,
    judge_with: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="The rewriter of judged_safe.", rich_help_panel="Verification"),
    ] = None,
    verify_with: Annotated[
        str | None, typer.Option(metavar="SPEC", help="The target of better_answer.", rich_help_panel="Verification")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(metavar="SPEC", help="Judges its answers.", rich_help_panel="Verification")
    ] = None,
    share: Annotated[
        float, typer.Option(help="Of harmless rows among all, at most.", rich_help_panel="Verification")
    ] = round(977 / 9881, 4),
    overlap: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH", help="Evaluation sets whose items must not come back.", rich_help_panel="Verification"
        ),
    ] = None,
) -> None:
    """Make training data for a rewriter, in the paper's three reasoning stages.

    A sample is a request with pictures, a safe and an unsafe answer. The
    analyst compares the answers (hindsight), finds what in the words, the
    pictures and their combination is risky (causal), and rewrites the request
    (optimize). Every sample ends as a row, or with a reason. Interrupted, the
    same command with --resume goes on; the analyst is asked nothing twice.

    \b
      vlmguard synthesize samples.jsonl --analyst http://localhost:8000/v1#big --out data/
      vlmguard synthesize spa-vl --limit 500 --analyst http://host/v1#big --out data/
      vlmguard synthesize samples.jsonl --analyst authored:answers.jsonl --out data/
      vlmguard synthesize vlguard:VLGuard/ --analyst SPEC --out data/ \\
          --check form --check better_answer --verify-with SPEC --judge SPEC

    --verify-with alone adds better_answer, --judge-with alone judged_safe.
    """
    from vlmguard.commands.synthesize import synthesize as run
    from vlmguard.errors import ConfigError
    from vlmguard.synthesis.recipe import DEFAULT_CHECKS, Recipe

    if no_checks and check:
        raise ConfigError("--no-checks and --check exclude each other", "Leave one of them out.")
    names = () if no_checks else tuple(check or DEFAULT_CHECKS)
    if not check and not no_checks:
        names += ("judged_safe",) if judge_with else ()
        names += ("better_answer",) if verify_with else ()
    recipe = Recipe(
        source,
        analyst,
        split=split,
        revision=revision,
        images=str(images) if images else None,
        safe_from=safe_from,
        unsafe_from=unsafe_from,
        checks=names,
        judge_with=judge_with,
        verify_with=verify_with,
        judge=judge,
        share=share,
        overlap=tuple(map(str, overlap or ())),
        limit=limit,
    )
    raise typer.Exit(
        run(recipe, out, concurrency=concurrency, budget_tokens=budget_tokens, engine=engine, resume=resume)
    )
