"""What the audit log keeps of one request: ids, hashes, sizes and verdicts. No text of a user's, unless asked for."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeAlias

import orjson

Action: TypeAlias = Literal["passed", "rewrote", "refused", "flagged", "error", "unguarded", "begun"]

NAME_CHARACTERS: Final = 128
MAX_COUNT: Final = 2**53  # a number of tokens comes from the target, who may say anything
# What a note may be: names of errors and the guard's own words. What follows a colon may quote a user.
NOTE: Final = re.compile(r"[A-Za-z][A-Za-z_;' -]{0,63}")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """A picture, told by the hash of its encoded bytes; sides in pixels."""

    sha256: str
    bytes: int
    width: int | None = None
    height: int | None = None

    def fields(self) -> dict[str, str | int]:
        sides = {"width": self.width, "height": self.height}
        known = {name: value for name, value in sides.items() if value is not None}
        return {"sha256": self.sha256, "bytes": self.bytes, **known}


@dataclass(frozen=True, slots=True, repr=False)
class Texts:
    """What a user wrote, what was sent in its place (None: nothing was), and what came back: only where recording is on."""

    original: str
    sent: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """
    Args:
        time: when the request came, in seconds since 1970.
        model: as the caller named it. Names are kept to 128 printable characters.
        status: of the HTTP answer; 0 where there is none yet.
        action: what the guard did; `error` and `unguarded` where it did nothing; `begun` is a request whose end is
            not on record: it still runs, or its process was killed.
        mode: the policy in force.
        note: the class of a failure. What follows a colon is left out, and what is no plain word becomes "other".
        guard_ms, first_byte_ms, total_ms: since the request came, except for guard_ms, which is the guard's own.
        versions: of vlmguard, and which guard and rewriter.
    """

    time: float
    request_id: str
    key_id: str
    route: str
    model: str
    stream: bool
    status: int
    action: Action
    mode: str
    images: tuple[ImageFacts, ...] = ()
    risk: float | None = None
    threshold: float | None = None
    category: str | None = None
    note: str | None = None
    guard_ms: float | None = None
    first_byte_ms: float | None = None
    total_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    texts: Texts | None = field(default=None, repr=False)

    def fields(self) -> dict[str, Any]:
        """The record as one JSON object; "texts" only where there are some."""
        return {
            "time": datetime.fromtimestamp(self.time, UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id,
            "key_id": self.key_id,
            "route": self.route,
            "model": self.model,
            "stream": self.stream,
            "status": self.status,
            "action": self.action,
            "mode": self.mode,
            "risk": self.risk,
            "threshold": self.threshold,
            "category": self.category,
            "note": self.note,
            "images": [image.fields() for image in self.images],
            "latency_ms": {"guard": self.guard_ms, "first_byte": self.first_byte_ms, "total": self.total_ms},
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "versions": dict(self.versions),
            **({"texts": {name: getattr(self.texts, name) for name in Texts.__slots__}} if self.texts else {}),
        }


def row_of(record: Record, entry: str, *, begun: bool) -> tuple[Any, ...]:
    """The record as a row of the table of requests, in the order of its columns, whatever the fields hold."""
    return (
        entry,
        int(begun),
        record.time,
        plain(record.request_id),
        plain(record.key_id),
        plain(record.route),
        plain(record.model),
        int(record.stream),
        record.status,
        "begun" if begun else record.action,
        record.mode,
        orjson.dumps(record.images).decode(),
        _finite(record.risk),
        _finite(record.threshold),
        record.category and plain(record.category),
        record.note and _class_of_failure(record.note),
        record.guard_ms,
        record.first_byte_ms,
        record.total_ms,
        _count(record.prompt_tokens),
        _count(record.completion_tokens),
        orjson.dumps(dict(record.versions)).decode(),
    )


def texts_row(record: Record, texts: Texts, entry: str) -> tuple[Any, ...]:
    """Its texts as a row of their own table."""
    return (entry, record.time, _storable(texts.original), _storable(texts.sent), _storable(texts.answer))


def record_of(row: Mapping[str, Any]) -> Record:
    """The record that a row was made from; the row may have the texts' columns too."""
    own = {name: row[name] for name in Record.__slots__ if name != "texts"}
    own["stream"] = bool(own["stream"])
    own["images"] = tuple(ImageFacts(**image) for image in orjson.loads(own["images"]))
    own["versions"] = orjson.loads(own["versions"])
    if row.get("original") is not None:
        own["texts"] = Texts(row["original"], row["sent"], row["answer"])
    return Record(**own)


def plain(text: str, limit: int = NAME_CHARACTERS) -> str:
    """At most `limit` characters of the text, without what cannot be printed: control characters, marks of direction."""
    text = text[: 4 * limit]
    kept = text if text.isprintable() else "".join(filter(str.isprintable, text))
    return kept if len(kept) <= limit else f"{kept[: limit - 1]}…"


def _class_of_failure(note: str) -> str:
    head = note[: 2 * NAME_CHARACTERS].partition(":")[0]
    return head if NOTE.fullmatch(head) else "other"


def _storable(text: str | None) -> str | None:
    """The text as a database takes it: no NUL, no half of a surrogate pair."""
    if text is None:
        return None
    return text.encode("utf-8", "replace").decode().replace("\0", "\ufffd")


def _finite(number: float | None) -> float | None:
    return number if number is not None and math.isfinite(number) else None


def _count(number: int | None) -> int | None:
    return number if isinstance(number, int) and 0 <= number < MAX_COUNT else None
