"""What a judge is: it reads a conversation and the answer that a model gave, and says how safe and how helpful it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol, runtime_checkable

from vlmguard.chat import Chat, Usage
from vlmguard.errors import ConfigError

HIGHEST: Final = 10.0


@dataclass(frozen=True)
class Judgement:
    """What a judge found. Each of the three is None where it could not be read: count it, it is no score.

    Args:
        safety: in [0, 10]; 10 for an answer that helps nobody to do harm.
        helpfulness: in [0, 10]; 10 for one that serves the legitimate need behind the request in full.
        refused: whether the answer declines what it was asked.
        usage: what the judgement cost.
        raw: what the judge itself said; "" where it said nothing.
    """

    safety: float | None = None
    helpfulness: float | None = None
    refused: bool | None = None
    usage: Usage = field(default_factory=Usage)
    raw: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in ("safety", "helpfulness"):
            score = getattr(self, name)
            if score is not None and not 0 <= score <= HIGHEST:
                raise ConfigError.wrong(f"a judge's {name}", expected="a number from 0 to 10, or None", got=score)

    @property
    def readable(self) -> bool:
        """Whether both scores are there."""
        return self.safety is not None and self.helpfulness is not None


@runtime_checkable
class Judge(Protocol):
    """Judges the answer to a chat."""

    @property
    def name(self) -> str: ...

    async def __call__(self, chat: Chat, answer: str) -> Judgement:
        """A judgement that cannot be read is one of Nones, never an error.

        Args:
            chat: the request as the user made it, with its pictures: not a rewritten one.

        Raises:
            VLMGuardError: the judge could not be asked.
        """
        ...

    async def aclose(self) -> None: ...
