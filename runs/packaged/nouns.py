"""Stage 0: a linear head on the vision tower for what ImageNet's thousand labels lack: people, places, everyday scenes.

Its words are the nouns of our captions of the JailGuard photos, COCO's object names and Caltech's labels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional

from runs.packaged.rows import lines

MERGE = {
    "men": "man",
    "women": "woman",
    "people": "person",
    "children": "child",
    "boys": "boy",
    "girls": "girl",
    "kids": "child",
}


def targets(
    items: Sequence[tuple[str, str, str]], data: Path, authored: Path, least: int = 6
) -> tuple[list[str], torch.Tensor]:
    """(words, (photos, words) float table): 1 where a photo shows it, -1 where the set can't tell."""
    named: dict[tuple[str, str], set[str]] = {}
    for folder in ("coco_mini_open", "coco_mini_research"):
        for row in lines(data / folder / "captions.jsonl"):
            named["coco", Path(row["image"]).stem.lstrip("0")] = {MERGE.get(name, name) for name in row["objects"]}
    for row in lines(authored / "photos/jailguard.jsonl"):
        named["jailguard", str(row["id"])] = {MERGE.get(name.lower(), name.lower()) for name in row["labels"]}
    count = Counter(word for words in named.values() for word in words)
    caltech = sorted({label for source, label, _ in items if source == "caltech101"})
    words = sorted(
        {word for word, seen in count.items() if seen >= least} | {label.replace("_", " ") for label in caltech}
    )
    table = torch.full((len(items), len(words)), -1.0)
    for row, (source, label, _) in enumerate(items):
        if source == "caltech101":
            shown = {label.replace("_", " ")}
            known = [index for index, word in enumerate(words) if word in {c.replace("_", " ") for c in caltech}]
        elif (source, label) in named:
            shown = named[source, label]
            known = [index for index, word in enumerate(words) if count[word] >= least]
        else:
            continue
        for index in known:
            table[row, index] = float(words[index] in shown)
    return words, table


def fit(
    features: torch.Tensor, table: torch.Tensor, steps: int = 300, decay: float = 3e-3, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (words, 1280) and biases of a logistic head on pooled features, unknown cells left out."""
    torch.manual_seed(seed)
    mean, deviation = features.mean(0), features.std(0) + 1e-6
    inputs = (features - mean) / deviation
    weight = torch.zeros(table.shape[1], inputs.shape[1], requires_grad=True)
    bias = torch.full((table.shape[1],), -3.0, requires_grad=True)
    known = (table >= 0).float()
    optimizer = torch.optim.Adam([weight, bias], lr=0.01)
    for _ in range(steps):
        logits = inputs @ weight.T + bias
        each = functional.binary_cross_entropy_with_logits(logits, table.clamp(min=0), reduction="none")
        loss = (each * known).sum() / known.sum() * table.shape[1] * 0.05 + decay * weight.pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return weight / deviation, bias - (weight / deviation) @ mean


def crossfit(features: torch.Tensor, table: torch.Tensor, folds: int = 5) -> dict[str, torch.Tensor]:
    """The head on all photos that tell something, and for those its logits by heads that did not see them (NaN elsewhere)."""
    known = (table >= 0).any(1)
    fold = torch.randint(0, folds, (len(table),), generator=torch.Generator().manual_seed(0))
    logits = torch.full(table.shape, float("nan"))
    for number in range(folds):
        weight, bias = fit(features[known & (fold != number)], table[known & (fold != number)])
        unseen = known & (fold == number)
        logits[unseen] = features[unseen] @ weight.T + bias
    weight, bias = fit(features[known], table[known])
    return {"weight": weight, "bias": bias, "unseen": logits}
