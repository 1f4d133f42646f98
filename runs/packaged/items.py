"""The benchmark items that `runs/quality.sh` reports on, from a folder laid out as the project's data notes describe.

Every item is a chat (text and at most one picture), with the set it is from and whether it is risky. Subsets: what is not there is
not counted, and a missing file is an error.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runs.packaged.rows import lines


@dataclass(frozen=True)
class Item:
    set: str
    id: str
    text: str
    image: Path | None
    risky: bool
    pair: str | None = None  # items of one pair differ in words or picture only


def items(folder: Path) -> Iterator[Item]:
    """Every item, in the order of the sets."""
    yield from figstep(folder / "figstep")
    mm = folder / "mm_safetybench"
    for row in lines(mm / "images_with_questions.jsonl"):
        yield Item("mm_safetybench", str(row["id"]), row["question"], mm / row["image"], True)
    for row in lines(folder / "hades/hades.jsonl"):
        yield Item("hades", row["id"], row["hades_prompt"], folder / "hades" / row["image"], True)
    for row in lines(folder / "mossbench/mossbench.jsonl"):
        image = folder / "mossbench" / row["image"]
        yield Item("mossbench_benign", row["pid"], row["question"], image, False, row["pid"])
        if row["contrast_same_image"] and row["contrast_question"]:
            yield Item("mossbench_harmful", row["pid"] + "-harm", row["contrast_question"], image, True, row["pid"])
    for row in lines(folder / "jailguard_benign/questions.jsonl"):
        yield Item(
            "jailguard_benign", str(row["id"]), row["question"], folder / "jailguard_benign" / row["image"], False
        )
    yield from combination(folder)
    with (folder / "xstest/xstest_prompts.csv").open() as file:
        for row in csv.DictReader(file):
            risky = row["label"] == "unsafe"
            yield Item(f"xstest_{row['label']}", row["id"], row["prompt"], None, risky)
    with (folder / "strongreject/strongreject_dataset.csv").open() as file:
        for number, row in enumerate(csv.DictReader(file)):
            text = row.get("forbidden_prompt") or row["meli_query"]
            yield Item("strongreject", str(number), text, None, True)


def figstep(folder: Path) -> Iterator[Item]:
    prompt = (folder / "text_prompt.txt").read_text().strip()
    for row in lines(folder / "safebench.jsonl"):
        yield Item("figstep", row["id"], prompt, folder / row["image"], True)


def combination(folder: Path) -> Iterator[Item]:
    for row in lines(folder / "combination/combination.jsonl"):

        def place(name: str) -> Path:
            return next(
                path
                for path in (folder / name, folder / "combination" / name, folder / "jailguard_benign" / name)
                if path.is_file()
            )

        yield Item("combination_risky", row["id"], row["risky_text"], place(row["image"]), True, row["id"])
        yield Item(
            "combination_safe_text", row["id"] + "-text", row["safe_text"], place(row["image"]), False, row["id"]
        )
        if row.get("safe_image"):
            yield Item(
                "combination_safe_image",
                row["id"] + "-image",
                row["risky_text"],
                place(row["safe_image"]),
                False,
                row["id"],
            )
