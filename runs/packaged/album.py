"""Every picture of the training data as tower features, computed once: photos in four views, drawn pictures in one."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from runs.packaged import pictures
from runs.packaged.rows import lines

Item = tuple[str, str, str]  # source, label or id, path


def photos(data: Path) -> list[Item]:
    """The photos of `data/train`: (source, label or id, path)."""

    def named(name: str) -> list[dict[str, Any]]:
        return lines(data / name)

    items = [
        ("caltech101", row["label"], str(data / "caltech101" / row["image"]))
        for row in named("caltech101/labels.jsonl")
    ]
    items += [
        ("imagenet", row["label"], str(data / "imagenet_samples" / row["image"]))
        for row in named("imagenet_samples/labels.jsonl")
    ]
    for folder in ("coco_mini_open", "coco_mini_research"):
        items += [
            ("coco", Path(row["image"]).stem.lstrip("0"), str(data / folder / row["image"]))
            for row in named(f"{folder}/captions.jsonl")
        ]
    items += [
        ("jailguard", str(row["id"]), str(data / "jailguard_benign" / row["image"]))
        for row in named("jailguard_benign/questions.jsonl")
    ]
    return items


class Album:
    """Picture keys of the cases -> rows of one feature table (rows, views, 49, 1280)."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)
        self.by_name: dict[str, list[int]] = {}
        for index, (source, label, _) in enumerate(items):
            self.by_name.setdefault(f"{source}:{label}", []).append(index)
        self.drawn: dict[str, int] = {}

    def row(self, key: str) -> int:
        if key.startswith("photo "):
            name, number = key[6:].rsplit(" ", 1)
            found = self.by_name[name]
            return found[int(number) % len(found)]
        return self.drawn.setdefault(key, len(self.items) + len(self.drawn))

    def words(self, key: str) -> str:
        return "" if key.startswith("photo ") else " ".join(pictures.words(json.loads(key[6:])))

    def open(self, row: int) -> Image.Image:
        if row < len(self.items):
            with Image.open(self.items[row][2]) as image:
                return image.convert("RGB")
        key = next(key for key, index in self.drawn.items() if index == row)
        spec = json.loads(key[6:])
        rng = random.Random(spec["seed"])
        photo = None
        if spec.get("photo") == "any":
            photo = self.open(rng.randrange(len(self.items)))
        elif spec.get("photo"):
            photo = self.open(self.by_name[spec["photo"]][0])
        return pictures.draw(spec, rng, photo)


def read_as(words: str, rng: random.Random) -> str:
    """Drawn words as a recogniser would return them: a lost blank here and there, a lost mark, a confused letter."""
    made = []
    for word in words.split():
        if word in ("1.", "2.", "3.", "1)", "2)", "3)", "-") and rng.random() < 0.3:
            continue
        if rng.random() < 0.02 and len(word) > 3:
            at = rng.randrange(len(word))
            word = word[:at] + rng.choice("lIo0rnceat") + word[at + 1 :]
        made.append(word + ("" if rng.random() < 0.06 else " "))
    return "".join(made).strip()


class Table:
    """The tower features of photos (four views) and drawn pictures (one) under one numbering: table[row, view] (49, 1280)."""

    views = 4

    def __init__(self, photos: Tensor, drawn: Tensor) -> None:
        self.photos, self.drawn = photos, drawn

    def __getitem__(self, place: tuple[int, int]) -> Tensor:
        row, view = place
        return self.photos[row, view] if row < len(self.photos) else self.drawn[row - len(self.photos), 0]


def four_views(path: str) -> list[Image.Image]:
    """The photo, its mirror image, and a crop of each."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    width, height = image.size
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    middle = image.crop((int(0.1 * width), int(0.1 * height), int(0.9 * width), int(0.9 * height)))
    return [image, mirrored, middle, mirrored.crop((0, int(0.12 * height), int(0.88 * width), height))]


def features(model: Any, processor: Any, sources: Iterable[Any], views: Callable[[Any], list[Image.Image]]) -> Tensor:
    """(sources, views, 49, 1280) bfloat16: the vision tower's last feature map of every view."""
    tower = model.model.vision_tower.eval()
    made = []
    with torch.inference_mode():
        for source in sources:
            pixels = processor.image_processor(views(source), return_tensors="pt")["pixel_values"]
            made.append(tower(pixels).last_hidden_state.flatten(2).permute(0, 2, 1).to(torch.bfloat16))
    return torch.stack(made)
