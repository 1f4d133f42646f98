"""Callers' keys: who calls, and what one may ask for.

Only hashes are kept. A key is 32 random bytes, so its hash needs no salt: there is nothing to guess it from.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Final

from vlmguard.errors import BadRequest, ImageTooLarge, RateLimited
from vlmguard.gateway.config import Key, Settings
from vlmguard.gateway.sections import ANONYMOUS as ANONYMOUS_ID

ANONYMOUS: Final = Key.model_construct(id=ANONYMOUS_ID, sha256="")  # no key has this hash
PREFIX: Final = "vg-"  # lets scanners for leaked secrets know one
RANDOM_BYTES: Final = 32


class Limiter:
    """At most `per_minute` requests at once and, after that, as many a minute: a bucket that refills steadily.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._tokens = float(per_minute)
        self._at = clock()

    def take(self) -> float:
        """Takes one: 0 where there was one, else the seconds until there is."""
        now = self._clock()
        rate = self.per_minute / 60
        self._tokens = min(float(self.per_minute), self._tokens + (now - self._at) * rate)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / rate
        self._tokens -= 1
        return 0.0


class Keys:
    """The keys that are let in; without any, everybody is (`load` refuses that where other machines can call).

    A process counts the requests that it serves itself: with several workers each has its own limits.
    """

    def __init__(self, keys: Iterable[Key], clock: Callable[[], float] = time.monotonic) -> None:
        self._known = [(bytes.fromhex(key.sha256), key) for key in keys]
        self._limiters = {
            key.id: Limiter(key.requests_per_minute, clock) for _, key in self._known if key.requests_per_minute
        }

    @classmethod
    def of(cls, settings: Settings, clock: Callable[[], float] = time.monotonic) -> Keys:
        return cls(settings.keys, clock)

    def find(self, presented: str | None) -> Key | None:
        """Whose key it is; None where it is nobody's, or where one is asked for and none was presented.

        Takes as long for every key, known or not: a timing tells nothing about the hashes.
        """
        if not self._known:
            return ANONYMOUS
        if presented is None:
            return None
        digest = hashlib.sha256(presented.encode("utf-8", "surrogatepass")).digest()
        found = None
        for known, key in self._known:
            if hmac.compare_digest(digest, known):
                found = key
        return found

    def spend(self, key: Key) -> None:
        """Counts a request of the key's.

        Raises:
            RateLimited: it had its requests for now; one that is refused is not counted.
        """
        limiter = self._limiters.get(key.id)
        if limiter is not None and (wait := limiter.take()):
            raise RateLimited(
                f"the key {key.id} may send {limiter.per_minute} requests a minute", "Wait.", retry_after=wait
            )


def may_call(key: Key, route: str) -> bool:
    """Whether the key is let into the route at all."""
    return key.routes is None or route in key.routes


def check_pictures(key: Key, images: int, pixels: int = 0) -> None:
    """Refuses a request with more than the key may send; `pixels` of all its pictures and frames together.

    Raises:
        BadRequest: too many pictures. ImageTooLarge: too many pixels.
    """
    if key.images is not None and images > key.images:
        raise BadRequest(f"the request has {images} pictures", f"The key {key.id} may send {key.images} in one.")
    if key.pixels is not None and pixels > key.pixels:
        raise ImageTooLarge(
            f"the pictures have {pixels:,} pixels together", f"The key {key.id} may send {key.pixels:,} in a request."
        )


def presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The key in a request's headers, whose names are lower case as in ASGI; None where there is none.

    Of several the first counts in this order: `Authorization: Bearer`, `x-api-key` (Anthropic), `api-key` (Azure).
    """
    found: dict[bytes, str] = {}
    for name, value in headers:
        if name in (b"authorization", b"x-api-key", b"api-key") and name not in found and (key := _key(name, value)):
            found[name] = key
    return found.get(b"authorization") or found.get(b"x-api-key") or found.get(b"api-key")


def new_key() -> tuple[str, str]:
    """A key for a caller, and its SHA-256 for the settings."""
    key = PREFIX + secrets.token_urlsafe(RANDOM_BYTES)
    return key, hashlib.sha256(key.encode()).hexdigest()


def _key(name: bytes, value: bytes) -> str:
    text = value.decode("utf-8", "surrogateescape").strip()
    if name != b"authorization":
        return text
    scheme, _, key = text.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
