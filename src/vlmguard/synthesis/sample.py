"""What the pipeline is fed: a request about pictures, a safe and an unsafe answer to it, and where it comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from vlmguard.chat import Chat, Usage
from vlmguard.errors import ImageUnreadable


@dataclass(frozen=True)
class Picture:
    """An encoded picture: a file, or bytes that a dataset holds.

    Args:
        reference: how the source calls it; for a file, its path below the source's folder.
        file: where it lies; None where `data` holds it.
    """

    reference: str
    file: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    def read(self) -> bytes:
        """Raises ImageUnreadable where the file is missing."""
        if self.data is not None:
            return self.data
        assert self.file is not None
        try:
            return self.file.read_bytes()
        except OSError as error:
            remedy = "Give the folder that the samples' pictures lie in."
            raise ImageUnreadable(f"{self.file} cannot be read: {error.strerror}", remedy) from None

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.read()).hexdigest()


@dataclass(frozen=True)
class Answer:
    """An answer to the sample's request; `model` names who gave it where the source did not."""

    text: str
    model: str | None = None


@dataclass(frozen=True)
class Origin:
    """Where a sample comes from; it travels with every row.

    Args:
        name: of the source: "spa-vl", "vlguard", ...
        licence: as the source names it; "unknown" where it names none.
        revision: of the source that was read: a commit, or a date.
        row: the sample's own id there.
    """

    name: str
    licence: str
    revision: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class Sample:
    """One sample.

    Args:
        id: unique in its source.
        prompt: the user's text; "" where the picture asks alone.
        safe, unsafe: answers; None where the source has none.
        history: earlier turns, as messages of a chat.
        benign: a harmless request: it becomes a helpfulness row, kept as it is.
    """

    id: str
    pictures: tuple[Picture, ...]
    prompt: str
    origin: Origin
    safe: Answer | None = None
    unsafe: Answer | None = None
    history: tuple[Mapping[str, Any], ...] = ()
    benign: bool = False

    def chat(self, prompt: str | None = None) -> Chat:
        """The request as a model gets it, or with another prompt. Raises ImageUnreadable."""
        pictures = [picture.read() for picture in self.pictures]
        return Chat.of(self.prompt if prompt is None else prompt, pictures, turns=self.history)


@dataclass(frozen=True)
class Malformed:
    """A row of a source that is no sample; `reason` says why, without what it holds."""

    id: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One row of a dataset for rewriters: what it reads, and what it is to write.

    Args:
        images: {"path", "sha256"} each; a path is seen from the dataset's image folder.
        output: the rewriter's one format (`rewriter.protocol.render_output`): `safe`, or the six lines.
        kind: "safety", or "helpfulness" for a harmless request that is kept as it is.
        made: how it came to be: features, report, answers, checks.
    """

    id: str
    images: tuple[Mapping[str, str], ...]
    prompt: str
    output: str
    kind: str
    origin: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)

    @property
    def risky(self) -> bool:
        return self.output != "safe"

    def fields(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "id": self.id,
            "images": [dict(one) for one in self.images],
            "history": [dict(turn) for turn in self.history],
            "prompt": self.prompt,
            "output": self.output,
            "kind": self.kind,
            "origin": dict(self.origin),
            "made": dict(self.made),
        }

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        return cls(
            told["id"],
            tuple(told.get("images", ())),
            told["prompt"],
            told["output"],
            told.get("kind", "safety"),
            told.get("origin", {}),
            tuple(told.get("history", ())),
            told.get("made", {}),
        )


@dataclass(frozen=True)
class Outcome:
    """What became of one sample.

    Args:
        ended: where: "kept", or the place that dropped it: "source", "answers", "hindsight", "causal", "optimize", the name
            of a check, "duplicate", "overlap", "share".
        reason: of a drop; None for a row that is kept.
        costs: what was spent, by stage.
    """

    id: str
    ended: str
    reason: str | None = None
    row: Row | None = None
    costs: Mapping[str, Usage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ended == "kept":
            fault = "is kept without a row" if self.row is None else None
        elif self.row is not None:
            fault = f"is dropped at {self.ended} and has a row"
        else:
            fault = None if (self.reason or "").strip() else f"is dropped at {self.ended} without a reason"
        if fault:
            raise ValueError(f"the sample {self.id!r} {fault}")  # a fault of ours, at its source (F111)

    def fields(self) -> dict[str, Any]:
        """As a JSON object."""
        told: dict[str, Any] = {"id": self.id, "ended": self.ended}
        if self.reason is not None:
            told["reason"] = self.reason
        if self.row is not None:
            told["row"] = self.row.fields()
        return told | {"costs": {stage: asdict(usage) for stage, usage in self.costs.items()}}

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        row = Row.of(told["row"]) if "row" in told else None
        costs = {stage: Usage(**usage) for stage, usage in told["costs"].items()}
        return cls(told["id"], told["ended"], told.get("reason"), row, costs)
