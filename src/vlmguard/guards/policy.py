"""What is done with a risky request, and what when the guard itself fails."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, get_args

from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    ConfigError,
    ContextTooLong,
    ModelError,
    RateLimited,
    RewriteUnreadable,
    Timeout,
    Upstream,
    VLMGuardError,
)
from vlmguard.rewriter.protocol import CATEGORIES, quote

Mode = Literal["off", "shadow", "rewrite", "block"]
Failure = Literal["closed", "refuse", "open"]
Pictures = Literal["keep", "mask", "withhold"]

REFUSAL: Final = (
    "I can't help with this request. If you tell me what you want to achieve, I'll gladly help you find a safe way "
    "to do it."
)
CLASSES: Final = ("timeout", "upstream", "unreadable", "overload")  # of failure, each with a field of the policy
# A refused key, a missing package or model: mistakes of the operator's, which never open the guard (F026).
OPERATORS_OWN: Final = (AuthenticationFailed, ConfigError, ModelError)


@dataclass(frozen=True)
class Policy:
    """
    Args:
        mode: `off` asks no rewriter; `shadow` judges and records, and changes nothing; `rewrite` sends the rewritten
            request; `block` refuses a risky one.
        categories: another mode for some categories.
        failure: when the rewriter fails on a risky request, or cannot judge: `closed` sends the user's words inside a
            static safety wrapper, `refuse` refuses, `open` sends them unchanged.
        timeout, upstream, unreadable, overload: in place of `failure` for one class of it: no answer in time, an error of the
            rewriter's server, an output that fails its checks (or a request too long for it), and too many requests.
        pictures: what happens to a picture with words in it, or of which the rewriter told nothing, when the request is
            risky: `keep` sends it, `mask` paints over its words (and leaves it out where the rewriter failed),
            `withhold` leaves it out.
    """

    mode: Mode = "rewrite"
    categories: Mapping[str, Mode] = field(default_factory=dict)
    failure: Failure = "closed"
    timeout: Failure | None = None
    upstream: Failure | None = None
    unreadable: Failure | None = None
    overload: Failure | None = None
    pictures: Pictures = "keep"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("mode", self.mode, get_args(Mode)),
            *((f"the mode of {category}", mode, get_args(Mode)) for category, mode in self.categories.items()),
            ("failure", self.failure, get_args(Failure)),
            *((name, getattr(self, name), (None, *get_args(Failure))) for name in CLASSES),
            ("pictures", self.pictures, get_args(Pictures)),
        ):
            if value not in allowed:
                raise ConfigError.wrong(name, expected=" | ".join(map(str, allowed)), got=value)
        for category in self.categories:
            if category not in CATEGORIES:
                raise ConfigError.wrong("a category", expected=", ".join(CATEGORIES), got=category)

    def mode_of(self, category: str | None) -> Mode:
        return self.categories.get(category, self.mode) if category else self.mode

    def on_failure(self, error: VLMGuardError) -> Failure:
        """What to do about an error of the rewriter."""
        if isinstance(error, OPERATORS_OWN):
            return self.failure if self.failure != "open" else "closed"
        if isinstance(error, Timeout):
            return self.timeout or self.failure
        if isinstance(error, RateLimited):
            return self.overload or self.failure
        if isinstance(error, RewriteUnreadable | ContextTooLong):
            return self.unreadable or self.failure
        return (self.upstream or self.failure) if isinstance(error, Upstream | BadAnswer) else self.failure


def wrapped(text: str) -> str:
    """The user's words as quoted data in a static request for caution: what `closed` sends."""
    return (
        "Someone sent the request quoted below, perhaps with a picture. Judge first whether words and picture together "
        "could lead to harm. If they could, do not give anything that enables it: say briefly why, and offer safe help "
        f"with the underlying need. If they could not, answer normally.\nRequest: {quote(text, None)}"
    )
