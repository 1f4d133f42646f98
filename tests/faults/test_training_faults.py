"""Faults that neighbours' users reported, as far as supervised training is concerned; see FAULTS.md."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.training.datasets import dataset
from vlmguard import load
from vlmguard.errors import AdapterError, ConfigError
from vlmguard.training.models import load_base, servable
from vlmguard.training.prompts import IGNORED, Collator, Encoder, fitting
from vlmguard.training.rows import Rows, read
from vlmguard.training.sft import SFT, loop, prepared, train_sft
from vlmguard.vlms.generation import Engine

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # TRL and transformers, of each other
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)
QUICK = ("llava", "idefics3")
EVERY = [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in tiny.FAMILIES if one not in QUICK)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training_faults")
    dataset(folder, 16)
    return folder


@pytest.fixture(scope="module")
def rows(place: Path) -> Rows:
    return read(place)


def options(place: Path, family: str, out: str, **given: Any) -> SFT:
    told = {"steps": 2, "batch_size": 3, "rank": 2, "held_out": 0.3, "half": False, "learning_rate": 1e-2}
    return SFT(place, str(tiny.save(family, place)), place / out, **{**told, **given})


@pytest.fixture(scope="module")
def trained(place: Path) -> SFT:
    given = options(place, "llava", "trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vlmguard.rewriter.rewriter.MAX_OUTPUT_TOKENS", 30)  # a random model never ends by itself
        train_sft(given)
    return given


def engine_of(family: str) -> Engine:
    model, processor = tiny.build(family)
    return Engine(model, processor, family)


def image_tokens(engine: Engine, ids: torch.Tensor) -> list[int]:
    """How many each row of a batch has."""
    mark = engine.model.config.image_token_id
    return [int(count) for count in (ids == mark).sum(1)]


@pytest.mark.parametrize("family", QUICK)
def test_f100_a_limit_on_length_never_cuts_image_tokens(rows: Rows, family: str) -> None:
    """A row was cut at `max_length`, in the middle of a picture, and the features no longer matched their places."""
    engine = engine_of(family)
    encoder = Encoder.of(engine, instructed=False)
    chosen = [row for row in rows.rows if row.images]
    free = Collator(encoder, rows, chosen, 0)([{"number": number} for number in range(4)])
    engine.tokenizer.model_max_length = 16
    engine.tokenizer.backend_tokenizer.enable_truncation(max_length=16)
    again = Collator(encoder, rows, chosen, 0)([{"number": number} for number in range(4)])
    assert torch.equal(free["input_ids"], again["input_ids"])
    assert torch.equal(free["labels"], again["labels"])
    lengths = fitting(encoder, rows, chosen, None).lengths
    limit = max(lengths) - 1
    fit = fitting(encoder, rows, chosen, limit)
    assert max(fit.lengths) <= limit
    assert fit.dropped == {f"it has more than {limit} tokens, its pictures' included": lengths.count(max(lengths))}


def test_f100_the_trainers_own_limit_is_off(place: Path) -> None:
    trainer = loop(given := options(place, "llava", "limit"), prepared(given), lambda line: None)
    assert trainer.args.max_length is None


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_f101_a_pictures_placeholder_is_expanded_once(rows: Rows, family: str) -> None:
    """Placeholders that were expanded before, and then by the processor again, made a model's words incoherent."""
    engine = engine_of(family)
    encoder = Encoder.of(engine, instructed=False)
    picked = [next(row for row in rows.rows if len(row.images) == count) for count in (1, 2)]
    one, two = (encoder.prompt(rows, row) for row in picked)
    inputs = {name: value for name, value in one.tensors.items() if name.startswith(("pixel", "image"))}
    with torch.no_grad():
        features = engine.model.model.get_image_features(**inputs).pooler_output
    places = image_tokens(engine, one.tensors["input_ids"])[0]
    assert places == sum(feature.reshape(-1, feature.shape[-1]).shape[0] for feature in features) > 0
    assert image_tokens(engine, two.tensors["input_ids"]) == [2 * places]


@pytest.mark.parametrize("family", EVERY)
def test_f103_rows_with_none_one_and_two_pictures_are_one_batch(place: Path, family: str) -> None:
    """Batches of rows with several pictures, or of rows with and without, failed: features and places did not match."""
    given = options(place, family, f"mixed-{family}")
    ready = prepared(given)
    trainer = loop(given, ready, lambda line: None)
    chosen = [next(at for at, row in enumerate(ready.learn) if len(row.images) == count) for count in (2, 0, 1)]
    batch = Collator(ready.encoder, ready.rows, ready.learn, 0)([{"number": at} for at in chosen])
    engine = Engine(ready.base.model, ready.base.processor, family)
    two, none, one = image_tokens(engine, batch["input_ids"])
    assert (two, none) == (2 * one, 0)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    assert bool(loss.isfinite())
    assert any(weight.grad is not None and bool(weight.grad.abs().max() > 0) for weight in trainer.model.parameters())


def test_f103_no_picture_token_is_learned(rows: Rows) -> None:
    engine = engine_of("llava")
    made = Collator(Encoder.of(engine, instructed=False), rows, rows.rows, 0)([{"number": at} for at in range(6)])
    assert not bool((made["labels"] == engine.model.config.image_token_id).any())
    assert bool((made["labels"] != IGNORED).any(1).all())


def test_f105_an_adapter_for_modules_that_the_model_has_not_is_no_silent_success(place: Path) -> None:
    """Served, such an adapter gave the base's own answers, byte for byte."""
    with pytest.raises(ConfigError, match="names no layer"):
        train_sft(options(place, "llava", "elsewhere", targets=r".*\.(fc_in|fc_out)"))
    with pytest.raises(AdapterError, match="changes nothing"):
        train_sft(options(place, "llava", "nothing", learning_rate=0.0))
    assert not (place / "nothing" / "rewriter.json").exists()


@pytest.mark.parametrize("family", EVERY)
def test_f106_an_adapter_is_named_as_the_whole_model_names_its_layers(place: Path, family: str) -> None:
    """An adapter whose keys were those of the bare language model did nothing on the model round it."""
    given = options(place, family, f"named-{family}")
    ready = prepared(given)
    trainer = loop(given, ready, lambda line: None)
    trainer.model.save_pretrained(given.out)
    layers = {name for name, _ in load_base(given.base, "float32").model.named_modules()}
    names = load_file(given.out / "adapter_model.safetensors")
    adapted = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in names}
    assert adapted <= layers
    assert servable(given.out) is None


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llava", r".*(vision_tower|language_model).*\.q_proj"),
        ("qwen2_vl", r".*(visual.*\.qkv|language_model.*\.q_proj)"),
    ],
)
def test_f107_an_adapter_of_the_vision_tower_is_not_called_servable(place: Path, family: str, targets: str) -> None:
    """A server passed over the vision tower's part of an adapter, with a warning."""
    given = options(place, family, f"vision-{family}", targets=targets)
    trainer = loop(given, prepared(given), lambda line: None)
    trainer.model.save_pretrained(given.out)
    why = servable(given.out)
    assert why is not None
    assert "more than the language model" in why
    assert "merge it first" in why


def edited(trained: SFT, out: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    """A copy of a trained rewriter with other tensors."""
    shutil.copytree(trained.out, out, ignore=shutil.ignore_patterns("checkpoint-*"))
    file = out / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in edit(load_file(file)).items()}, file)
    return str(out)


def test_f108_a_trained_rewriter_with_names_of_before_a_rename_does_not_load(trained: SFT, tmp_path: Path) -> None:
    """A model's modules were renamed between versions, and adapters on them were lost without an error."""

    def old(tensors: dict[str, Any]) -> dict[str, Any]:
        return {name.replace("model.language_model.", "language_model.model."): it for name, it in tensors.items()}

    with pytest.raises(AdapterError, match="lacks"):
        load.rewriter(edited(trained, tmp_path / "old", old))


def test_f109_a_trained_rewriter_that_lacks_a_tensor_does_not_load(trained: SFT, tmp_path: Path) -> None:
    """Missing keys were a warning."""
    whole = edited(trained, tmp_path / "whole", lambda tensors: tensors)
    load.rewriter(whole)
    torn = edited(trained, tmp_path / "torn", lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(AdapterError, match="lacks 1 tensors"):
        load.rewriter(torn)


def test_f109_a_trained_rewriter_does_not_load_on_another_base(trained: SFT, tmp_path: Path) -> None:
    other, processor = tiny.build("llava")
    with torch.no_grad():
        next(other.parameters()).add_(1)
    other.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="was trained on the base"):
        load.rewriter(f"hf:{tmp_path}+{trained.out}")
    note = json.loads((trained.out / "rewriter.json").read_text())
    assert replace(trained, base=note["base"]) == trained
