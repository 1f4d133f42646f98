"""Rows of our own data that nearly repeat an evaluation item: python -m runs.packaged.overlap --data DIR [--drop].

Two texts overlap when they share at least 80 % of their distinct words (Jaccard) and have four words or more. `--drop` removes
such rows from `data/requests`; those in `data/situations` are only listed.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from runs.packaged.rows import lines

AUTHORED = Path(__file__).parents[2] / "data"
LEAST_WORDS, LEAST_SHARE = 4, 0.8


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))


def evaluated(folder: Path) -> Iterator[str]:
    """Every string of four words or more in the evaluation sets' index files."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".jsonl":
            found: list[object] = [*lines(path)]
        elif path.suffix == ".json":
            found = [json.loads(path.read_text())]
        elif path.suffix == ".csv":
            found = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        else:
            continue
        yield from _strings(found)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if LEAST_WORDS <= len(value.split()) <= 60:
            yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one)


class Index:
    def __init__(self, texts: Iterator[str]) -> None:
        self.sets = list({words(text) for text in texts})
        self.by_word: dict[str, list[int]] = defaultdict(list)
        for number, one in enumerate(self.sets):
            for word in one:
                self.by_word[word].append(number)

    def overlaps(self, text: str) -> bool:
        own = words(text)
        if len(own) < LEAST_WORDS:
            return False
        # a text that shares 80 % of our words shares one of any 20 % + 1 of them: the rarest are looked up
        rarest = sorted(own, key=lambda word: len(self.by_word.get(word, ())))[: int(len(own) * (1 - LEAST_SHARE)) + 1]
        near = {number for word in rarest for number in self.by_word.get(word, ())}
        return any(len(own & self.sets[number]) / len(own | self.sets[number]) >= LEAST_SHARE for number in near)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runs.packaged.overlap", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder data/eval")
    parser.add_argument("--drop", action="store_true")
    options = parser.parse_args()
    index = Index(evaluated(options.data))
    for path in sorted((AUTHORED / "requests").glob("*.jsonl")):
        every = path.read_text(encoding="utf-8").strip().split("\n")
        kept = [line for line in every if not index.overlaps(json.loads(line).get("text") or json.loads(line)["title"])]
        print(f"{path.name}: {len(every) - len(kept)} of {len(every)} overlap")
        if options.drop and len(kept) < len(every):
            path.write_text("\n".join(kept) + "\n")
    for path in sorted((AUTHORED / "situations").glob("*.jsonl")):
        rows = lines(path)
        near = [row["id"] for row in rows for text in row["texts"] if index.overlaps(text)]
        print(f"{path.name}: {len(near)} texts overlap {sorted(set(near))}")


if __name__ == "__main__":
    main()
