"""The loop of supervised training: what it leaves out changes nothing, and a torn checkpoint is passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTTrainer

from tests import tiny
from tests.training.datasets import dataset
from vlmguard.training.loop import Loop, last_checkpoint
from vlmguard.training.prompts import IGNORED, Collator
from vlmguard.training.sft import SFT, Prepared, loop, prepared

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # TRL and transformers, of each other
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)
QUICK = ("fast_vlm", "qwen2_vl")
Made = Callable[[str], tuple[Loop, Prepared]]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def build(family: str) -> tuple[Loop, Prepared]:
        base = tiny.save(family, tmp_path / "bases")
        options = SFT(dataset(tmp_path), str(base), tmp_path / "out", steps=2, rank=2, held_out=0.0, half=False)
        ready = prepared(options)
        found: Loop = loop(options, ready, lambda line: None)
        return found, ready

    return build


def batch_of(ready: Prepared, count: int = 6) -> dict[str, Any]:
    """Rows with none, one and two pictures."""
    collator = Collator(ready.encoder, ready.rows, ready.learn, 0)
    return collator([{"number": number} for number in range(count)])


def gradients(trainer: Loop) -> dict[str, torch.Tensor]:
    found = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    trainer.model.zero_grad()
    return found


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in tiny.FAMILIES if one not in QUICK)]
)
@pytest.mark.parametrize("tokens_of_the_step", [None, torch.tensor(1000)])
def test_loss_and_gradients_are_those_of_trl(made: Made, family: str, tokens_of_the_step: Any) -> None:
    trainer, ready = made(family)
    trainer.model.train()
    ours = trainer.compute_loss(trainer.model, batch_of(ready), num_items_in_batch=tokens_of_the_step)
    ours.backward()
    mine = gradients(trainer)
    theirs = SFTTrainer.compute_loss(trainer, trainer.model, batch_of(ready), False, tokens_of_the_step)
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    both = gradients(trainer)
    assert mine.keys() == both.keys()
    assert any(bool(value.abs().max() > 0) for value in mine.values())
    for name, value in mine.items():
        torch.testing.assert_close(value, both[name], rtol=1e-3, atol=1e-5)
    accuracies = trainer._metrics["train"]["mean_token_accuracy"]
    assert accuracies[0] == pytest.approx(accuracies[1])


def test_logits_of_learned_tokens_alone_are_computed(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, ready = made("llava")
    head, sizes = trainer.model.get_output_embeddings(), []
    head.register_forward_hook(lambda _, given, logits: sizes.append(tuple(logits.shape[:-1])))
    given = batch_of(ready)
    learned = int((given["labels"] != IGNORED).sum())
    trainer.compute_loss(trainer.model, given)
    del given["labels"]
    trainer.model(**given)
    assert sizes == [(learned,), tuple(given["input_ids"].shape)]
    assert trainer.tokens == int(given["attention_mask"].sum())


def test_a_batch_without_anything_to_learn_has_no_loss(made: Made) -> None:
    trainer, ready = made("llava")
    given = batch_of(ready)
    given["labels"] = torch.full_like(given["labels"], IGNORED)
    loss = trainer.compute_loss(trainer.model, given)
    loss.backward()
    assert loss.item() == 0.0


def test_batch_norm_keeps_its_statistics(made: Made) -> None:
    """Else the tower shows other features in training than in service, and changes where no adapter keeps it."""
    trainer, ready = made("fast_vlm")
    tower = trainer.model.base_model.model.model.vision_tower
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    pixels = batch_of(ready)["pixel_values"]
    trainer.model.eval()
    served = tower(pixels).last_hidden_state
    trainer.train()
    trainer.model.train()
    assert torch.equal(tower(pixels).last_hidden_state, served)
    assert before.keys() == tower.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_nothing_is_told_to_anybody(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **what: told.append(what))
    trainer, _ = made("llava")
    trainer.create_model_card("name")
    assert told == []
    assert not list(Path(trainer.args.output_dir).glob("README.md"))


def checkpoint(folder: Path, state: str | None = "{}", weights: str = "adapter_model.safetensors") -> Path:
    folder.mkdir()
    (folder / weights).touch()
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    checkpoint(tmp_path / "checkpoint-9")
    whole = checkpoint(tmp_path / "checkpoint-10", weights="model.safetensors")
    torn = [
        checkpoint(tmp_path / "checkpoint-20", state=None),
        checkpoint(tmp_path / "checkpoint-30", state='{"global_'),
        checkpoint(tmp_path / "checkpoint-40", weights="optimizer.pt"),
    ]
    other = checkpoint(tmp_path / "checkpoint-best")
    assert last_checkpoint(tmp_path) == whole
    assert all(one.exists() for one in torn)
    assert last_checkpoint(tmp_path, clear=True) == whole
    assert not any(one.exists() for one in torn)
    assert other.exists()
