"""Reinforcement training of a rewriter: GRPO, rewarded by what the frozen target answers to its prompts.

    rows -> several completions each -> rewards (see `rewards`) -> better than its group: likelier; worse: less likely

Paper: DeepSeekMath (arXiv 2402.03300), section 4.1; rewards normalised one by one: GDPO (arXiv 2601.05242). VLMGuard-R1 itself is
trained by SFT alone; everything here is ours. The trainer is TRL's.

    OUT/rewards.jsonl   one line a step: every reward's mean and deviation, and what could not be rewarded
    OUT/rewards.png     the same as curves
    the rest            as an SFT run has it, see `sft`
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from vlmguard import load
from vlmguard.errors import AdapterError, ConfigError
from vlmguard.evaluation.judges import judge
from vlmguard.synthesis.checks import IntentKept, LanguageKept
from vlmguard.training.card import write_card
from vlmguard.training.curves import PLOT_FILE, REWARDS_FILE, SMOOTHED_STEPS, draw, read_curves
from vlmguard.training.grpo_loop import Examples, Reward, learn, peft_quiet
from vlmguard.training.models import load_base, lora
from vlmguard.training.proof import prove, with_adapter
from vlmguard.training.rewards import Answered, intent_kept, right_verdict, short_enough, well_formed
from vlmguard.training.sft import SFT, Prepared, Trained, check_folder, prepared, save

HELD_OUT: Final = 0.1  # as an SFT run has it
# Shares of one sum: each reward is first brought to mean 0 and deviation 1 within its group. Ours.
WEIGHTS: Final[Mapping[str, float]] = {
    "well_formed": 0.5,
    "right_verdict": 1.0,
    "answered": 1.0,
    "intent_kept": 0.5,
    "short_enough": 0.1,
}


@dataclass(frozen=True)
class GRPO:
    """
    Args:
        data: a dataset of rows, as `vlmguard synthesize` makes it.
        base: the folder of an SFT run, whose adapter is trained further, or a base model.
        target: the frozen VLM that answers the rewritten prompts.
        judge: judges its answers.
        images: where the rows' pictures lie.
        steps: updates.
        generations: completions a prompt, the group of GRPO; 8 in TRL, 64 in DeepSeekMath.
        batch: prompts an update, over all processes.
        lr: learning rate. TRL's 1e-6 is for full training; adapters take about ten times as much (its "LoRA Without Regret").
        beta: weight of the KL divergence from the model it starts as; 0.04 in DeepSeekMath, section 4.2.
        temperature: of the completions.
        max_completion_tokens: as the guard allows; a completion that is cut off is in no format.
        weights: of the rewards, by name; one with 0 isn't computed.
        held_out, half: see `sft.SFT`; None takes what the run in `base` had, so that rows held out there stay so.
        false_positive_rate: see `sft.SFT`.
        rank: of the adapter that a base model gets.
        concurrency: calls of target and judge at a time.
        resume: go on with the run that is in `out`.
    """

    data: Path
    base: str
    target: str
    judge: str
    out: Path
    images: Path | None = None
    steps: int = 100
    generations: int = 8
    batch: int = 4
    lr: float = 1e-5
    beta: float = 0.04
    temperature: float = 1.0
    max_completion_tokens: int = 400
    seed: int = 0
    weights: Mapping[str, float] = field(default_factory=lambda: dict(WEIGHTS))
    held_out: float | None = None
    half: bool | None = None
    false_positive_rate: float = 0.05
    rank: int = 16
    concurrency: int = 16
    resume: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("generations", 2),
            ("batch", 1),
            ("max_completion_tokens", 1),
            ("concurrency", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError.wrong(name, expected=f"a whole number from {least}", got=getattr(self, name))
        for name, zero in (("lr", False), ("beta", True), ("temperature", False)):
            value = getattr(self, name)
            if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
                raise ConfigError.wrong(name, expected=f"a number {'from' if zero else 'above'} 0", got=value)
        if strange := [name for name in self.weights if name not in WEIGHTS]:
            raise ConfigError.wrong("weights", expected=f"names of {', '.join(WEIGHTS)}", got=strange[0])
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights.values()):
            raise ConfigError.wrong("weights", expected="numbers from 0", got=dict(self.weights))
        if not any(self.weights.values()):
            raise ConfigError("every reward has the weight 0: there is nothing to learn", "Give one of them more.")

    def told(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


def train_grpo(options: GRPO, say: Callable[[str], None] = lambda line: None) -> Trained | None:
    """Trains, proves what was saved, and writes card and curves. Of several processes (`accelerate launch`) the first one
    does that, and tells; the others give None.

    Raises:
        ConfigError, ModelError, AdapterError: see `sft.train_sft`; target or judge cannot be had.
        TargetError: target or judge fail for good. VLMGuardError: the disk is full; the last checkpoint is whole.
    """
    options, as_sft, start = _start(options)
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_folder(options)  # type: ignore[arg-type]  # it reads out, resume and told()
    say = say if first else lambda line: None
    ready = prepared(as_sft)
    _leave_room(ready, options.max_completion_tokens)
    for reason, count in ready.dropped.most_common():
        say(f"{count} rows are left out: {reason}")
    say(f"{len(ready.learn)} rows to learn from, {len(ready.held)} held out")
    model = _policy(as_sft, ready, start)
    examples = Examples(ready.rows, ready.learn, ready.encoder.prompter, ready.encoder.instructed)
    examples.check()
    with _rewards(options, ready) as rewards:
        learned = learn(
            model,
            ready.base.processor,
            examples,
            examples.pictures(),
            rewards,
            options,
            _checkpoint(options, clear=first),
            say,
        )
        counts = next((dict(one.counts) for one in rewards if isinstance(one, Answered)), {})
    if not first:
        return None
    save(learned.model, ready.base, options.out)
    if start is not None:
        _check_moved(start, options.out)
    del model, learned.model
    calibration, parsed, not_served = prove(as_sft, ready, say)
    done = Trained(
        options.out,
        learned.steps,
        learned.seconds,
        learned.loss,
        learned.tokens / max(learned.seconds, 1e-9),
        calibration,
        parsed,
        ready.dropped,
        not_served,
    )
    curves = read_curves(options.out / REWARDS_FILE)
    draw(curves, options.out / PLOT_FILE)
    write_card(as_sft, ready, done)
    _finish_card(options, curves, counts)
    return done


def _start(options: GRPO) -> tuple[GRPO, SFT, Path | None]:
    """The options, settled; those that an SFT run with this outcome would have; and the adapter to go on from."""
    folder = Path(options.base)
    base, instructed, adapter, before = options.base, True, None, dict[str, Any]()
    if (folder / "rewriter.json").is_file():
        told = _read(folder / "rewriter.json")
        instructed = bool(told["instructed"])
        before = _read(folder / "run.json") if (folder / "run.json").is_file() else {}
        if (folder / "adapter_config.json").is_file():
            base, adapter = told["base"], folder
    taken = {"held_out": HELD_OUT, "half": True} | {
        name: before[name] for name in ("held_out", "half") if name in before
    }
    options = replace(options, **{name: value for name, value in taken.items() if getattr(options, name) is None})
    as_sft = SFT(
        options.data,
        base,
        options.out,
        options.images,
        rank=options.rank,
        alpha=2 * options.rank,
        seed=options.seed,
        held_out=options.held_out or 0.0,
        false_positive_rate=options.false_positive_rate,
        instructed=instructed,
        half=bool(options.half),
    )
    return options, as_sft, adapter


def _read(path: Path) -> dict[str, Any]:
    try:
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", "Give the --out of a run of: vlmguard train sft") from None
    return told


def _leave_room(ready: Prepared, tokens: int) -> None:
    """Leaves out rows whose completions could not all fit."""
    context = ready.encoder.prompter.context_tokens
    if context is None:
        return
    fit = [length + tokens <= context for length in ready.lengths]
    if not any(fit):
        raise ConfigError(
            f"no row leaves {tokens} tokens of the model's {context} free", "Lower the completion tokens."
        )
    if not all(fit):
        ready.dropped["it leaves too little room for a completion"] += fit.count(False)
    ready.learn = [row for row, fits in zip(ready.learn, fit, strict=True) if fits]
    ready.lengths = [length for length, fits in zip(ready.lengths, fit, strict=True) if fits]


def _policy(as_sft: SFT, ready: Prepared, start: Path | None) -> Any:
    """The base with the adapter that is trained: the one to go on from, or a new one."""
    with peft_quiet():
        if start is None:
            from peft import get_peft_model

            return get_peft_model(ready.base.model, lora(ready.base, as_sft.rank, as_sft.alpha, as_sft.dropout))
        if ready.base.saved_modules:  # these came with the base, and come with the adapter too
            ready.base = load_base(as_sft.base, "bfloat16" if as_sft.half else "float32", fresh=True)
        model = with_adapter(ready.base, start)
        model.set_adapter("default")  # it was loaded to be used: this makes it one to be trained
        model.peft_config["default"].inference_mode = False
    return model


def _check_moved(start: Path, out: Path) -> None:
    """Raises AdapterError where the saved adapter is the one that was begun with."""
    from safetensors.torch import load_file

    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (start, out))
    if before.keys() == after.keys() and all(bool((before[name] == after[name]).all()) for name in after):
        raise AdapterError(
            f"nothing was learned: {out} holds the adapter of {start}",
            "Every completion earned the same: look at rewards.jsonl; train the base longer, or raise the temperature.",
        )


@contextmanager
def _rewards(options: GRPO, ready: Prepared) -> Iterator[dict[Reward, float]]:
    """The rewards with a weight; target and judge are loaded where their answers count, and closed at the end."""
    plain: tuple[Reward, ...] = (well_formed, right_verdict, intent_kept, short_enough)
    chosen = {one: options.weights[one.__name__] for one in plain if options.weights.get(one.__name__)}
    if chosen.get(intent_kept):
        IntentKept(), LanguageKept()  # what it needs is missing now, not at the first step
    if not (weight := options.weights.get("answered")):
        yield chosen
        return
    by_id = {row.id: row for row in ready.learn}
    with Answered(
        load.vlm(options.target),
        judge(options.judge),
        lambda name: ready.rows.chat(by_id[name]),
        concurrency=options.concurrency,
    ) as answered:
        yield {**chosen, answered: weight}


def _checkpoint(options: GRPO, *, clear: bool) -> Path | None:
    if not options.resume:
        return None
    from vlmguard.training.loop import last_checkpoint

    return last_checkpoint(options.out, clear=clear)


def _finish_card(options: GRPO, curves: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> None:
    """Says in the card which training this was, and what came of its rewards."""
    card = options.out / "README.md"
    text = card.read_text("utf-8").replace("`vlmguard train sft`", "`vlmguard train grpo`")
    card.write_text(text.rstrip() + "\n\n" + "\n".join(_rewards_told(options, curves, counts)) + "\n", "utf-8")


def _rewards_told(options: GRPO, curves: Sequence[Mapping[str, Any]], counts: Mapping[str, int]) -> Iterator[str]:
    few = min(SMOOTHED_STEPS, max(1, len(curves) // 2))
    yield from (
        "## Reinforcement",
        "",
        f"GRPO from {options.base}; answers by {options.target}, judged by {options.judge}.",
    )
    yield f"{options.steps} steps of {options.batch} prompts with {options.generations} completions each."
    yield from ("", f"| reward | weight | first {few} steps | last {few} steps |", "|---|---|---|---|")
    for name, weight in options.weights.items():
        means = [one["rewards"].get(name, {}).get("mean") for one in curves]
        yield f"| {name} | {weight:g} | {_mean(means[:few])} | {_mean(means[-few:])} |"
    yield ""
    yield "These are means over what was sampled while training, on the rows that were trained on: no measure of the rewriter."
    if counts:
        told = ", ".join(f"{counts.get(why, 0)} {what}" for why, what in _COUNTED.items())
        yield f"Of {counts.get('asked', 0)} answers since the run was last begun, {told}; those gave no reward."
    yield from ("", f"![Rewards by step]({PLOT_FILE})")


_COUNTED: Final = {"unreadable": "had a judgement that could not be read", "failed": "failed"}


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}" if known else "none"
