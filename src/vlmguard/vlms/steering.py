"""Change what a local model computes, for one call: patch hidden states, decode against another conversation.

Both are arguments of the call. The hooks exist only while the model's one worker runs that call's batch, so
two guards on one model never see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmguard.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from torch import Tensor

    from vlmguard.chat import Chat

# Where decoder layers have lived, newest first; `get_decoder()` is asked before any of them.
LAYER_PATHS = (
    "model.language_model.layers",
    "model.text_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "model.language_model.model.layers",
    "text_model.layers",
    "model.decoder.layers",
    "model.layers",
    "language_model.transformer.h",
    "transformer.h",
)


@dataclass(frozen=True)
class Rows:
    """What the rows of a hidden state are. Left padding: position -1 is every row's last token.

    Args:
        mask: (B, T) bool, False at padding; T is the hidden state's own length (1 after the prefill).
        image: (B,) bool, which rows hold a picture.
        step: 0 for the prefill, then 1, 2, ... for each generated token.
    """

    mask: Tensor
    image: Tensor
    step: int

    @property
    def prefill(self) -> bool:
        return self.step == 0


@dataclass(frozen=True)
class Patch:
    """Replace the output of decoder layer `layer` (0 is the first; -1 the last) by `function(hidden, rows)`.

    `hidden` is (B, T, d) in the model's dtype; the answer has the same shape. Calls with equal patches share
    a batch, so keep one Patch object for a guard and let the function depend on its arguments only.
    """

    layer: int
    function: Callable[[Tensor, Rows], Tensor]


@dataclass(frozen=True)
class Contrast:
    """Decode against a second conversation: a step's logits become `function(logits, other)`, (B, V) float32.

    The other conversation keeps its pictures and gets the same tokens. Both run in one batch, patches too.
    """

    chat: Chat
    function: Callable[[Tensor, Tensor], Tensor]


def decoder_layers(model: Any) -> Sequence[Any]:
    """The language model's layers, in order. Raises ModelError when they can't be found."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    expected = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    found = [getattr(decoder, "layers", None)] + [_follow(model, path) for path in LAYER_PATHS]
    for layers in found:
        if layers is not None and len(layers) == expected:
            return layers  # type: ignore[no-any-return]
    raise ModelError(
        f"no {expected} decoder layers were found in {type(model).__name__}",
        "Add where they are to LAYER_PATHS in vlmguard/vlms/steering.py",
    )


def _follow(model: Any, path: str) -> Any:
    for name in path.split("."):
        model = getattr(model, name, None)
    return model


@contextmanager
def patched(model: Any, patches: Sequence[Patch], mask: Tensor, image: Tensor) -> Iterator[None]:
    """Hooks for one batch: `mask` is the (B, T) attention mask, `image` (B,) the rows with a picture."""
    with ExitStack() as hooks:
        layers = decoder_layers(model) if patches else ()
        for patch in patches:
            if not -len(layers) <= patch.layer < len(layers):
                raise ConfigError.wrong("Patch.layer", expected=f"0 to {len(layers) - 1}", got=patch.layer)
            handle = layers[patch.layer].register_forward_hook(_hook(patch, mask.bool(), image))
            hooks.callback(handle.remove)
        yield


def _hook(patch: Patch, mask: Tensor, image: Tensor) -> Callable[[Any, Any, Any], Any]:
    step = -1

    def hook(module: Any, arguments: Any, output: Any) -> Any:
        nonlocal step
        step += 1
        # A tuple before transformers 4.5x, a tensor since.
        hidden = output[0] if isinstance(output, tuple) else output
        here = mask if step == 0 else mask.new_ones(hidden.shape[:2])
        changed = patch.function(hidden, Rows(here.to(hidden.device), image.to(hidden.device), step))
        if changed.shape != hidden.shape:
            raise ConfigError.wrong(
                f"a patch of layer {patch.layer} returned",
                expected=f"shape {tuple(hidden.shape)}",
                got=tuple(changed.shape),
            )
        changed = changed.to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
