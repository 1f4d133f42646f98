"""Gradients of a local model's pictures, for attacks that see the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlmguard.chat import Chat
from vlmguard.errors import CapabilityError, ConfigError
from vlmguard.vlms.generation import Engine
from vlmguard.vlms.prompts import Prompt, collate
from vlmguard.vlms.steering import Patch, patched

if TYPE_CHECKING:
    from torch import Tensor


def pixel_gradient(
    engine: Engine, chat: Chat, target: str, images: Sequence[Tensor] | None, patches: Sequence[Patch]
) -> tuple[float, Any]:
    """See `Local.pixel_gradient`."""
    import torch

    prompt = engine.prompt(chat)
    if "pixel_values" not in prompt.tensors:
        raise ConfigError("a pixel gradient needs a picture in the chat", "Add one.")
    answer = engine.tokenizer(target, add_special_tokens=False, return_tensors="pt")["input_ids"]
    if not answer.shape[1]:
        raise ConfigError("the target text is empty", "Give the text that the model is to say.")
    given = [prompt.tensors["pixel_values"]] if images is None else list(images)
    leaves = [leaf.detach().to("cpu", torch.float32).requires_grad_() for leaf in given]
    pixels = leaves[0] if images is None else processed(engine, leaves, prompt)
    inputs = collate([_continued(prompt, answer)], engine.pad, engine.model.device, engine.model.dtype)
    inputs["pixel_values"] = pixels.to(engine.model.device, engine.model.dtype)
    image = torch.ones(1, dtype=torch.bool)
    with torch.enable_grad(), patched(engine.model, patches, inputs["attention_mask"], image):
        logits = engine.model(**inputs).logits[0, prompt.tokens - 1 : -1].float()
        loss = torch.nn.functional.cross_entropy(logits, answer[0].to(logits.device))
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [gradient for gradient in gradients if gradient is not None]
    if len(found) != len(leaves):
        raise CapabilityError(f"{engine.name}: no gradient reaches the pictures", "Leave images out.")
    return loss.item(), found[0] if images is None else found


def processed(engine: Engine, images: Sequence[Tensor], prompt: Prompt) -> Tensor:
    """The images through the model's own processor, with their gradient."""
    pixels = engine.processor.image_processor(images=list(images), do_rescale=False, return_tensors="pt")[
        "pixel_values"
    ]
    expected = prompt.tensors["pixel_values"].shape
    if pixels.shape != expected:
        raise ConfigError.wrong(
            "images", expected=f"the chat's pictures (processed {tuple(expected)})", got=tuple(pixels.shape)
        )
    return pixels  # type: ignore[no-any-return]


def _continued(prompt: Prompt, answer: Tensor) -> Prompt:
    """The prompt with the answer's tokens after it."""
    import torch

    tensors = dict(prompt.tensors)
    for name in tensors:
        if prompt.sequence(name):
            more = answer if name == "input_ids" else torch.full_like(answer, name == "attention_mask")
            tensors[name] = torch.cat([tensors[name], more.to(tensors[name].dtype)], dim=1)
    return Prompt(tensors, prompt.image)
