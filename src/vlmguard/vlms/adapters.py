"""Put a PEFT adapter on a model, and prove that it is on.

PEFT only warns of weights that found no place, and servers have served the base model for months that way
(F105-F109). Here every tensor of the file must be in the model, the model must lack none, and a fixed
question must get other logits.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmguard.errors import AdapterError, missing_extra

if TYPE_CHECKING:
    from torch import Tensor

FINGERPRINT_FILE = "vlmguard_base.json"  # beside adapter_config.json: the base model it was trained on
SAMPLED_VALUES = 16  # of every tensor


def put_adapter(model: Any, adapter: str, probe: Callable[[Any], Tensor], revision: str | None = None) -> Any:
    """The PEFT model of `model` with `adapter` (a folder or hub name) on it.

    Args:
        probe: the logits of a fixed question; called with the adapter and without.

    Raises:
        AdapterError: trained on another base, tensors missing or left over, or no effect on the probe's
            logits.
    """
    import torch

    try:
        from peft import PeftModel
    except ImportError as error:
        raise missing_extra("peft", "local") from error
    _check_base(model, Path(adapter))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is an error below
            adapted = PeftModel.from_pretrained(model, adapter, revision=revision)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise AdapterError(f"the adapter {adapter} does not go on {type(model).__name__}: {what}", _REMEDY) from error
    _check_tensors(adapted, model, adapter, revision)
    with torch.no_grad():
        on = probe(adapted)
        with adapted.disable_adapter():
            off = probe(adapted)
    if torch.equal(on, off):
        raise AdapterError(f"the adapter {adapter} changes nothing: the probe's logits are those of the base", _REMEDY)
    return adapted


_REMEDY = "Use the base model and the transformers version that the adapter was trained with, or train it again."


def _check_tensors(adapted: Any, model: Any, adapter: str, revision: str | None) -> None:
    from peft import get_peft_model_state_dict, load_peft_weights

    renamed = getattr(model, "_checkpoint_conversion_mapping", None)
    file = load_peft_weights(adapter, device="cpu", key_mapping=renamed, **({"revision": revision} if revision else {}))
    own = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    everything = adapted.state_dict()
    missing = [name for name in own if name not in file]
    left_over = [name for name in file if name not in own and name not in everything]
    unequal = [
        name
        for name, value in file.items()
        if (there := own.get(name, everything.get(name))) is not None and not _same(value, there)
    ]
    for names, what in (
        (missing, "lacks"),
        (left_over, "has no place for"),
        (unequal, "was not loaded into"),
    ):
        if names:
            whose = "the adapter" if names is missing else "the model"
            raise AdapterError(f"{adapter}: {whose} {what} {len(names)} tensors, such as {names[0]}", _REMEDY)


def _same(file: Tensor, there: Tensor) -> bool:
    import torch

    return file.shape == there.shape and torch.equal(file.to(there.dtype), there.cpu())


def fingerprint(model: Any) -> str:
    """A SHA-256 of the names, shapes and some values of a model's weights, those of adapters left out.

    Values are taken in bfloat16, so a model stored in bfloat16 or float32 has one fingerprint in both.
    """
    import torch

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(base)):
        flat = weight.detach().reshape(-1)
        picked = flat[
            torch.linspace(0, len(flat) - 1, min(SAMPLED_VALUES, len(flat)), dtype=torch.float64).long().to(flat.device)
        ]
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _base_weights(base: Any) -> Iterable[tuple[str, Tensor]]:
    """Parameters by the name they have without PEFT's wrappers."""
    for name, weight in base.named_parameters():
        if any(mark in name for mark in ("lora_", ".modules_to_save.", "trainable_tokens_")):
            continue
        yield name.replace(".base_layer.", ".").replace(".original_module.", "."), weight


def write_fingerprint(model: Any, folder: Path) -> None:
    """Note in an adapter's folder which base it was trained on, so that loading it on another one fails."""
    (folder / FINGERPRINT_FILE).write_text(json.dumps({"base": fingerprint(model)}))


def _check_base(model: Any, folder: Path) -> None:
    note = folder / FINGERPRINT_FILE
    if not note.is_file():
        return
    expected = json.loads(note.read_text())["base"]
    if (found := fingerprint(model)) != expected:
        raise AdapterError(
            f"the adapter {folder} was trained on the base {expected[:12]}, this one is {found[:12]}", _REMEDY
        )
