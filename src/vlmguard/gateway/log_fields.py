"""What a log line may hold: ids, numbers, hashes and sizes. Texts, pictures and keys are told by length and hash alone."""

from __future__ import annotations

import hashlib
import math
import traceback
from collections.abc import Iterable, Mapping, MutableMapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from vlmguard.errors import AuditLogError, ConfigError, ModelError

# The names of fields that may hold what a user wrote, drew or was told. A name counts by its last word too: user_text.
CONTENT: Final = frozenset(
    (
        *("text", "texts", "prompt", "message", "messages", "content", "contents", "body", "json", "data"),
        *("input", "output", "answer", "original", "sent", "analysis", "arguments"),
        *("image", "images", "image_url", "picture", "pictures"),
    )
)
SECRETS: Final = frozenset(
    ("authorization", "key", "apikey", "cookie", "password", "secret", "token", "headers", "credentials")
)
WITHHELD: Final = "[withheld]"
MAX_CHARACTERS: Final = 512
HEAD_CHARACTERS: Final = 64  # of a longer string: enough to tell what it was
MAX_ITEMS: Final = 16
MAX_DEPTH: Final = 3
MAX_FRAMES: Final = 20
MAX_INTEGER: Final = 2**63
# Their messages are ours, about what an operator set or runs; any other may quote a request.
TOLD: Final = (ConfigError, ModelError, AuditLogError)


def scrub(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: each field as it may be logged."""
    return {cut(name): field(name, value) for name, value in event.items()}


def field(name: str, value: Any, depth: int = 0) -> Any:
    """The value of a field as it may be logged: what JSON knows, whatever came in."""
    if value is None or isinstance(value, bool):
        return value
    kind = _names(name)
    if "secret" in kind:
        return WITHHELD
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return digest(bytes(value))
    if isinstance(value, str):
        return digest(value) if "content" in kind else cut(value)
    if isinstance(value, BaseException):
        return told(value)
    if isinstance(value, Path):
        return cut(str(value))
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        return _items(name, value, depth) if depth < MAX_DEPTH else f"[{len(value)} items]"
    return f"[{type(value).__name__}]"  # its own words for itself may hold anything


def cut(text: str) -> str:
    """A long string's head with its length and hash; of one with a picture in it, those alone."""
    if "data:image/" in text:
        return digest(text)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:HEAD_CHARACTERS]}... {digest(text)}"


def digest(value: str | bytes) -> str:
    """A length and the first 48 bits of a SHA-256, which tell equal values without telling the value."""
    unit, data = (
        ("bytes", value) if isinstance(value, bytes) else ("characters", value.encode("utf-8", "surrogatepass"))
    )
    return f"[{len(value)} {unit}, sha256 {hashlib.sha256(data).hexdigest()[:12]}]"


def told(error: BaseException, depth: int = 0) -> dict[str, Any]:
    """An exception: its class, where it came from, what caused it; of its message, just what cannot quote a request."""
    frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
    said: dict[str, Any] = {
        "type": type(error).__name__,
        "message": _message(error),
        "at": [f"{_file(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames],
    }
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and depth < MAX_DEPTH:
        said["because"] = told(cause, depth + 1)
    if isinstance(error, BaseExceptionGroup) and depth < MAX_DEPTH:
        said["several"] = [told(part, depth + 1) for part in error.exceptions[:MAX_DEPTH]]
    return said


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return cut(error.strerror)
    words = str(error)
    return cut(words) if isinstance(error, TOLD) or not words else digest(words)


def _file(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _names(name: str) -> set[str]:
    """Whether a field's name is one of content, or of a secret."""
    whole = name.lower().replace("-", "_")
    words = {whole, whole.rpartition("_")[2]}
    return {kind for kind, known in (("content", CONTENT), ("secret", SECRETS)) if words & known}


def _number(value: int | float) -> int | float | str:
    if isinstance(value, int):
        return value if abs(value) < MAX_INTEGER else f"[a number of {value.bit_length()} bits]"
    return value if math.isfinite(value) else str(value)


def _items(name: str, value: Mapping[Any, Any] | Iterable[Any], depth: int) -> dict[str, Any] | list[Any]:
    """A container's first items. Those of a list, and of a mapping that is content, are fields of the container's name."""
    if not isinstance(value, Mapping):
        return [field(name, item, depth + 1) for item in islice(value, MAX_ITEMS)]
    content = "content" in _names(name)
    pairs = islice(value.items(), MAX_ITEMS)
    return {cut(str(key)): field(name if content else str(key), item, depth + 1) for key, item in pairs}
