"""The stages that make the packaged models, each from the files of those before it: python -m runs.packaged STAGE.

`runs/packaged.sh` runs them all and says how long each took.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from runs.packaged import album, assistant, calibrate, judge, learn, nouns, rewriter, rows, see
from vlmguard.rewriter.network import RiskNetwork
from vlmguard.rewriter.protocol import CATEGORIES
from vlmguard.vlms import assemble

AUTHORED = Path(__file__).parents[2] / "data"
REPEATED = 500  # rewrites among the verdicts, so that none is forgotten
LORA_MODULES = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Run:
    """Where the data is, where the stages' files go, and the models they start from."""

    def __init__(self, data: Path, build: Path) -> None:
        self.data, self.build = data, build
        build.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, value: Any) -> None:
        torch.save(value, self.build / f"{name}.pt")

    def get(self, name: str) -> Any:
        return torch.load(self.build / f"{name}.pt", weights_only=False, mmap=True)

    def base(self, dtype: torch.dtype) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        folder = assemble.ensure(print)
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype), AutoProcessor.from_pretrained(folder)

    def album(self) -> album.Album:
        made = album.Album(self.get("photos")["items"])
        made.drawn = self.get("drawn")["drawn"]
        return made

    def table(self) -> album.Table:
        return album.Table(self.get("photos")["features"], self.get("drawn")["features"])

    def adapted(self, start: dict[str, Any] | None) -> tuple[Any, Any, Any]:
        """(model, PEFT model, processor) in bfloat16 with a new LoRA; `start`: the projector and LoRA of an earlier stage."""
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

        torch.manual_seed(0)
        model, processor = self.base(torch.bfloat16)
        config = LoraConfig(r=16, lora_alpha=32, target_modules=LORA_MODULES, task_type="CAUSAL_LM")
        if start:
            model.model.multi_modal_projector.load_state_dict(start["projector"])
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
        if start and "lora" in start:
            set_peft_model_state_dict(adapted, start["lora"])
        return model, adapted, processor


def photos(run: Run) -> None:
    """Tower features of every photo of data/train in four views."""
    model, processor = run.base(torch.float32)
    items = album.photos(run.data)
    run.keep(
        "photos",
        {"items": items, "features": album.features(model, processor, [item[2] for item in items], album.four_views)},
    )


def words(run: Run) -> None:
    """The noun head, and its out-of-fold logits for the photos it learns from."""
    found = run.get("photos")
    pooled = found["features"][:, 0].float().mean(1)
    named, table = nouns.targets(found["items"], run.data, AUTHORED)
    run.keep("nouns", {"words": named, "pooled": pooled, **nouns.crossfit(pooled, table)})


def cases(run: Run) -> None:
    """Every case, and tower features of every picture that it has us draw."""
    made = rows.load(AUTHORED, rows.captions(run.data, AUTHORED))
    book = album.Album(album.photos(run.data))
    for case in made:
        for key in case.pictures:
            book.row(key)
    model, processor = run.base(torch.float32)
    first = len(book.items)
    numbers = range(first, first + len(book.drawn))
    features = album.features(model, processor, numbers, lambda number: [book.open(number)])
    run.keep("drawn", {"drawn": book.drawn, "features": features})
    run.keep("cases", made + rows.ordinary(AUTHORED, run.data, made))


def align(run: Run) -> None:
    """The projector against label embeddings."""
    model, processor = run.base(torch.float32)
    found = run.get("photos")
    run.keep("align", see.align(model, processor.tokenizer, found["items"], found["features"]))


def examples(run: Run) -> None:
    """What the gate reads of every case."""
    found, head = run.get("photos"), run.get("nouns")
    pooled = torch.cat([head["pooled"], run.get("drawn")["features"][:, 0].float().mean(1)])
    labels = judge.label(pooled, head, assemble.base_folder())
    made = judge.examples(run.get("cases"), run.album(), labels, random.Random(0))
    run.keep("examples", {"examples": made, "pooled": pooled, "labels": labels, "photos": len(found["items"])})


def gate(run: Run) -> None:
    """The gate's networks on the training share of the situations, then calibration on the held-out share."""
    found, every = run.get("examples"), run.get("cases")
    train = [example for example, case in zip(found["examples"], every, strict=True) if not case.held]
    states = []
    for seed in range(calibrate.SEEDS):
        torch.manual_seed(seed)
        network = RiskNetwork.make(len(CATEGORIES), calibrate.RANK)
        judge.train(network, train, found["pooled"], epochs=calibrate.EPOCHS, rate=1e-3, seed=seed)
        states.append(
            {"state": network.own_state(), "scores": judge.score(network, found["examples"], found["pooled"])}
        )
        run.keep("gate", states)


def name(run: Run) -> None:
    """Projector and LoRA learn to name photos."""
    start = run.get("align")
    model, adapted, processor = run.adapted(start)
    rng, items, token = random.Random(0), run.get("photos")["items"], model.config.image_token_id
    made = see.naming_rows(processor.tokenizer, token, items, set(start["train"]), rng)
    made += see.caption_rows(processor.tokenizer, token, items, run.data, AUTHORED, rng)
    _learn(run, "name", model, adapted, made, minutes=9, rate=3e-4, projector=3e-4, tokens=1600, epochs=9)


def told(run: Run) -> None:
    """The untrained base's own answers to harmless text requests, and to rewritten ones."""
    model, processor = run.base(torch.bfloat16)
    every = run.get("cases")
    prompts = [case.prompt for case in assistant.rewritten_texts(every) if case.prompt]
    run.keep("told", assistant.own_answers(model, processor.tokenizer, assistant.harmless_texts(every), 36))
    run.keep("told_rewritten", assistant.own_answers(model, processor.tokenizer, prompts, 56))


def assist(run: Run) -> None:
    """The assistant's adapter, and the projector's last training."""
    start = run.get("name")
    model, adapted, processor = run.adapted(start)
    rng, items, token = random.Random(0), run.get("photos")["items"], model.config.image_token_id
    made = assistant.rows(processor.tokenizer, token, run.get("cases"), run.album(), AUTHORED, run.get("told"), rng)
    every = see.naming_rows(processor.tokenizer, token, items, set(run.get("align")["train"]), rng, times=2)
    made += rng.sample(every, min(len(every), 3600))
    made += see.caption_rows(processor.tokenizer, token, items, run.data, AUTHORED, rng)[::2]
    _learn(run, "assistant", model, adapted, made, minutes=22, rate=8e-4, projector=5e-4, tokens=700, epochs=1)


def look(run: Run) -> None:
    """More naming, and answers to rewritten requests; the rewriter keeps the projector that it was trained on."""
    start = run.get("assistant")
    model, adapted, processor = run.adapted(start)
    rng, items, token = random.Random(23), run.get("photos")["items"], model.config.image_token_id
    every = see.naming_rows(processor.tokenizer, token, items, set(run.get("align")["train"]), rng, times=2)
    made = rng.sample(every, 1400)
    mixed = assistant.rows(processor.tokenizer, token, run.get("cases"), run.album(), AUTHORED, run.get("told"), rng)
    made += assistant.helpful(processor.tokenizer, token, run.get("cases"), run.album(), run.get("told_rewritten"))
    made += rng.sample(mixed, 160) + assistant.beginnings(processor.tokenizer, token, run.get("cases"), rng, 160)
    _learn(run, "assistant", model, adapted, made, minutes=11, rate=5e-4, projector=5e-4, tokens=700, epochs=1)


def rewrite(run: Run) -> None:
    """The rewriter's adapter, from the assistant's, on the projector as it stands."""
    model, adapted, processor = run.adapted(run.get("assistant"))
    labels = run.get("examples")["labels"]
    told = (processor.tokenizer, model.config.image_token_id, run.get("cases"), run.album(), labels, random.Random(0))
    made = rewriter.rows(*told)
    _learn(run, "rewriter", model, adapted, made, minutes=30, rate=8e-4, projector=None, tokens=1100, epochs=1.5)
    made = rewriter.verdict_rows(*told) + random.Random(1).sample(made, min(REPEATED, len(made)))
    _learn(run, "rewriter", model, adapted, made, minutes=45, rate=6e-4, projector=None, tokens=1000, epochs=1)


def verdicts(run: Run) -> None:
    """The rewriter's first token for every held-out case; NaN for the others."""
    model, adapted, processor = run.adapted(run.get("rewriter"))
    every, book, labels = run.get("cases"), run.album(), run.get("examples")["labels"]
    out = torch.full((len(every),), float("nan"))
    found = {
        index: rewriter.verdict_row(
            processor.tokenizer, model.config.image_token_id, case, book, labels, random.Random(index)
        )
        for index, case in enumerate(every)
        if case.held
    }
    rows = {index: row for index, row in found.items() if row}
    logits = rewriter.first_token_logits(
        adapted.base_model.model, processor.tokenizer, list(rows.values()), run.table(), model.config.image_token_id
    )
    out[list(rows)] = logits
    run.keep("verdicts", out)


def _learn(
    run: Run,
    stage: str,
    model: Any,
    adapted: Any,
    made: list[learn.Row],
    *,
    rate: float,
    projector: float | None,
    **how: Any,
) -> None:
    from peft import get_peft_model_state_dict

    lora = [parameter for key, parameter in adapted.named_parameters() if "lora_" in key]
    groups: list[tuple[list[torch.nn.Parameter], float]] = [(lora, rate)]
    if projector:
        own = list(model.model.multi_modal_projector.parameters())
        for parameter in own:
            parameter.requires_grad_(True)
        groups.append((own, projector))
    told = learn.train(model, made, run.table(), model.config.image_token_id, groups=groups, **how)
    print(json.dumps({"stage": stage, **told}))
    run.keep(
        stage,
        {
            "lora": get_peft_model_state_dict(adapted),
            "projector": model.model.multi_modal_projector.state_dict(),
            "told": told,
        },
    )


def pack(run: Run) -> None:
    """Everything that ships, into src/vlmguard/packaged."""
    from runs.packaged import pack as packing

    packing.pack(run)


STAGES = [photos, words, cases, align, examples, gate, name, told, assist, rewrite, verdicts, look, pack]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m runs.packaged", description=__doc__)
    parser.add_argument("stage", choices=[stage.__name__ for stage in STAGES])
    parser.add_argument("--data", type=Path, required=True, help="the folder data/train")
    parser.add_argument("--build", type=Path, default=Path("build/packaged"))
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    begun = time.perf_counter()
    next(stage for stage in STAGES if stage.__name__ == options.stage)(Run(options.data, options.build))
    print(f"{options.stage}: {(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
