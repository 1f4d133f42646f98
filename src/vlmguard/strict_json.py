"""JSON read so that every later reader of it sees the same."""

import binascii
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pybase64

from vlmguard.errors import BadRequest

MAX_BODY_BYTES = 32 * 2**20
MAX_DEPTH = 64
LONG_BYTES = 2**16  # of base64 that is set aside while the rest is read
MOST_QUOTES = 4096  # that are looked at for it


def parse_json(data: bytes, limit: int = MAX_BODY_BYTES) -> Any:
    """Reads a request's body.

    Raises:
        BadRequest: over `limit` bytes, not UTF-8, not JSON, a key twice in one object (readers differ in the
            one they take, F008), NaN or infinity, an integer beyond 64 bits, half a surrogate pair, nested
            over 64 deep.
    """
    if len(data) > limit:
        raise BadRequest(f"the body has {len(data):,} bytes", f"Send {limit:,} at most; smaller pictures help.")
    try:
        return _Aside.of(bytes(data)).read()
    except _KeyAside:
        return _Aside(bytes(data)).read()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is not UTF-8 at byte {error.start}", "Send JSON in UTF-8.") from None
    except RecursionError:
        raise _too_deep("the body") from None
    except ValueError as error:
        raise BadRequest(f"the body is not JSON: {error}", "Send one JSON object.") from None


class _KeyAside(Exception):
    """A long run of base64 stands in a key: two such keys can only be compared whole."""


@dataclass
class _Aside:
    """A body whose long runs of base64 are set aside: a JSON reader looks at each of their characters, twice.

    A run is all that stands between two quotes, or between the last comma and the second, and is base64 and nothing
    else; so in its place any other letters mean the same, and a name that nobody could guess stands for it.
    """

    data: bytes
    name: str = field(default_factory=lambda: secrets.token_hex(8))
    runs: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, body: bytes) -> "_Aside":
        made = cls(body)
        if len(body) < LONG_BYTES:
            return made
        kept: list[bytes] = []
        begun, quote = 0, body.find(b'"')
        for _ in range(MOST_QUOTES):
            start, quote = quote + 1, body.find(b'"', quote + 1)
            if quote < 0:
                break
            if quote - start < LONG_BYTES:
                continue
            start = body.rfind(b",", start, quote) + 1 or start
            run = body[start:quote]
            if len(run) >= LONG_BYTES and _is_base64(run):
                kept += [body[begun:start], f"{made.name}{len(made.runs)}.".encode()]
                made.runs.append(run.decode())
                begun = quote
        made.data = b"".join([*kept, body[begun:]])
        return made

    def read(self) -> Any:
        return checked(json.loads(self.data.decode(), object_pairs_hook=self._object), aside=self)

    def put_back(self, text: str) -> str:
        if not self.runs or self.name not in text:
            return text
        return re.sub(self.name + r"(\d+)\.", lambda found: self.runs[int(found[1])], text)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if self.runs and any(self.name in key for key, _ in pairs):
            raise _KeyAside
        return _no_key_twice(pairs)


def _is_base64(run: bytes) -> bool:
    try:
        pybase64.b64decode(run, validate=True)
    except binascii.Error:
        return False
    return True


def checked(value: Any, where: str = "", depth: int = 1, aside: _Aside | None = None) -> Any:
    """A copy of a JSON value; tuples and other mappings become arrays and objects.

    Raises:
        BadRequest: something in it is not JSON, or not JSON that every reader takes.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        value = aside.put_back(value) if aside else value
        if not value.isascii() and not _encodable(value):
            raise BadRequest("a text holds half a surrogate pair", "Send valid Unicode.", param=where or None)
        return value
    if isinstance(value, int | float):
        if not math.isfinite(value) or (isinstance(value, int) and not -(2**63) <= value < 2**64):
            raise BadRequest("a number is infinite, NaN or beyond 64 bits", "Send a smaller one.", param=where or None)
        return value
    if depth > MAX_DEPTH:
        raise _too_deep(where)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise unexpected("a string as a key", key, where)
        return {
            checked(key): checked(it, f"{where}.{key}" if where else key, depth + 1, aside) for key, it in value.items()
        }
    if isinstance(value, list | tuple):
        return [checked(item, f"{where}[{at}]", depth + 1, aside) for at, item in enumerate(value)]
    raise unexpected("a JSON value", value, where)


def copied(value: Any) -> Any:
    """A deep copy of a JSON value."""
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def unexpected(expected: str, got: object, where: str) -> BadRequest:
    """The error for a value of a wrong kind: it names the kind and the place, never the value."""
    kind = "nothing" if got is None else type(got).__name__
    return BadRequest(f"{where or 'the request'}: expected {expected}, got {kind}", param=where or None)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise BadRequest(f"the key {key[:40]!r} is twice in one object", "Send each key once.", param=key[:40])
        fields[key] = value
    return fields


def _too_deep(where: str) -> BadRequest:
    return BadRequest(f"the JSON is nested over {MAX_DEPTH} deep", "Send a flatter request.", param=where[:80] or None)
