"""What becomes known of a request while it is answered: for its record, the metrics and the headers of the answer."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmguard.chat import Chat, Image, Step
from vlmguard.errors import ImageError
from vlmguard.gateway.audit_record import Action, ImageFacts, Record, Texts
from vlmguard.gateway.wire import Conversation
from vlmguard.images import open_url


@dataclass(eq=False)
class Facts:
    """
    Args:
        note: the class of a failure, never anything that a user wrote.
        held: a stream was held back until the guard had seen the whole answer.
        at: when the request came, in seconds since 1970; `begun` is of `time.perf_counter`.
        upstream_first_byte_seconds: from asking the target; `first_byte_seconds` since the request came.
        prompt_tokens, completion_tokens: of a whole answer that says so; a stream's are not looked for.
    """

    request_id: str
    route: str
    key_id: str = ""
    model: str = ""
    stream: bool = False
    mode: str = ""
    action: Action = "error"
    status: int = 0
    note: str | None = None
    held: bool = False
    step: Step | None = None
    original: str = ""
    at: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    guard_seconds: float | None = None
    upstream_first_byte_seconds: float | None = None
    first_byte_seconds: float | None = None
    pictures: int = 0
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    _hashing: asyncio.Future[tuple[ImageFacts, ...]] | None = None

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self.begun

    def asked(self, read: Conversation) -> None:
        self.model, self.stream = read.model, read.stream

    def look(self, chat: Chat, *, hashes: bool) -> None:
        """Counts the pictures; with `hashes` it begins to hash them, beside the guard's own work."""
        images = chat.images
        self.original, self.pictures = chat.text, len(images)
        if images and hashes:
            self._hashing = asyncio.ensure_future(asyncio.to_thread(_hashed, images))

    def screened(self, step: Step, seconds: float) -> None:
        self.step, self.action, self.guard_seconds, self.note = step, step.action, seconds, step.note

    def said(self, answer: Any) -> None:
        """What a whole answer says that it cost, in OpenAI's words or Anthropic's."""
        usage = answer.get("usage") if isinstance(answer, Mapping) else None
        if isinstance(usage, Mapping):
            self.prompt_tokens = usage.get("prompt_tokens", usage.get("input_tokens"))
            self.completion_tokens = usage.get("completion_tokens", usage.get("output_tokens"))

    def began(self) -> None:
        """The answer has begun."""
        self.first_byte_seconds = self.seconds

    def failed(self, kind: str, status: int) -> None:
        self.action, self.note, self.status = "error", kind, status

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the caller is told of the guard."""
        told = {"action": self.action, "policy": self.mode, "latency-ms": _milliseconds(self.guard_seconds)}
        if self.step is not None and self.step.risk is not None:
            told["risk"] = f"{self.step.risk:.3f}"
        if self.held:
            told["stream"] = "held"
        return [(f"x-vlmguard-{name}".encode(), str(value).encode()) for name, value in told.items() if value]

    async def record(self, versions: Mapping[str, str], *, texts: bool) -> Record:
        step = self.step
        return Record(
            self.at,
            self.request_id,
            self.key_id,
            self.route,
            self.model,
            self.stream,
            self.status,
            self.action,
            self.mode,
            await self._hashing if self._hashing is not None else (),
            step.risk if step else None,
            step.threshold if step else None,
            step.category if step else None,
            self.note,
            _milliseconds(self.guard_seconds),
            _milliseconds(self.first_byte_seconds),
            _milliseconds(self.seconds),
            self.prompt_tokens,
            self.completion_tokens,
            versions=versions,
            texts=Texts(self.original, step.sent) if texts and step else None,
        )


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def _hashed(images: Sequence[Image]) -> tuple[ImageFacts, ...]:
    found = []
    for image in images:
        try:
            data = open_url(image.url)
        except ImageError:  # refused elsewhere; the record has what could be read
            continue
        found.append(ImageFacts(hashlib.sha256(data).hexdigest(), len(data)))
    return tuple(found)
