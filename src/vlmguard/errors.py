"""Every error that VLMGuard raises on purpose.

VLMGuardError
├── BadRequest                 the caller's request cannot be read               exit 2
│   └── ImageError             a picture in it cannot be used
│       ├── ImageTooLarge      over a limit of bytes, pixels, sides or frames (HTTP 413)
│       ├── ImageUnreadable    broken, or of a format that is not allowed
│       └── ImageNotAllowed    a remote address, a file address or a local path
├── ConfigError                a wrong option, name or combination               exit 2
│   ├── MissingExtra           an optional package is not installed
│   └── CapabilityError        a guard or attack needs what the VLM cannot do
├── ModelError                 a model cannot be loaded                          exit 3
│   └── AdapterError           an adapter does not fit the model it is put on
├── TargetError                a call of a VLM failed                            exit 4
│   ├── Timeout
│   ├── RateLimited            carries `retry_after`
│   ├── AuthenticationFailed
│   ├── Upstream               the server answered with an error `status`
│   ├── BadAnswer              the server's answer cannot be read
│   └── ContextTooLong
├── RewriteUnreadable          the rewriter's output fails its checks            exit 1
└── AuditLogError              the audit log cannot be written or read           exit 1

An error prints as "what happened. remedy".
"""

from typing import ClassVar, Self


class VLMGuardError(Exception):
    """What happened, and what to do about it.

    Args:
        message: what happened, without a full stop.
        remedy: what the reader can do, as a sentence; empty where nothing can be done.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, remedy: str = "") -> None:
        super().__init__(message)  # `args` holds the message alone: with __dict__ that pickles
        self.remedy = remedy

    @property
    def message(self) -> str:
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.message.rstrip('.')}. {self.remedy}" if self.remedy else self.message


class BadRequest(VLMGuardError):
    """The request cannot be read; `param` is the place in it ("messages[2].content[0]"), if known."""

    exit_code = 2

    def __init__(self, message: str, remedy: str = "", *, param: str | None = None) -> None:
        super().__init__(message, remedy)
        self.param = param


class ImageError(BadRequest):
    """A picture cannot be used."""


class ImageTooLarge(ImageError):
    """A picture is over a limit of bytes, pixels, sides or frames; over HTTP a 413."""


class ImageUnreadable(ImageError):
    """A picture is broken, or of a format that is not allowed."""


class ImageNotAllowed(ImageError):
    """A picture is named by a remote address, a file address or a local path."""


class ConfigError(VLMGuardError):
    """A wrong option, name or combination of them."""

    exit_code = 2

    @classmethod
    def wrong(cls, what: str, *, expected: str, got: object, remedy: str = "") -> Self:
        """The error for an option that has a wrong value: "`what`: expected X, got Y"."""
        return cls(f"{what}: expected {expected}, got {got!r}", remedy)


class MissingExtra(ConfigError):
    """An optional package is not installed."""


def missing_extra(package: str, extra: str) -> MissingExtra:
    """The error for an absent optional `package`, with the line that installs its `extra`."""
    return MissingExtra(f"{package} is not installed", f'Install it with: pip install "vlmguard-r1[{extra}]"')


class CapabilityError(ConfigError):
    """Something needs what the VLM it was given cannot do."""


class ModelError(VLMGuardError):
    """A model cannot be loaded: it is missing or damaged."""

    exit_code = 3


class AdapterError(ModelError):
    """An adapter does not fit the model it is put on."""


class TargetError(VLMGuardError):
    """A call of a VLM failed."""

    exit_code = 4


class Timeout(TargetError):
    """The VLM did not answer in time."""


class RateLimited(TargetError):
    """The server asks to be called less often; `retry_after` is the wait in seconds that it asked for."""

    def __init__(self, message: str, remedy: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(message, remedy)
        self.retry_after = retry_after


class AuthenticationFailed(TargetError):
    """The server refused the key."""


class Upstream(TargetError):
    """The server answered with an error; `status` is its HTTP status, if it gave one."""

    def __init__(self, message: str, remedy: str = "", *, status: int | None = None) -> None:
        super().__init__(message, remedy)
        self.status = status


class BadAnswer(TargetError):
    """The server's answer cannot be read."""


class ContextTooLong(TargetError):
    """The conversation does not fit the model's context."""


class RewriteUnreadable(VLMGuardError):
    """The rewriter's output fails its checks."""


class AuditLogError(VLMGuardError):
    """The audit log cannot be written or read."""
