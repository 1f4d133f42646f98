"""Names authored answers anew after a stage's prompt has changed: python -m runs.rekey data/transcripts --images DATA

An answer is found by the hash of the question that it answers (see vlmguard.synthesis.analyst). When the wording of a
question changes, the answers that were written for it still answer it: this renders every question anew and writes its
key. Read them all again first: an answer may no longer have the form that is asked for, which is said here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmguard.synthesis import causal, hindsight, optimize
from vlmguard.synthesis.analyst import Question, read_answer
from vlmguard.synthesis.run import write_whole
from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources import opened


def questions(sample: Sample, answers: Mapping[str, str]) -> Iterator[Question]:
    """The three questions about a sample, each made from the answers to those before."""
    yield hindsight.question(sample)
    features = read_answer(answers["hindsight"], hindsight.RiskFeatures)
    yield causal.question(sample, features)
    report = read_answer(answers["causal"], causal.RiskReport)
    yield optimize.question(sample, report)
    read_answer(answers["optimize"], optimize.Rewording)


def rekeyed(samples: Iterator[Sample | Malformed], answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers with their questions' keys. Raises AnswerUnusable for one that no longer has the form."""
    by_sample: dict[str, dict[str, dict[str, Any]]] = {}
    for answer in answers:
        by_sample.setdefault(answer["sample"], {})[answer["stage"]] = answer
    made = []
    for sample in samples:
        if isinstance(sample, Malformed) or sample.id not in by_sample:
            continue
        own = by_sample[sample.id]
        texts = {stage: answer["answer"] for stage, answer in own.items()}
        made += [{**own[question.stage], "key": question.key} for question in questions(sample, texts)]
    return made


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path, help="with samples.jsonl and answers.jsonl")
    options.add_argument("--images", type=Path, required=True, help="the folder that the samples' pictures lie in")
    given = options.parse_args()
    path = given.folder / "answers.jsonl"
    answers = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    made = rekeyed(iter(opened(str(given.folder / "samples.jsonl"), images=given.images)), answers)
    changed = sum(old.get("key") != new["key"] for old, new in zip(answers, made, strict=False))
    write_whole(path, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in made))
    print(f"{len(made)} answers, {len(answers) - len(made)} without a sample left out, {changed} keys changed")


if __name__ == "__main__":
    main()
