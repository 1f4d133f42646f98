"""Supervised fine-tuning of a rewriter: rows -> adapter -> proof -> calibrated gate -> card.

    OUT/checkpoint-N/      to go on from
    OUT/adapter_*          the adapter, or with method "full" the whole model
    OUT/rewriter.json      base, threshold, whether it is instructed: what `vlmguard.load.rewriter("OUT")` reads
    OUT/README.md          the card

The loop is TRL's SFTTrainer; the tokens are ours (`prompts`), and the loss is on the output alone.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from vlmguard.errors import ConfigError, VLMGuardError, missing_extra
from vlmguard.load import TRAINED_FORMAT, unknown
from vlmguard.synthesis.sample import Row
from vlmguard.training.calibration import Calibration
from vlmguard.training.models import PACKAGED, Base, Method, load_base, lora
from vlmguard.training.presets import PRESETS
from vlmguard.training.prompts import Collator, Encoder, fitting, shown
from vlmguard.training.rows import Rows, read
from vlmguard.vlms.generation import Engine

SHOWN_ROWS: Final = 2  # of a preview: a risky one and a harmless one
WORKERS: Final = 8  # processes that read pictures for a GPU
# What libraries say of a full disk that is no OSError: safetensors in Rust's words, torch in its own.
FULL_DISK: Final = (
    "No space left on device",
    "os error 28",
    "Disk quota exceeded",
    "PytorchStreamWriter",
    "unexpected pos",
)


@dataclass(frozen=True)
class SFT:
    """What a run is told.

    Args:
        data, images: see `rows.read`.
        base: see `models.load_base`.
        targets: a regular expression for the layers that get LoRA; None takes the language model's linear ones.
        steps: in place of epochs.
        accumulation: batches a step.
        max_tokens: of a row, its pictures' included; longer ones are left out. None takes what the model takes.
        held_out: share of the rows that nothing is trained on, for the gate's threshold.
        false_positive_rate: that the threshold is set for.
        instructed: train and ask with the instructions in front.
        half: weights and activations in bfloat16.
        checkpointing: recompute activations, to save memory.
    """

    data: Path
    base: str
    out: Path
    images: Path | None = None
    method: Method = "lora"
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | None = None
    learning_rate: float = 2e-4
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 4
    accumulation: int = 1
    max_tokens: int | None = None
    seed: int = 0
    held_out: float = 0.1
    false_positive_rate: float = 0.05
    instructed: bool = False
    half: bool = True
    checkpointing: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name, least, below in (
            ("rank", 1, None),
            ("batch_size", 1, None),
            ("accumulation", 1, None),
            ("learning_rate", 0, 1),
            ("held_out", 0, 1),
            ("false_positive_rate", 0, 1),
        ):
            value = getattr(self, name)
            if value < least or (below is not None and value >= below):
                expected = f"at least {least}" + (f" and below {below}" if below is not None else "")
                raise ConfigError.wrong(name.replace("_", " "), expected=expected, got=value)

    @classmethod
    def of(cls, preset: str | None, told: Mapping[str, Any]) -> Self:
        """What is told over what the preset has. Raises ConfigError for an unknown preset, or no base."""
        if preset is not None and preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        chosen = {name: value for name, (value, _) in PRESETS[preset].items()} if preset else {}
        chosen |= {name: value for name, value in told.items() if value is not None}
        if "base" not in chosen:
            raise ConfigError("no base is named", f"Give --base, or --preset {' or '.join(PRESETS)}.")
        return cls(**chosen)

    def told(self) -> dict[str, Any]:
        return {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}


@dataclass
class Trained:
    """What a run came to."""

    folder: Path
    steps: int
    seconds: float
    loss: float
    tokens_per_second: float
    calibration: Calibration
    parsed: tuple[int, int]  # outputs in the format, of held-out risky rows that were tried
    dropped: Counter[str] = field(default_factory=Counter)
    servable: str | None = None  # why vLLM cannot serve it as it is


@dataclass
class Prepared:
    """Model, rows and tokens, before the first step."""

    base: Base
    encoder: Encoder
    rows: Rows
    learn: list[Row]
    lengths: list[int]
    held: list[Row]
    dropped: Counter[str]


def prepared(options: SFT) -> Prepared:
    """Raises ConfigError where no row is left to learn from; ModelError."""
    rows = read(options.data, options.images)
    half = options.half and options.method != "full"  # weights in bfloat16 would lose small updates
    base = load_base(options.base, "bfloat16" if half else "float32", quantized=options.method == "qlora")
    encoder = Encoder.of(Engine(base.model, base.processor, options.base), instructed=options.instructed)
    learn, held = rows.split(options.held_out)
    fit = fitting(encoder, rows, learn, options.max_tokens)
    dropped = rows.dropped + fit.dropped
    if not fit.rows:
        why = ", ".join(f"{count} since {reason}" for reason, count in dropped.most_common(3)) or "all are held out"
        raise ConfigError(f"no row is left to learn from: {why}", "Lengthen --max-tokens, or lower --held-out.")
    return Prepared(base, encoder, rows, fit.rows, fit.lengths, held, dropped)


def preview(options: SFT) -> str:
    """A risky and a harmless row as the model reads them, with what is learned marked."""
    ready = prepared(options)
    risky = [row for row in ready.learn if row.risky][:1]
    harmless = [row for row in ready.learn if not row.risky][: SHOWN_ROWS - len(risky)]
    texts = [f"{row.id}:\n{shown(ready.encoder, ready.rows, row)}" for row in (*risky, *harmless)]
    return "\n\n".join([f"{len(ready.learn)} rows to learn from, {len(ready.held)} held out", *texts])


def train_sft(options: SFT, say: Callable[[str], None] = lambda line: None) -> Trained | None:
    """Trains, and proves what was saved. Of several processes (`accelerate launch`) the first one does that, and tells;
    the others give None.

    Raises:
        ConfigError, ModelError: as `prepared`; the folder holds another run. AdapterError: what was saved changes nothing.
        VLMGuardError: the disk is full; the last checkpoint is whole.
    """
    from vlmguard.training.proof import prove

    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        check_folder(options)
    say = say if first else lambda line: None
    ready = prepared(options)
    for reason, count in ready.dropped.most_common():
        say(f"{count} rows are left out: {reason}")
    say(f"{len(ready.learn)} rows to learn from, {len(ready.held)} held out")
    model, steps, seconds, loss, speed = _fitted(options, ready, say)
    if not first:
        return None
    if options.method == "full" and options.half:
        model.bfloat16()
    save(model, ready.base, options.out)
    model = ready.base.model = None  # what is loaded next needs its room
    calibration, parsed, not_served = prove(options, ready, say)
    done = Trained(options.out, steps, seconds, loss, speed, calibration, parsed, ready.dropped, not_served)
    from vlmguard.training.card import write_card

    write_card(options, ready, done)
    return done


def check_folder(options: SFT) -> None:
    """Raises ConfigError where the folder holds a run and none is to be gone on with, or one with other options."""
    note = options.out / "run.json"
    now = {name: value for name, value in options.told().items() if name != "resume"}
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if note.exists() and _begun(options.out):
            if not options.resume:
                raise ConfigError(f"{options.out} holds a run already", "Go on with --resume, or give another --out.")
            before = json.loads(note.read_text("utf-8"))
            if differing := sorted(name for name in now if before.get(name) != now[name]):
                names = ", ".join(differing)
                raise ConfigError(f"{options.out} holds a run with other {names}", "Give the same, or another --out.")
        note.write_text(json.dumps(now, indent=1))
    except OSError as error:
        raise ConfigError(f"{options.out} cannot be written: {error.strerror}", "Check the path.") from None


def _begun(folder: Path) -> bool:
    """Whether a run came to anything: one that failed before its first checkpoint is in nobody's way."""
    return any(folder.glob("checkpoint-*")) or any(folder.glob("*.safetensors"))


def _fitted(options: SFT, ready: Prepared, say: Callable[[str], None]) -> tuple[Any, int, float, float, float]:
    """(the trained model, steps, seconds of this process, mean loss, tokens a second over all processes)."""
    try:
        from vlmguard.training.loop import last_checkpoint
    except ImportError as error:
        raise missing_extra(error.name or "trl", "train") from error
    trainer = loop(options, ready, say)
    begun = time.perf_counter()
    last = last_checkpoint(options.out, clear=trainer.is_world_process_zero()) if options.resume else None
    with room(options.out):
        found = trainer.train(resume_from_checkpoint=str(last) if last else None)
    seconds = time.perf_counter() - begun
    tokens = trainer.tokens * trainer.accelerator.num_processes
    return trainer.model, found.global_step, seconds, float(found.training_loss), tokens / max(seconds, 1e-9)


def loop(options: SFT, ready: Prepared, say: Callable[[str], None]) -> Any:
    """The trainer, before its first step. Raises ConfigError where `targets` name no layer."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from vlmguard.training.loop import Loop

    numbers = Dataset.from_dict(
        {"number": list(range(len(ready.learn))), "length": ready.lengths, "images": [[] for _ in ready.learn]}
    )
    pad = ready.encoder.prompter.processor.tokenizer.pad_token_id
    try:
        trainer = Loop(
            model=ready.base.model,
            args=arguments(options, len(ready.learn)),
            train_dataset=numbers,
            data_collator=Collator(
                ready.encoder, ready.rows, ready.learn, pad if pad is not None else ready.encoder.end
            ),
            processing_class=ready.base.processor,
            peft_config=None if options.method == "full" else _lora(options, ready.base),
            callbacks=[telling(say)],
        )
    except ValueError as error:
        if "arget modules" not in str(error):
            raise
        raise ConfigError(f"{options.targets} names no layer of {options.base}", "Leave --targets out.") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Inside, a full disk is one error of ours: Python, safetensors and torch each have another one."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        told = str(error)
        if not full and not any(sign in told for sign in FULL_DISK):
            raise
        raise VLMGuardError(
            f"{folder} takes no more: {told.splitlines()[0]}", "Make room, then run the same command with --resume."
        ) from error


def _lora(options: SFT, base: Base) -> Any:
    return lora(base, options.rank, options.alpha, options.dropout, options.targets)


def arguments(options: SFT, rows: int) -> Any:
    """TRL's settings. What is named here and not an option of ours is so on purpose."""
    import torch
    from trl import SFTConfig

    cuda, whole = torch.cuda.is_available(), options.method == "full"
    a_step = options.batch_size * options.accumulation * int(os.environ.get("WORLD_SIZE", "1"))
    total = options.steps or max(1, int(options.epochs * rows / a_step))
    return SFTConfig(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=total // 20,  # the first of them has a rate of 0: a short run can spare none
        num_train_epochs=options.epochs,
        max_steps=options.steps or -1,
        seed=options.seed,
        data_seed=options.seed,
        bf16=options.half and (cuda or whole),  # else the weights are in it already
        use_cpu=not cuda,
        activation_checkpointing=options.checkpointing,
        max_length=None,  # nothing is ever cut off (F100)
        train_sampling_strategy="group_by_length",  # rows with pictures cannot be packed
        length_column_name="length",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        save_steps=max(1, total // 5),
        save_total_limit=2,
        logging_steps=max(1, total // 50),
        report_to="none",
        disable_tqdm=True,
        # The language model's layers are used in every batch; what else may be trained, where there is a picture.
        ddp_find_unused_parameters=None if whole or options.targets or options.base == PACKAGED else False,
        dataloader_pin_memory=cuda,
        dataloader_num_workers=min(WORKERS, os.cpu_count() or 1)
        if cuda
        else 0,  # pictures are read beside the GPU's work
    )


def save(model: Any, base: Base, folder: Path) -> None:
    """The adapter, or the whole model; the processor beside it."""
    from vlmguard.vlms.adapters import FINGERPRINT_FILE

    with room(folder):
        model.save_pretrained(folder)
        base.processor.save_pretrained(folder)
        if (folder / "adapter_config.json").exists() and base.fingerprint:
            (folder / FINGERPRINT_FILE).write_text(json.dumps({"base": base.fingerprint}))


def write_rewriter(folder: Path, base: str, threshold: float, *, instructed: bool) -> None:
    """What `load.rewriter` needs to know of a trained rewriter."""
    told = {"format": TRAINED_FORMAT, "base": base, "threshold": threshold, "instructed": instructed}
    (folder / "rewriter.json").write_text(json.dumps(told, indent=1))


def merge(folder: Path, out: Path) -> Path:
    """The adapter in `folder` folded into its base, as a model that loads alone.

    Raises:
        ConfigError: there is no adapter. ModelError, AdapterError: it cannot be put on its base.
    """
    from vlmguard.training.proof import with_adapter

    note = folder / "rewriter.json"
    if not note.is_file() or not (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{folder} holds no trained adapter", "Give the --out of a run of: vlmguard train sft")
    told = json.loads(note.read_text("utf-8"))
    run = folder / "run.json"
    half = json.loads(run.read_text("utf-8")).get("half", True) if run.is_file() else True
    base = load_base(told["base"], "bfloat16" if half else "float32", fresh=True)
    model = with_adapter(base, folder).merge_and_unload()
    with room(out):
        model.save_pretrained(out)
        base.processor.save_pretrained(out)
    write_rewriter(out, str(out), told["threshold"], instructed=told["instructed"])
    return out


def telling(say: Callable[[str], None]) -> Any:
    """A trainer's callback that says a line for each of its reports."""
    from transformers import TrainerCallback

    class Telling(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                accuracy = f", tokens right {logs['mean_token_accuracy']:.3f}" if "mean_token_accuracy" in logs else ""
                say(f"step {state.global_step} of {state.max_steps}: loss {float(logs['loss']):.3f}{accuracy}")

    return Telling()
