"""Bases to train on, and the adapter that is trained."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from vlmguard.errors import ConfigError, MissingExtra, ModelError, missing_extra
from vlmguard.vlms.adapters import fingerprint

Method = Literal["lora", "qlora", "full"]
PACKAGED: Final = "packaged:base"
PROJECTOR: Final = "multi_modal_projector"
LANGUAGE: Final = frozenset({"language_model", "text_model"})  # what transformers' image-text models call theirs


@dataclass
class Base:
    """A model as it is before training.

    Args:
        place: folder or hub id that it is loaded from again.
        fingerprint: of that, see `vlms.adapters`; "" in 4 bits, where it would be another.
        saved_modules: parts that the adapter carries whole, since the base lacks them.
    """

    model: Any
    processor: Any
    place: str
    fingerprint: str
    saved_modules: tuple[str, ...] = ()


def load_base(spec: str, dtype: str = "bfloat16", *, quantized: bool = False, fresh: bool = False) -> Base:
    """A transformers image-text model by folder, hub id or hf:ID; packaged:base is the packaged one.

    The packaged base has no projector of its own: the packaged rewriter's is put in, and travels with the adapter.

    Args:
        quantized: in 4 bits, for QLoRA.
        fresh: as it is loaded for an adapter: of the packaged base without the projector.

    Raises:
        ModelError: it cannot be loaded. MissingExtra: torch, or bitsandbytes for QLoRA.
    """
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise missing_extra(error.name or "torch", "train") from error
    place, saved = _place(spec)
    options: dict[str, Any] = {"dtype": getattr(torch, dtype)}
    if quantized:
        options["quantization_config"] = _four_bits(torch.bfloat16)
        options["device_map"] = {"": int(os.environ.get("LOCAL_RANK", "0"))}  # it is made on its GPU, and stays there
    try:
        model = AutoModelForImageTextToText.from_pretrained(place, **options)
        processor = AutoProcessor.from_pretrained(place)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{place} cannot be loaded as an image-text model: {(str(error).strip() or repr(error)).splitlines()[0]}",
            "Check the name, and that it is a model of transformers' image-text-to-text kind.",
        ) from error
    base = Base(model, processor, place, "" if quantized else fingerprint(model), saved)
    if saved and not fresh:
        _put_projector(model)
    _keep_statistics(model)
    return base


def _keep_statistics(model: Any) -> None:
    """Batch norm judges by the statistics that it came with, in training too.

    Else a frozen vision tower (FastVLM's, the packaged one) shows the language model other features in training than in
    service, and the base changes where no adapter keeps it.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    def still(module: Any, _: Any) -> None:
        module.eval()

    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(still)


def _place(spec: str) -> tuple[str, tuple[str, ...]]:
    if spec == PACKAGED:
        from vlmguard.vlms import assemble

        return str(assemble.ensure(lambda line: None)), (PROJECTOR,)
    if spec.startswith("packaged:"):
        raise ConfigError(f"{spec} is no base to train on", f"Write {PACKAGED}, a folder, or hf:ID.")
    return spec.removeprefix("hf:"), ()


def _put_projector(model: Any) -> None:
    from safetensors.torch import load_file

    from vlmguard.vlms.packaged import WEIGHTS

    model.model.multi_modal_projector.load_state_dict(load_file(WEIGHTS / "rewriter" / "projector.safetensors"))


def _four_bits(dtype: Any) -> Any:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes is not installed, which QLoRA needs", "Install it: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # both as in the QLoRA paper (arXiv 2305.14314)
        bnb_4bit_compute_dtype=dtype,
    )


def language_layers(model: Any) -> str:
    """A regular expression for the linear layers of the language model, by name: what servers can serve adapters on."""
    import torch

    decoder = model.get_decoder()
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    ends = {name.rpartition(".")[2] for name, module in decoder.named_modules() if isinstance(module, torch.nn.Linear)}
    return rf"{re.escape(prefix)}\.(.*\.)?({'|'.join(sorted(ends))})"


def lora(base: Base, rank: int, alpha: int, dropout: float, targets: str | None = None) -> Any:
    """PEFT's configuration. Args: targets: a regular expression; by default `language_layers`."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise missing_extra("peft", "train") from error
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=targets or language_layers(base.model),
        modules_to_save=list(base.saved_modules) or None,
        base_model_name_or_path=base.place,
    )


def servable(folder: Path) -> str | None:
    """Why vLLM cannot serve an adapter as it is; None where it can.

    It takes LoRA on linear layers of the language model, and no module as a whole. What is trained elsewhere it has passed
    over with a warning (F107), or left without effect (F106).
    """
    from safetensors import safe_open

    told = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if told.get("modules_to_save"):
        return f"it carries {', '.join(told['modules_to_save'])} whole: merge it first"
    if told.get("rank_pattern") or told.get("use_dora") or told.get("bias", "none") != "none":
        return "it is more than plain LoRA: merge it first"
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        elsewhere = [name for name in file.keys() if not set(name.split(".")) & LANGUAGE]  # noqa: SIM118
    if elsewhere:
        return f"it adapts more than the language model, such as {elsewhere[0]}: merge it first"
    return None
