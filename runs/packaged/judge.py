"""The gate's network: MiniLM as a cross-encoder over request, words in the pictures and labels, with one soft token a picture.

A LoRA on the frozen sentence encoder, a projection of the vision tower's pooled features to a token, and two heads: risk
and category. The same class serves in `vlmguard.rewriter.gate`; here it is trained.
"""

from __future__ import annotations

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from runs.packaged.album import Album, read_as
from runs.packaged.rows import Case
from vlmguard.rewriter import sight
from vlmguard.rewriter.gate import context_of
from vlmguard.rewriter.network import RiskNetwork
from vlmguard.rewriter.protocol import CATEGORIES, Seen, neutral

PER_EPOCH = 7


@dataclass(frozen=True)
class Example:
    situation: str
    request: str
    context: str  # words and labels of the pictures, earlier turns
    pictures: tuple[int, ...]
    risk: bool
    category: int  # -1 unknown
    text: str = ""  # the user's words alone, to find same-words pairs
    weight: float = 1.0


def label(pooled: torch.Tensor, head: dict[str, Any], base: Path) -> list[tuple[str, ...]]:
    """Labels of every picture as the guard would give them; by heads that did not see a photo where it was trained on."""
    from safetensors.torch import load_file

    classifier = load_file(base / "labels.safetensors")
    logits = pooled @ head["weight"].T + head["bias"]
    seen = ~head["unseen"].isnan().any(1)
    logits[: len(seen)][seen] = head["unseen"][seen]
    imagenet = (pooled @ classifier["weight"].T + classifier["bias"]).softmax(-1)
    return sight.merge_labels(imagenet, logits.sigmoid(), sight.imagenet_names(), head["words"])


def examples(
    cases: Sequence[Case], book: Album, labels: Sequence[tuple[str, ...]], rng: random.Random
) -> list[Example]:
    """What the gate reads of every case, with the drawn words as a recogniser might return them."""
    made = []
    for case in cases:
        numbers = tuple(book.row(key) for key in case.pictures)
        seen = [
            Seen(labels[number], read_as(book.words(key), rng))
            for number, key in zip(numbers, case.pictures, strict=True)
        ]
        turns = [*case.turns, *([("system", case.system)] if case.system else [])]
        category = CATEGORIES.index(case.category) if case.category else -1
        made.append(
            Example(
                case.situation,
                neutral(case.text).lower(),
                context_of(seen, turns),
                numbers,
                case.risk,
                category,
                case.text,
            )
        )
    return made


def train(
    network: RiskNetwork,
    examples: Sequence[Example],
    pooled: torch.Tensor,
    *,
    epochs: float,
    seed: int = 0,
    rate: float = 5e-4,
    batch: int = 48,
    pair_weight: float = 0.5,
    report: Callable[[str], None] = print,
) -> None:
    """AdamW with a cosine; binary and category cross-entropy, and a ranking loss inside pairs of equal words."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    twins: dict[str, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        if not example.risk:
            twins[example.situation].append(index)
    network.train()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    steps = int(epochs * len(_alike(examples, batch, random.Random(seed))))
    begun, recent = time.perf_counter(), []
    order: list[list[int]] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        if not order:
            order = _alike(examples, batch, rng)
        chosen = list(order.pop())
        pairs = []
        for place, index in enumerate(chosen[: batch // 3]):
            if not examples[index].risk:
                continue
            others = twins[examples[index].situation]
            same = [k for k in others if examples[k].text == examples[index].text]
            if others:
                pairs.append((place, len(chosen)))
                chosen.append(rng.choice(same if same and rng.random() < 0.6 else others))
        rows = [examples[index] for index in chosen]
        with torch.autocast("cpu", torch.bfloat16):
            logit, category = network(
                [(row.request, row.context) for row in rows], [pooled[list(row.pictures)] for row in rows]
            )
        logit, category = logit.float(), category.float()
        risk = torch.tensor([float(row.risk) for row in rows])
        weight = torch.tensor([row.weight for row in rows])
        loss = (
            functional.binary_cross_entropy_with_logits(logit, risk * 0.96 + 0.02, reduction="none") * weight
        ).sum() / weight.sum()
        known = [k for k, row in enumerate(rows) if row.risk and row.category >= 0]
        if known:
            loss = loss + 0.3 * functional.cross_entropy(
                category[known], torch.tensor([rows[k].category for k in known])
            )
        if pairs and pair_weight:
            first, second = zip(*pairs, strict=True)
            loss = loss + pair_weight * functional.softplus(logit[list(second)] - logit[list(first)]).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent = [*recent[-99:], loss.item()]
        if step % 50 == 49:
            report(
                f"step {step + 1}/{steps} loss {sum(recent) / len(recent):.3f} {(time.perf_counter() - begun):.0f} s"
            )
    network.eval()


def _alike(examples: Sequence[Example], batch: int, rng: random.Random) -> list[list[int]]:
    """One epoch in shuffled batches of nearly equal length (padding costs as much as text), PER_EPOCH rows a situation."""
    found: dict[str, list[int]] = defaultdict(list)
    for index in rng.sample(range(len(examples)), len(examples)):
        found[examples[index].situation].append(index)
    chosen = [index for indices in found.values() for index in indices[:PER_EPOCH]]
    by_length = sorted(chosen, key=lambda k: len(examples[k].request) + len(examples[k].context) + rng.random() * 40)
    batches = [by_length[start : start + batch] for start in range(0, len(by_length), batch)]
    rng.shuffle(batches)
    return batches


@torch.inference_mode()
def score(network: RiskNetwork, examples: Sequence[Example], pooled: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """(N, 1 + categories): the risk logit, then the category logits."""
    order = sorted(range(len(examples)), key=lambda k: len(examples[k].request) + len(examples[k].context))
    out = torch.zeros(len(examples), 1 + network.categories)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [examples[k] for k in chosen]
        logit, category = network(
            [(row.request, row.context) for row in rows], [pooled[list(row.pictures)] for row in rows]
        )
        out[chosen] = torch.cat([logit[:, None], category], 1)
    return out
