"""How long to wait for a server, and what its failures mean; shared by all that call one over HTTP."""

from __future__ import annotations

import email.utils
import time
from dataclasses import dataclass
from typing import Final

import aiohttp

from vlmguard.errors import BadAnswer, TargetError, Timeout, Upstream

REACH: Final = "Check that the server runs and that the address is right."
FAILURES: Final = (TimeoutError, aiohttp.ClientError, ValueError)  # what `target_error` understands


@dataclass(frozen=True)
class Patience:
    """
    Args:
        connect_seconds: to reach the server.
        first_byte_seconds: the longest silence, before the answer and within it.
        total_seconds: for the whole call.
    """

    connect_seconds: float = 10.0
    first_byte_seconds: float = 120.0
    total_seconds: float = 600.0

    def timeout(self, left: float) -> aiohttp.ClientTimeout:
        """What aiohttp takes, when `left` seconds of the total are left."""
        return aiohttp.ClientTimeout(
            total=max(left, 1e-3), sock_connect=self.connect_seconds, sock_read=self.first_byte_seconds
        )


def target_error(error: Exception, where: str, patience: Patience) -> TargetError:
    """Our error for one of `FAILURES`, with the address and a remedy."""
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Timeout(f"{where} could not be reached in {patience.connect_seconds:g} s", REACH)
    if isinstance(error, aiohttp.SocketTimeoutError):
        silence = f"said nothing for {patience.first_byte_seconds:g} s"
        return Timeout(f"{where} {silence}", "Ask for fewer tokens, or allow more seconds.")
    if isinstance(error, TimeoutError):
        return Timeout(
            f"{where} took over {patience.total_seconds:g} s", "Ask for fewer tokens, or allow more seconds."
        )
    if isinstance(error, aiohttp.ClientSSLError):
        return Upstream(f"{where} has no certificate that is trusted", "Check the address.")
    if lost(error):
        return Upstream(f"{where} could not be reached, or broke off ({type(error).__name__})", REACH)
    return BadAnswer(f"{where} sent what cannot be read: {error}", "Is it an OpenAI-compatible server?")


def lost(error: Exception) -> bool:
    """Whether there was no connection, or it broke; silence and a certificate that is not trusted are other matters."""
    broken = isinstance(error, aiohttp.ClientConnectionError | aiohttp.ClientPayloadError)
    return broken and not isinstance(error, aiohttp.ClientSSLError | aiohttp.SocketTimeoutError)


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number or an HTTP date; None where there is neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
