"""Training throughput: our loop beside TRL's own on the same model and rows: python -m bench.train DATA --images DIR

Both are TRL's SFTTrainer with the same settings; theirs has its own collator on conversational rows in random order, ours our
tokens in batches of near-equal length, and on a processor logits of the learned tokens alone. They run in turn, `--rounds` times.
Tokens are the rows' own, padding left out, so that padding is a cost. Prints JSON: tokens a second of each, their ratio, and
resident memory over the steps of the last round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
from datasets import Dataset
from peft import get_peft_model
from PIL import Image
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from vlmguard.rewriter.protocol import render_input
from vlmguard.training.loop import Loop
from vlmguard.training.models import lora
from vlmguard.training.prompts import Collator
from vlmguard.training.sft import SFT, Prepared, arguments, prepared


class Watch(TrainerCallback):  # type: ignore[misc]
    """Memory in MiB after each step, and the time from the end of the first to the end of the last."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.times: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.resident.append(psutil.Process().memory_info().rss // 2**20)
        self.times.append(time.perf_counter())


def ours(options: SFT, ready: Prepared) -> tuple[Any, Any]:
    rows = {"number": list(range(len(ready.learn))), "length": ready.lengths, "images": [[] for _ in ready.learn]}
    return Dataset.from_dict(rows), Collator(ready.encoder, ready.rows, ready.learn, ready.encoder.end)


def theirs(ready: Prepared) -> tuple[Any, Any]:
    made = []
    for row in ready.learn:
        chat = ready.rows.chat(row)
        pictures = [Image.open(ready.rows.images / one["path"]).convert("RGB") for one in row.images]
        parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": render_input(chat, whole=True)}]
        made.append(
            {
                "images": pictures,
                "prompt": [{"role": "user", "content": parts}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": row.output}]}],
            }
        )
    return Dataset.from_list(made), None


def trained(options: SFT, ready: Prepared, data: Any, collator: Any, *, own: bool) -> tuple[float, list[int]]:
    """(tokens a second, memory by step); the first step, which warms up, is left out of the time."""
    settings = arguments(options, len(ready.learn))
    settings.save_strategy = "no"
    if not own:
        settings.train_sampling_strategy = "random"
    watch = Watch()
    model = get_peft_model(ready.base.model, lora(ready.base, options.rank, options.alpha, 0.0))
    trainer = (Loop if own else SFTTrainer)(
        model=model, args=settings, train_dataset=data, data_collator=collator, processing_class=ready.base.processor
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(watch)
    trainer.train()
    model.unload()
    mean = sum(ready.lengths) / len(ready.lengths)
    tokens = mean * options.batch_size * options.accumulation * (len(watch.times) - 1)
    return tokens / (watch.times[-1] - watch.times[0]), watch.resident


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("data", type=Path)
    options.add_argument("--images", type=Path)
    options.add_argument("--base", default="packaged:base")
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--batch-size", type=int, default=4)
    given = options.parse_args()
    warnings.simplefilter("ignore")
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    resident: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        told = SFT(
            given.data,
            given.base,
            Path(folder),
            given.images,
            steps=given.steps,
            batch_size=given.batch_size,
            held_out=0.0,
        )
        ready = prepared(told)
        sides = {"ours": ours(told, ready), "trl": theirs(ready)}
        for _ in range(given.rounds):
            for name, (data, collator) in sides.items():
                speed, memory = trained(told, ready, data, collator, own=name == "ours")
                speeds[name].append(speed)
                resident = memory if name == "ours" else resident
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        json.dumps(
            {
                "tokens_per_second": {name: round(value, 1) for name, value in medians.items()},
                "ratio": round(medians["ours"] / medians["trl"], 3),
                "resident_mib_by_step": resident,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
