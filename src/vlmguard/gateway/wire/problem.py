"""What went wrong, before it takes the shape of one API's errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from vlmguard.errors import (
    BadRequest,
    ConfigError,
    ContextTooLong,
    ImageTooLarge,
    ModelError,
    RateLimited,
    RewriteUnreadable,
    TargetError,
    Timeout,
    Upstream,
    VLMGuardError,
)


@dataclass(frozen=True)
class Problem:
    """
    Args:
        status: of HTTP.
        message: one line for the caller.
        param: the place in the request, if known.
        retry_after: seconds.
    """

    status: int
    message: str
    param: str | None = None
    retry_after: float | None = None


# The first that fits. A key that the target refuses is the operator's, not the caller's 401 (F026).
STATUSES: Final[tuple[tuple[type[VLMGuardError], int], ...]] = (
    (ImageTooLarge, 413),
    (BadRequest, 400),
    (ContextTooLong, 400),
    (RateLimited, 429),
    (Timeout, 504),
    (TargetError, 502),
    (RewriteUnreadable, 502),
    (ConfigError, 500),
    (ModelError, 500),
)
UNAVAILABLE: Final = 503  # of what is ours and passes, such as an audit log that cannot be written
OF_THE_REQUEST: Final = (400, 422)  # of a target's statuses: those that blame what was asked


def problem_of(error: VLMGuardError) -> Problem:
    """The problem for the caller of a request in which `error` was raised."""
    status = next((status for kind, status in STATUSES if isinstance(error, kind)), UNAVAILABLE)
    if isinstance(error, Upstream) and error.status in OF_THE_REQUEST:
        status = error.status
    return Problem(
        status, " ".join(str(error).split()), getattr(error, "param", None), getattr(error, "retry_after", None)
    )
