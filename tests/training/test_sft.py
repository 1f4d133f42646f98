"""A whole run on tiny random models: trained, saved, loaded again, proved, calibrated, told of."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from tests import tiny
from tests.training.datasets import dataset
from vlmguard import load
from vlmguard.errors import AdapterError, ConfigError, MissingExtra, ModelError, VLMGuardError
from vlmguard.rewriter.rewriter import Prompted
from vlmguard.training.models import Base, language_layers, load_base, servable
from vlmguard.training.presets import PRESETS
from vlmguard.training.sft import SFT, merge, prepared, preview, room, train_sft
from vlmguard.vlms.adapters import FINGERPRINT_FILE
from vlmguard.vlms.generation import Engine

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning",  # TRL and transformers, of each other
    "ignore::DeprecationWarning",
    "ignore::UserWarning",
)
QUICK = ("fast_vlm", "qwen2_vl")


@pytest.fixture(autouse=True)
def _short_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model never ends by itself."""
    monkeypatch.setattr("vlmguard.rewriter.rewriter.MAX_OUTPUT_TOKENS", 30)


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., SFT]:
    def made(family: str = "llava", **given: Any) -> SFT:
        base = tiny.save(family, tmp_path / "bases")
        (tmp_path / "data").mkdir(exist_ok=True)
        told = {
            "steps": 2,
            "batch_size": 3,
            "rank": 2,
            "alpha": 4,
            "held_out": 0.3,
            "half": False,
            "learning_rate": 1e-2,
        }
        return SFT(dataset(tmp_path / "data", 16), str(base), tmp_path / "out", **{**told, **given})

    return made


@pytest.mark.parametrize(
    "family", [*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in tiny.FAMILIES if one not in QUICK)]
)
def test_a_run_ends_with_a_rewriter_that_the_guard_loads(options: Callable[..., SFT], family: str) -> None:
    given = options(family)
    said: list[str] = []
    done = train_sft(given, said.append)
    assert done is not None
    assert done.steps == 2
    assert done.parsed[1] > 0
    assert done.servable is None
    assert any("loss" in line for line in said)
    rewriter = load.rewriter(str(given.out))
    assert isinstance(rewriter, Prompted)
    assert rewriter.threshold == done.calibration.threshold
    assert not rewriter.instructed
    named = load.rewriter(f"hf:{given.base}+{given.out}")
    assert isinstance(named, Prompted)
    assert named.threshold == rewriter.threshold
    card = (given.out / "README.md").read_text()
    assert "held out" in card
    assert "--enable-lora" in card


def test_merged_weights_load_alone_and_are_the_same_model(options: Callable[..., SFT], tmp_path: Path) -> None:
    given = options()
    train_sft(given)
    merged = merge(given.out, tmp_path / "merged")
    from vlmguard.vlms.local import Local

    apart = Local.load(given.base, given.out)._engine.probe()
    alone = Local.load(merged)._engine.probe()
    torch.testing.assert_close(apart, alone, rtol=1e-3, atol=1e-3)
    assert isinstance(load.rewriter(str(merged)), Prompted)


def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(options: Callable[..., SFT], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    whole = options(steps=4)
    train_sft(whole)
    torn = replace(whole, out=tmp_path / "torn")

    def interrupt(line: str) -> None:
        if line.startswith("step 3"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_sft(torn, interrupt)
    with pytest.raises(ConfigError, match="--resume"):
        train_sft(torn)
    steps: list[str] = []
    train_sft(replace(torn, resume=True), steps.append)
    assert not any(line.startswith("step 1 ") for line in steps)
    first, second = (load_file(one.out / "adapter_model.safetensors") for one in (whole, torn))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match="other rank"):
        train_sft(replace(torn, resume=True, rank=3))


def test_an_adapter_that_changes_nothing_is_an_error(options: Callable[..., SFT]) -> None:
    """Training at a rate of 0 saves an adapter of zeros (F105, F106, F109)."""
    with pytest.raises(AdapterError, match="changes nothing"):
        train_sft(options(learning_rate=0.0))


def test_an_adapter_on_the_language_model_alone_can_be_served(options: Callable[..., SFT]) -> None:
    """F107: servers pass adapters of the vision tower over. F106: and those with names of their own."""
    given = options("qwen2_vl")
    base = load_base(given.base, "float32")
    train_sft(given)
    told = json.loads((given.out / "adapter_config.json").read_text())
    assert told["target_modules"] == language_layers(base.model)
    assert "visual" not in told["target_modules"]
    told["modules_to_save"] = ["lm_head"]
    (given.out / "adapter_config.json").write_text(json.dumps(told))
    assert "merge it first" in (servable(given.out) or "")


def test_full_training_saves_the_whole_model(options: Callable[..., SFT]) -> None:
    given = options(method="full")
    done = train_sft(given)
    assert done is not None
    assert (given.out / "model.safetensors").exists()
    assert isinstance(load.rewriter(str(given.out)), Prompted)
    before, after = (
        Engine(load_base(one, "float32").model, tiny.build("llava")[1], "x") for one in (given.base, str(given.out))
    )
    assert not torch.equal(before.probe(), after.probe())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_one_error_and_the_last_checkpoint_serves(
    options: Callable[..., SFT], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from peft import PeftModel

    given, saved, left = options(), PeftModel.save_pretrained, [1]

    def full(model: Any, folder: str, **how: Any) -> None:
        if not left:
            Path(folder).mkdir(exist_ok=True)
            (Path(folder) / "adapter_model.safetensors").write_bytes(b"torn")
            raise error
        left.pop()
        saved(model, folder, **how)

    monkeypatch.setattr(PeftModel, "save_pretrained", full)
    with pytest.raises(VLMGuardError, match=r"takes no more.*--resume"):
        train_sft(given)
    assert (given.out / "checkpoint-2").exists()
    left.extend([1] * 9)
    said: list[str] = []
    done = train_sft(replace(given, resume=True), said.append)
    assert done is not None
    assert [line[:6] for line in said if line.startswith("step")] == ["step 2"]


def test_other_failures_are_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of memory"), room(tmp_path):
        raise RuntimeError("CUDA out of memory")
    with pytest.raises(PermissionError), room(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_qlora_needs_bitsandbytes(options: Callable[..., SFT], monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(MissingExtra, match="bitsandbytes is not installed"):
        prepared(options(method="qlora"))


def test_an_adapter_of_a_quantised_base_is_for_the_base_as_it_is(
    options: Callable[..., SFT], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In 4 bits the weights are others, and with them the base's fingerprint."""

    def loaded(spec: str, dtype: str, *, quantized: bool) -> Base:
        assert quantized
        return replace(load_base(spec, "float32"), fingerprint="")

    monkeypatch.setattr("vlmguard.training.sft.load_base", loaded)
    given = options(method="qlora")
    train_sft(given)
    note = json.loads((given.out / FINGERPRINT_FILE).read_text())
    assert note["base"] == load_base(given.base, "float32").fingerprint


def test_targets_that_name_no_layer_are_said(options: Callable[..., SFT]) -> None:
    with pytest.raises(ConfigError, match="names no layer"):
        train_sft(options(targets=r".*\.fc_in"))


@pytest.mark.slow
def test_several_processes_train_one_rewriter(options: Callable[..., SFT]) -> None:
    """As `accelerate launch` and torchrun start them."""
    given = options(steps=3)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "vlmguard", "train", "sft"]
    told = ["--base", given.base, "--out", given.out, "--steps", 3, "--batch-size", 3, "--rank", 2, "--full-precision"]
    line = [*command, *map(str, (given.data, *told, "--held-out", 0.3, "--learning-rate", 0.01))]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert (given.out / "checkpoint-3" / "rng_state_1.pth").exists()
    assert done.stderr.count("step 3 of 3") == 1
    assert isinstance(load.rewriter(str(given.out)), Prompted)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"max_tokens": 5}, "no row is left to learn from"),
        ({"rank": 0}, "rank: expected at least 1"),
        ({"held_out": 1.0}, "held out: expected"),
    ],
)
def test_what_cannot_be_trained_is_said(options: Callable[..., SFT], given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        prepared(options(**given))


def test_a_base_that_is_none_is_said(options: Callable[..., SFT], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="image-text model"):
        prepared(replace(options(), base=str(tmp_path)))
    with pytest.raises(ConfigError, match="no base to train on"):
        prepared(replace(options(), base="packaged:assistant"))


def test_options_come_over_the_presets(tmp_path: Path) -> None:
    made = SFT.of("qwen2-vl-7b", {"data": tmp_path, "out": tmp_path, "rank": 8, "epochs": None})
    assert (made.base, made.rank, made.epochs) == ("Qwen/Qwen2-VL-7B-Instruct", 8, 3.0)
    with pytest.raises(ConfigError, match="did you mean packaged"):
        SFT.of("package", {"data": tmp_path, "out": tmp_path})
    with pytest.raises(ConfigError, match="no base"):
        SFT.of(None, {"data": tmp_path, "out": tmp_path})


def test_every_setting_of_a_preset_is_an_option_and_has_a_source() -> None:
    for preset in PRESETS.values():
        for name, (_, source) in preset.items():
            assert name in SFT.__dataclass_fields__
            assert len(source) > 3


def test_a_preview_shows_a_risky_and_a_harmless_row(options: Callable[..., SFT]) -> None:
    text = preview(options())
    assert text.count("«") == 2
    assert "«safe" in text
    assert "«risky" in text
