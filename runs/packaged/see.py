"""Stage 1: the projector learns to speak the language model's tongue, and a LoRA to name what stands in a picture.

align    contrastive: the mean of a picture's 49 projected tokens goes to the embedding of its label
name     cross-entropy of short answers that name or describe the picture (projector and LoRA together)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from runs.packaged import learn
from runs.packaged.rows import lines

HELD_FROM = 16  # of the 20 photos of a Caltech class, the last four are never trained on

ASK = [
    "What is the main object in this picture?",
    "What is shown here?",
    "Name the object in the photo.",
    "What do you see?",
    "What is in this image?",
    "Can you tell me what this is?",
    "Which object is this?",
    "Identify the main thing in the picture.",
    "What is this a photo of?",
    "Tell me what the picture shows.",
    "what's this",
    "Describe the picture briefly.",
]
SAY = ["This is {a}.", "The picture shows {a}.", "It is {a}.", "The main object is {a}.", "That is {a}.", "I see {a}."]


def with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def split(items: Any) -> tuple[list[int], list[int]]:
    """(photos to learn names from, Caltech photos held out)."""
    train, held, count = [], [], {}
    for index, (source, label, _) in enumerate(items):
        if source == "caltech101":
            count[label] = count.get(label, 0) + 1
            (held if count[label] > HELD_FROM else train).append(index)
        elif source == "imagenet":
            train.append(index)
    return train, held


def align(
    model: Any, tokenizer: Any, items: Any, features: torch.Tensor, steps: int = 700, seed: int = 0
) -> dict[str, Any]:
    """Contrastive: the mean of a photo's projected tokens against the mean embedding of its label's, all labels beside it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    embedding = model.get_input_embeddings().weight.detach()
    centre, deviation = embedding.mean(0), embedding.std()
    names = sorted({label for source, label, _ in items if source in ("caltech101", "imagenet")})
    number = {name: index for index, name in enumerate(names)}
    ids = [tokenizer(" " + name.replace("_", " "), add_special_tokens=False).input_ids for name in names]
    aims = functional.normalize(torch.stack([embedding[one].mean(0) for one in ids]) - centre, dim=1)
    train, held = split(items)
    target = torch.tensor([number.get(label, 0) for _, label, _ in items])
    projector = model.model.multi_modal_projector
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0.01)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        chosen = torch.tensor(rng.sample(train, 128))
        tokens = projector(features[chosen, torch.randint(0, features.shape[1], (128,))].float())
        seen = functional.normalize(tokens.mean(1) - centre, dim=1)
        like = (tokens.std() / deviation - 1) ** 2 + 0.1 * (tokens.mean((0, 1)) - centre).pow(2).mean() / deviation**2
        loss = functional.cross_entropy(seen @ aims.T * 30, target[chosen]) + like
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        caltech = torch.tensor([number[name] for name in sorted({items[index][1] for index in held})])
        seen = functional.normalize(projector(features[torch.tensor(held), 0].float()).mean(1) - centre, dim=1)
        right = (caltech[(seen @ aims[caltech].T).argmax(1)] == target[torch.tensor(held)]).float().mean()
    print(f"held-out Caltech photos nearest to their label: {right:.3f}")
    return {"projector": projector.state_dict(), "train": train, "held": held}


def naming_rows(
    tokenizer: Any, image_token: int, items: Any, train: set[int], rng: random.Random, times: int = 3
) -> list[learn.Row]:
    rows = []
    for index, (source, label, _path) in enumerate(items):
        if index not in train:
            continue
        for _ in range(times if source == "caltech101" else 2):
            target = rng.choice(SAY[:2] if rng.random() < 0.7 else SAY).format(a=with_article(label))
            rows.append(learn.encode(tokenizer, image_token, rng.choice(ASK), target, [index]))
    return rows


def caption_rows(
    tokenizer: Any, image_token: int, items: Any, data: Path, authored: Path, rng: random.Random
) -> list[learn.Row]:
    """COCO's captions and ours of the JailGuard photos, as answers to a request to describe."""
    captions: dict[tuple[str, str], list[str]] = {}
    for folder in ("coco_mini_open", "coco_mini_research"):
        for row in lines(data / folder / "captions.jsonl"):
            captions["coco", Path(row["image"]).stem.lstrip("0")] = row["captions"]
    for row in lines(authored / "photos/jailguard.jsonl"):
        captions["jailguard", str(row["id"])] = [row["caption"], "The picture shows " + ", ".join(row["labels"]) + "."]
    ask = [
        "Describe the picture.",
        "What is happening in this photo?",
        "Write a caption for this image.",
        "What does the photo show?",
    ]
    rows = []
    for index, (source, label, _path) in enumerate(items):
        for caption in captions.get((source, label), [])[:4]:
            rows.append(
                learn.encode(
                    tokenizer, image_token, rng.choice(ask), caption.strip().capitalize().rstrip(".") + ".", [index]
                )
            )
    return rows
