"""What a vision-language model is to the rest of VLMGuard. A guarded one is one too."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from enum import StrEnum
from typing import Protocol, runtime_checkable

from vlmguard.chat import Chat, Response
from vlmguard.errors import CapabilityError


class Capability(StrEnum):
    """What a guard, attack or audit may need of a VLM."""

    TEXT = "text"  # answers a chat
    NO_IMAGE = "no_image"  # also one without a picture
    TEMPERATURE = "temperature"  # samples, at a given temperature
    LOGPROBS = "logprobs"  # of generated tokens and their alternatives
    LOGITS = "logits"  # takes logits processors and contrasts
    HIDDEN = "hidden"  # gives hidden states and takes patches of them
    PIXEL_GRADIENT = "pixel_gradient"  # of an answer's likelihood
    TRAIN = "train"  # its weights can be trained


@runtime_checkable
class VLM(Protocol):
    """A chat in, a response out. `stream` gives text, then exactly one Response with all of it."""

    @property
    def name(self) -> str: ...

    @property
    def can(self) -> frozenset[Capability]: ...

    async def __call__(self, chat: Chat) -> Response: ...

    def stream(self, chat: Chat) -> AsyncIterator[str | Response]: ...

    async def aclose(self) -> None: ...


def need(vlm: VLM, capabilities: Iterable[Capability], guard: str) -> None:
    """Raises CapabilityError when `vlm` lacks what `guard` needs of it; call it before any request."""
    missing = sorted(set(capabilities) - vlm.can)
    if missing:
        raise CapabilityError(
            f"{guard} needs {', '.join(missing)}, which {vlm.name} ({type(vlm).__name__}) cannot give",
            "Use a local model (hf:NAME or a folder), or another guard.",
        )


@asynccontextmanager
async def closing(stream: AsyncIterator[str | Response]) -> AsyncIterator[AsyncIterator[str | Response]]:
    """A stream that is closed at the end of the block, which ends the generation."""
    try:
        yield stream
    finally:
        if (close := getattr(stream, "aclose", None)) is not None:
            await close()
