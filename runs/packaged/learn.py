"""The training loop of the packaged models: LoRA (and the projector) on cached tower features, in bf16 on two cores.

Right-padded batches of nearly equal length need no attention mask under a causal model, and logits are computed for the
target positions only: both together are about twice as fast on a CPU as a general trainer.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from runs.packaged.album import Table
from vlmguard.rewriter.decoding import prompt_ids

PAD = 0


@dataclass
class Row:
    """One training sample: token ids with the image token where a picture's 49 features go, and where the target starts."""

    ids: list[int]
    start: int  # index of the first target token
    pictures: list[int] = field(default_factory=list)  # rows of the feature table
    weight: float = 1.0
    first_weight: float = 1.0  # weight of the first target token (the verdict)


def batches(rows: Sequence[Row], tokens: int, rng: random.Random) -> list[list[Row]]:
    """Shuffled batches of nearly equal length holding at most about `tokens` tokens."""
    order = sorted(rows, key=lambda row: len(row.ids) + rng.random() * 12)
    made, current = [], []
    for row in order:
        if current and (len(current) + 1) * max(len(row.ids), len(current[-1].ids)) > tokens:
            made.append(current)
            current = []
        current.append(row)
    if current:
        made.append(current)
    rng.shuffle(made)
    return made


def embed(
    model: Any, rows: Sequence[Row], features: Table, image_token: int, view: random.Random | None = None
) -> torch.Tensor:
    """Input embeddings (B, T, d) with the projected pictures in place; a random view of each picture when `view` is given."""
    length = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [PAD] * (length - len(row.ids)) for row in rows])
    inner = model.model
    embedded = inner.language_model.embed_tokens(ids)
    chosen = [
        features[picture, view.randrange(features.views) if view else 0] for row in rows for picture in row.pictures
    ]
    if chosen:
        projected = inner.multi_modal_projector(torch.stack(chosen).to(embedded.dtype))
        mask = (ids == image_token).unsqueeze(-1)
        embedded = embedded.masked_scatter(mask, projected)
    return embedded


def loss_of(
    model: Any, rows: Sequence[Row], features: Table, image_token: int, view: random.Random | None = None
) -> torch.Tensor:
    """Weighted mean cross-entropy of the targets."""
    embedded = embed(model, rows, features, image_token, view)
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    picked, labels, weights = [], [], []
    for index, row in enumerate(rows):
        end = len(row.ids)
        picked.append(hidden[index, row.start - 1 : end - 1])
        labels.append(torch.tensor(row.ids[row.start : end]))
        weight = torch.full((end - row.start,), row.weight)
        weight[0] = row.weight * row.first_weight
        weights.append(weight)
    logits = model.lm_head(torch.cat(picked)).float()
    target, weight = torch.cat(labels), torch.cat(weights)
    each = functional.cross_entropy(logits, target, reduction="none")
    return (each * weight).sum() / weight.sum()


def train(
    model: Any,
    rows: Sequence[Row],
    features: Table,
    image_token: int,
    *,
    minutes: float,
    groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]],
    tokens: int = 2048,
    warmup: int = 20,
    epochs: float = 100,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> dict[str, float]:
    """AdamW on fp32 masters of the given parameters: warm-up, then a cosine over the time or the epochs, whichever ends first."""
    rng = random.Random(seed)
    pairs = [(parameter, parameter.detach().float().clone()) for parameters, _ in groups for parameter in parameters]
    masters = iter(pairs)
    optimizer = torch.optim.AdamW(
        [{"params": [next(masters)[1] for _ in parameters], "lr": rate, "peak": rate} for parameters, rate in groups],
        weight_decay=0.01,
        betas=(0.9, 0.98),
    )
    begun = time.perf_counter()
    per_epoch = len(batches(rows, tokens, random.Random(seed)))
    step, seen, recent = 0, 0, []
    for batch in _forever(rows, tokens, rng):
        share = max((time.perf_counter() - begun) / (minutes * 60), step / (epochs * per_epoch))
        if share >= 1:
            break
        scale = min(1.0, (step + 1) / warmup) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * scale
        loss = loss_of(model, batch, features, image_token, rng)
        loss.backward()
        for parameter, master in pairs:
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_([master for _, master in pairs], 1.0)
        optimizer.step()
        with torch.no_grad():
            for parameter, master in pairs:
                parameter.copy_(master)
        step += 1
        seen += len(batch)
        recent = [*recent[-49:], loss.item()]
        if step % 20 == 0:
            speed = seen / (time.perf_counter() - begun)
            report(f"step {step} epoch {step / per_epoch:.2f} loss {sum(recent) / len(recent):.3f} rows/s {speed:.1f}")
    return {
        "steps": step,
        "rows": seen,
        "minutes": round((time.perf_counter() - begun) / 60, 1),
        "loss": sum(recent) / max(1, len(recent)),
    }


def _forever(rows: Sequence[Row], tokens: int, rng: random.Random) -> Iterator[list[Row]]:
    while True:
        yield from batches(rows, tokens, rng)


def encode(tokenizer: Any, image_token: int, text: str, target: str, pictures: Sequence[int], **weights: float) -> Row:
    """A row in the packaged chat template: user (pictures, then text) -> assistant target."""
    asked = prompt_ids(tokenizer, image_token, text, len(pictures))
    answer = tokenizer(target, add_special_tokens=False, split_special_tokens=True).input_ids
    return Row([*asked, *answer, tokenizer.convert_tokens_to_ids("<|im_end|>")], len(asked), list(pictures), **weights)
