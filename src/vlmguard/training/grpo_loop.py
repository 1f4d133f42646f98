"""The loop of GRPO: TRL's trainer on rows with pictures, with prompts that are token for token what the guard sends."""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from vlmguard.errors import ConfigError, missing_extra
from vlmguard.images import frames, model_ready
from vlmguard.rewriter.protocol import parse_output
from vlmguard.rewriter.rewriter import question
from vlmguard.synthesis.sample import Row
from vlmguard.training.curves import REWARDS_FILE, curves
from vlmguard.training.rewards import Rewards
from vlmguard.training.rows import Rows
from vlmguard.training.sft import room
from vlmguard.vlms.prompts import Prompter

if TYPE_CHECKING:
    from vlmguard.training.grpo import GRPO

Reward: TypeAlias = Callable[..., Rewards]
STEPS_OF_REWARD: Final = 1024  # a power of two: means of equal rewards are then exactly that reward


@dataclass
class Learned:
    """What `learn` gives: the trained model, and what it took."""

    model: Any
    steps: int
    seconds: float
    loss: float
    tokens: float


def learn(
    model: Any,
    processor: Any,
    rows: Sequence[Mapping[str, Any]],
    pictures: Sequence[int],
    rewards: Mapping[Reward, float],
    options: GRPO,
    checkpoint: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Learned:
    """
    Args:
        model: with an adapter that is trained, in place; a copy of it is the reference where `beta` is above 0.
        rows: each with "prompt", the messages of a conversation with pictures in place, and what the rewards read.
        pictures: how many each row has.
        rewards: functions as in `rewards`, and their weights.
        checkpoint: a folder of an earlier run to go on from.
        say: is told a line a step.

    Raises:
        MissingExtra: the extra "train" is not installed. VLMGuardError: what a reward raises, or the disk is full.
    """
    try:
        from transformers import PrinterCallback
        from trl import GRPOTrainer
    except ImportError as error:
        raise missing_extra(error.name or "trl", "train") from error
    order = schedule(pictures, options.steps, options.batch, options.seed)
    with peft_quiet():
        trainer = GRPOTrainer(
            model=model,
            processing_class=processor,
            reward_funcs=[graded(one, options.max_completion_tokens, _ends(model, processor)) for one in rewards],
            train_dataset=_dataset(rows, order),
            args=_arguments(options, list(rewards.values())),
            callbacks=[curves(options.out / REWARDS_FILE, say)],
        )
        trainer.remove_callback(PrinterCallback)  # it prints a dict a step
        begun = time.perf_counter()
        with room(options.out):
            found = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trained = trainer.model
    if "ref" in getattr(trained, "peft_config", {}):
        trained.delete_adapter("ref")  # it would be saved beside the trained one
    tokens = max((one.get("num_tokens", 0.0) for one in trainer.state.log_history), default=0.0)
    return Learned(trained, found.global_step, time.perf_counter() - begun, float(found.training_loss), float(tokens))


def graded(reward: Reward, most_tokens: int, ends: Collection[int]) -> Reward:
    """A reward that is told which completions ran out of tokens (`cut`), in steps of 1 / STEPS_OF_REWARD.

    The steps keep a group in which all earn the same at a deviation of exactly 0. Without them rounding leaves some 1e-8,
    which the trainer divides by nearly as little, twice: advantages beyond 1 out of nothing, where no group differs.
    """

    def stepped(**given: Any) -> Rewards:
        cut = [len(ids) >= most_tokens and ids[-1] not in ends for ids in given["completion_ids"]]
        found = reward(**given, cut=cut)
        return [None if one is None else round(one * STEPS_OF_REWARD) / STEPS_OF_REWARD for one in found]

    stepped.__name__ = getattr(reward, "__name__", type(reward).__name__)  # names its curve
    return stepped


def _ends(model: Any, processor: Any) -> set[int]:
    """The tokens that end a completion."""
    declared = model.generation_config.eos_token_id
    several = declared if isinstance(declared, list) else [declared]
    return {processor.tokenizer.eos_token_id, *several} - {None}


@contextmanager
def peft_quiet() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.24 by an old name, and is told so at every step."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def schedule(pictures: Sequence[int], steps: int, batch: int, seed: int) -> list[int]:
    """Which rows each step takes: `batch` with equally many pictures, every row as often as any other in the long run.

    TRL cannot generate for rows with and without pictures together, and of models that pad pictures to one entry a row
    (Idefics, SmolVLM) it takes a batch apart in another way where the counts happen to add up (F103).

    Args:
        pictures: how many each row has.

    >>> schedule([0, 1, 0, 1, 1], steps=3, batch=2, seed=1)
    [2, 0, 3, 4, 1, 4]
    """
    rng = random.Random(seed)
    kinds = sorted(set(pictures))
    members = {kind: [row for row, count in enumerate(pictures) if count == kind] for kind in kinds}
    waiting: dict[int, list[int]] = {kind: [] for kind in kinds}
    order: list[int] = []
    for kind in rng.choices(kinds, [len(members[kind]) for kind in kinds], k=steps):
        while len(waiting[kind]) < batch:
            waiting[kind] += rng.sample(members[kind], len(members[kind]))
        order += waiting[kind][:batch]
        del waiting[kind][:batch]
    return order


def _dataset(rows: Sequence[Mapping[str, Any]], order: Sequence[int]) -> Any:
    """The rows as the trainer insists on, each made when its turn comes: no picture is held."""
    from datasets import Dataset

    def picked(numbers: Mapping[str, list[int]]) -> dict[str, list[Any]]:
        made = [rows[number] for number in numbers["number"]]
        return {name: [one[name] for one in made] for name in made[0]}

    return Dataset.from_dict({"number": list(order)}).with_transform(picked)


@dataclass(frozen=True)
class Examples(Sequence[Mapping[str, Any]]):
    """Rows as the trainer takes them; pictures are read when a row's turn comes.

    Args:
        instructed: with the instructions in front, for a model that was not trained on the format.
    """

    rows: Rows
    chosen: Sequence[Row]
    prompter: Prompter
    instructed: bool

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, number: int) -> Mapping[str, Any]:  # type: ignore[override]
        row = self.chosen[number]
        return {
            "prompt": self.messages(row),
            "row": row.id,
            "request": row.prompt,
            "risky": row.risky,
            "wanted": wanted(row),
        }

    def pictures(self) -> list[int]:
        """How many pictures each row shows, every frame of an animation counted. Reads them all."""
        return [len(question(self.rows.chat(row), instructed=False).images) for row in self.chosen]

    def messages(self, row: Row) -> list[dict[str, Any]]:
        """What the guard sends for a row, as messages with pictures in place. Raises ImageError."""
        asked = question(self.rows.chat(row), instructed=self.instructed)
        return [
            {
                "role": turn.role,
                "content": [
                    *({"type": "image", "image": model_ready(frames(image)[0])} for image in turn.images),
                    {"type": "text", "text": self.prompter.plain(turn.text)},
                ],
            }
            for turn in asked.messages
        ]

    def check(self, count: int = 8) -> None:
        """Raises ConfigError where the trainer's tokens of the first rows are not those that the guard sends."""
        for row in self.chosen[:count]:
            served = self.prompter(question(self.rows.chat(row), instructed=self.instructed)).tensors["input_ids"]
            trained = self.prompter.processor.apply_chat_template(
                [self.messages(row)], tokenize=True, add_generation_prompt=True, return_dict=True
            )["input_ids"]
            if list(trained[0]) != served[0].tolist():
                raise ConfigError(
                    "the trainer writes this model's prompts in another way than the guard does",
                    "Start from an SFT run on a base whose chat template takes a system turn, or needs none.",
                )


def wanted(row: Row) -> str:
    """What the user wanted, in words that the policy did not write: the row's own analysis, and the request."""
    analysis = parse_output(row.output).analysis
    return " ".join(filter(None, (analysis.text, analysis.image, row.prompt))) if analysis else row.prompt


def _arguments(options: GRPO, weights: list[float]) -> Any:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]
    from trl import GRPOConfig

    processes = PartialState().num_processes
    if options.batch % processes:
        raise ConfigError.wrong("batch", expected=f"a multiple of the {processes} processes", got=options.batch)
    return GRPOConfig(
        output_dir=str(options.out),
        max_steps=options.steps,
        per_device_train_batch_size=options.generations,  # one group at a time
        gradient_accumulation_steps=options.batch // processes,
        num_generations=options.generations,
        max_completion_length=options.max_completion_tokens,
        learning_rate=options.lr,
        beta=options.beta,
        temperature=options.temperature,
        seed=options.seed,
        shuffle_dataset=False,  # see `schedule`
        use_cpu=not torch.cuda.is_available(),
        reward_weights=weights,
        # A sum of the rewards would count one that is None as 0; normalised first, it counts as its group's mean.
        multi_objective_aggregation="normalize_then_sum",
        bf16=torch.cuda.is_available(),
        activation_checkpointing=torch.cuda.is_available(),
        logging_steps=1,
        save_steps=max(1, min(50, options.steps // 5)),
        save_total_limit=2,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
        log_multimodal=False,
    )
