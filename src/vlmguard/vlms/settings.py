"""How a request asks a local model to decode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from vlmguard.errors import BadRequest, ContextTooLong

Number = TypeVar("Number", int, float)

DEFAULT_TOKENS = 256
MAX_TOP_LOGPROBS = 20  # OpenAI's own limit
# What would change the answer and is not done here is refused, not dropped: the field and the values that ask
# for nothing.
REFUSED: Mapping[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": (None,),
}


@dataclass(frozen=True)
class Settings:
    """How to decode. Rows with equal settings share a batch.

    Args:
        max_tokens: None means 256, or what is left of the context.
        temperature: 0 is greedy.
        top_p: in (0, 1].
        top_logprobs: None records no logprobs, else how many alternatives a token has, 0 to 20.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """What a request's other fields ask for. Raises BadRequest for a wrong or an impossible one."""
        for name, nothing in REFUSED.items():
            if extra.get(name) not in nothing:
                raise BadRequest(f"a local model does not do {name}", "Leave it out, or use an endpoint.", param=name)
        tokens = "max_completion_tokens" if extra.get("max_completion_tokens") is not None else "max_tokens"
        stop = extra.get("stop") or ()
        stop = [stop] if isinstance(stop, str) else stop
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise BadRequest("stop: expected a text or a list of texts", param="stop")
        top = _number(extra, "top_logprobs", 0, MAX_TOP_LOGPROBS, int)
        return cls(
            max_tokens=_number(extra, tokens, 1, 2**31, int),
            temperature=_number(extra, "temperature", 0, 100, float) or 0.0,
            top_p=_number(extra, "top_p", 1e-6, 1, float) or 1.0,
            stop=tuple(stop),
            top_logprobs=(top or 0) if extra.get("logprobs") else None,
        )

    def fitted(self, prompt_tokens: int, context_tokens: int | None, name: str) -> Self:
        """The settings with `max_tokens` decided. Raises ContextTooLong when that does not fit."""
        room = None if context_tokens is None else context_tokens - prompt_tokens
        if self.max_tokens is not None and room is not None and self.max_tokens > room:
            raise ContextTooLong(
                f"the conversation has {prompt_tokens} tokens and max_tokens is {self.max_tokens}, "
                f"{name} takes {context_tokens}",
                "Shorten the conversation or lower max_tokens.",
            )
        return replace(self, max_tokens=self.max_tokens or min(DEFAULT_TOKENS, room or DEFAULT_TOKENS))


def seed_of(extra: Mapping[str, Any]) -> int | None:
    return _number(extra, "seed", -(2**63), 2**63 - 1, int)


def _number(extra: Mapping[str, Any], name: str, low: float, high: float, kind: type[Number]) -> Number | None:
    value = extra.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | kind) or not low <= value <= high:
        raise BadRequest(f"{name}: expected a number from {low:g} to {high:g}, got {value!r}", param=name)
    return kind(value)
