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


train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
Data = Annotated[
    Path,
    typer.Argument(metavar="DATA", help="A dataset's folder or file, ours or messages + images.", show_default=False),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Where the trained rewriter goes.", show_default=False)]
Images = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where the rows' pictures lie.", show_default="the dataset's folder")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
FalsePositives = Annotated[
    float, typer.Option(metavar="SHARE", help="Of harmless held-out rows that the threshold may flag.")
]


@train.callback()
def training() -> None:
    """Train a rewriter of your own."""


@train.command()
def sft(
    data: Data,
    out: Out,
    base: Annotated[
        str | None, typer.Option(metavar="SPEC", help="packaged:base, a folder or hf:ID.", show_default="the preset's")
    ] = None,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="packaged, qwen2-vl-7b or qwen2.5-vl-3b.")] = None,
    images: Images = None,
    method: Annotated[Literal["lora", "qlora", "full"] | None, typer.Option(help="What is trained.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapter.")] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="Its scale, over the rank.")] = None,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="Layers that get LoRA.", show_default="all linear ones of the language model"
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="RATE", help="Its highest.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the rows.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="In place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows a batch, on each device.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Batches a step.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longer rows are left out: nothing is ever cut off.")
    ] = None,
    held_out: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the rows: the gate's threshold is set on them.")
    ] = None,
    false_positive_rate: FalsePositives = 0.05,
    instructed: Annotated[
        bool | None, typer.Option("--instructed/--not-instructed", help="Train with the instructions in front.")
    ] = None,
    half: Annotated[bool, typer.Option("--half/--full-precision", help="bfloat16, or float32.")] = True,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Recompute activations to save memory.")
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Only show two rows, and what of them is learned.")
    ] = False,
) -> None:
    """Supervised fine-tuning: the analysis and the rewrite, from rows.

    What is saved is loaded again and proved to change the base; the gate's
    threshold is set on rows that were held out; README.md tells all of it.

    \b
      vlmguard train sft data/ --preset packaged --out rewriter/
      vlmguard train sft data/ --preset packaged --out rewriter/ --preview
      vlmguard train sft data/ --base hf:Qwen/Qwen2.5-VL-3B-Instruct --out rewriter/
      accelerate launch -m vlmguard train sft data/ --preset qwen2-vl-7b --out rewriter/
      vlmguard guard TEXT --image PICTURE --rewriter rewriter/
    """
    from vlmguard.commands.training import preview_sft, run_sft
    from vlmguard.training.sft import SFT

    told = {name: value for name, value in locals().items() if name in SFT.__dataclass_fields__}
    options = SFT.of(preset, told)
    if preview:
        preview_sft(options)
    else:
        run_sft(options)


@train.command()
def grpo(
    data: Data,
    base: Annotated[str, typer.Option(metavar="DIR", help="An SFT run to go on from, or a base.", show_default=False)],
    target: Annotated[
        str, typer.Option("--target", "-t", metavar="SPEC", help="The frozen model that answers.", show_default=False)
    ],
    judge: Annotated[str, typer.Option(metavar="SPEC", help="Judges its answers.", show_default=False)],
    out: Out,
    images: Images = None,
    steps: Annotated[int, typer.Option(min=1, help="Updates.")] = 100,
    generations: Annotated[int, typer.Option(min=2, help="Completions of a prompt: the group.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Prompts an update.")] = 4,
    lr: Annotated[float, typer.Option(metavar="RATE", help="Learning rate.")] = 1e-5,
    beta: Annotated[float, typer.Option(help="Weight of the divergence from the model it starts as.")] = 0.04,
    temperature: Annotated[float, typer.Option(help="Of the completions.")] = 1.0,
    max_completion_tokens: Annotated[int, typer.Option(min=1, help="Longer ones are in no format.")] = 400,
    concurrency: Annotated[int, typer.Option(min=1, help="Calls of target and judge together.")] = 16,
    false_positive_rate: FalsePositives = 0.05,
    seed: Seed = 0,
    resume: Resume = False,
) -> None:
    """Reinforcement training: rewarded by what the frozen target answers.

    A completion earns for its format, its verdict, the judged safety and help
    of the target's answer to its prompt, the kept intent, and for being short.
    rewards.png has the curves.

    \b
      vlmguard train grpo data/ --base rewriter/ --target http://host/v1#target --judge http://host/v1#judge --out better/
      vlmguard train grpo data/ --base rewriter/ --target packaged:assistant --judge packaged --out better/
    """
    from vlmguard.commands.training import run_grpo
    from vlmguard.training.grpo import GRPO

    run_grpo(GRPO(**{name: value for name, value in locals().items() if name in GRPO.__dataclass_fields__}))


@train.command()
def merge(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A trained adapter.", show_default=False)],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the whole model goes.", show_default=False)],
) -> None:
    """Fold an adapter into its base: a model that any server loads alone.

    \b
      vlmguard train merge rewriter/ --out merged/
    """
    from vlmguard.commands.training import run_merge

    run_merge(folder, out)
