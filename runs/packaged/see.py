"""Stage 1: the projector learns to speak the language model's tongue, and a LoRA to name what stands in a picture.

    align    contrastive: the mean of a picture's 49 projected tokens goes to the embedding of its label
    name     cross-entropy of short answers that name or describe the picture (projector and LoRA together)
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from runs.packaged import learn

ASK = [
    "What is the main object in this picture?", "What is shown here?", "Name the object in the photo.", "What do you see?",
    "What is in this image?", "Can you tell me what this is?", "Which object is this?", "Identify the main thing in the picture.",
    "What is this a photo of?", "Tell me what the picture shows.", "what's this", "Describe the picture briefly.",
]
SAY = ["This is {a}.", "The picture shows {a}.", "It is {a}.", "The main object is {a}.", "That is {a}.", "I see {a}."]


def with_article(name: str) -> str:
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def naming_rows(tokenizer, image_token: int, items, train: set[int], rng: random.Random, times: int = 3) -> list[learn.Row]:
    rows = []
    for index, (source, label, _path) in enumerate(items):
        if index not in train:
            continue
        for _ in range(times if source == "caltech101" else 2):
            target = rng.choice(SAY[:2] if rng.random() < 0.7 else SAY).format(a=with_article(label))
            rows.append(learn.encode(tokenizer, image_token, rng.choice(ASK), target, [index]))
    return rows


def caption_rows(tokenizer, image_token: int, items, data: Path, authored: Path, rng: random.Random) -> list[learn.Row]:
    """COCO's captions and ours of the JailGuard photos, as answers to a request to describe."""
    captions: dict[tuple[str, str], list[str]] = {}
    for folder in ("coco_mini_open", "coco_mini_research"):
        for line in (data / folder / "captions.jsonl").open():
            row = json.loads(line)
            captions["coco", Path(row["image"]).stem.lstrip("0")] = row["captions"]
    for line in (authored / "photos/jailguard.jsonl").open():
        row = json.loads(line)
        captions["jailguard", str(row["id"])] = [row["caption"], "The picture shows " + ", ".join(row["labels"]) + "."]
    ask = ["Describe the picture.", "What is happening in this photo?", "Write a caption for this image.", "What does the photo show?"]
    rows = []
    for index, (source, label, _path) in enumerate(items):
        for caption in captions.get((source, label), [])[:4]:
            rows.append(learn.encode(tokenizer, image_token, rng.choice(ask), caption.strip().capitalize().rstrip(".") + ".", [index]))
    return rows
