"""The loop of supervised training: TRL's, with less to compute on a processor, and nothing told to anybody."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTTrainer

from vlmguard.training.prompts import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

WRITTEN_LAST = "trainer_state.json"  # of a checkpoint's files


class Loop(SFTTrainer):  # type: ignore[misc]
    """
    On a GPU TRL computes logits where something is learned, and there alone. Elsewhere it computes those of every token,
    prompt and pictures included, which with a large vocabulary is a fifth of a small model's work: here it is left out.

    Attributes:
        tokens: that were learned from or read, pictures' included, by this process; padding does not count.
    """

    tokens = 0

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of what is learned, or its share of a step's `num_items_in_batch` tokens."""
        self.tokens += int(inputs["attention_mask"].sum())
        if return_outputs or self.aux_loss_enabled or inputs["labels"].device.type != "cpu":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORED
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with _head_of(self.model, learned):
            logits = model(**given, use_cache=False).logits.float()
        target = labels[learned]
        count = len(target) if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy(logits, target, reduction="sum") / torch.as_tensor(count).clamp(min=1)
        right = (logits.detach().argmax(-1) == target).float().mean() if len(target) else torch.zeros(())
        self._metrics["train"]["mean_token_accuracy"].append(right.item())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the gradients of several processes are averaged
        return loss

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Ours is written when there is something to tell."""

    def _send_telemetry(self) -> None:
        """TRL would tell the hub which kind of model is trained on how many GPUs."""


@contextmanager
def _head_of(model: Any, places: Tensor) -> Iterator[None]:
    """Inside, the head sees the hidden states at `places` (B, T - 1) alone, and the model's logits are (N, vocabulary)."""

    def pick(_: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
        return (given[0][:, :-1][places], *given[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def last_checkpoint(folder: Path, *, clear: bool = False) -> Path | None:
    """The newest checkpoint that is whole: a run that was killed, or a full disk, may leave a torn one behind.

    Args:
        clear: remove the torn ones.
    """
    numbered = {
        int(number): path
        for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (number := path.name.rpartition("-")[2]).isdecimal()
    }
    for _, path in sorted(numbered.items(), reverse=True):
        if _whole(path):
            return path
        if clear:
            shutil.rmtree(path, ignore_errors=True)
    return None


def _whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / WRITTEN_LAST).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    weights = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
    return any((checkpoint / name).is_file() for name in weights)
