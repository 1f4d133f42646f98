"""Spans of a request for OpenTelemetry: an interface, and the one that does nothing.

    request: "POST /v1/chat/completions"
    ├── guard
    └── upstream      whose `onward` headers continue the trace at the target

A span holds what `Attributes` names and nothing else: no text, no picture, no header's value, no message of an error.
OpenTelemetry is imported only where an endpoint is configured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Literal, Protocol, TypeAlias, TypedDict, Unpack

from vlmguard.errors import missing_extra

Headers: TypeAlias = Sequence[tuple[bytes, bytes]]  # lower-case names, as ASGI gives them
Part: TypeAlias = Literal["guard", "upstream"]

CONTEXT: Final = (b"traceparent", b"tracestate")  # W3C Trace Context


class Attributes(TypedDict, total=False):
    """What a span may hold; None leaves it out.

    status: of the HTTP answer; error: the class of a failure; risk: in [0, 1]; images: how many.
    """

    status: int | None
    action: str | None
    mode: str | None
    risk: float | None
    threshold: float | None
    category: str | None
    error: str | None
    images: int | None
    stream: bool | None
    prompt_tokens: int | None
    completion_tokens: int | None


class Span(Protocol):
    def set(self, **attributes: Unpack[Attributes]) -> None: ...

    def onward(self, headers: Headers) -> Headers:
        """What continues the trace at the next server, in place of these two of the caller's headers."""
        ...


class Tracing(Protocol):
    def request(
        self, headers: Headers, method: str, route: str, **attributes: Unpack[Attributes]
    ) -> AbstractContextManager[Span]:
        """The span of a request; it continues the trace that the caller's headers name."""
        ...

    def span(self, name: Part, **attributes: Unpack[Attributes]) -> AbstractContextManager[Span]:
        """A part of the request whose span is open in this task, or in one that began this task."""
        ...

    async def aclose(self) -> None:
        """Sends what was not yet sent."""
        ...


class NoSpan:
    def set(self, **attributes: Unpack[Attributes]) -> None:
        pass

    def onward(self, headers: Headers) -> Headers:
        """The caller's own."""
        return [pair for pair in headers if pair[0] in CONTEXT]


class NoTracing:
    def request(
        self, headers: Headers, method: str, route: str, **attributes: Unpack[Attributes]
    ) -> AbstractContextManager[Span]:
        return NOTHING

    def span(self, name: Part, **attributes: Unpack[Attributes]) -> AbstractContextManager[Span]:
        return NOTHING

    async def aclose(self) -> None:
        pass


NOTHING: Final[AbstractContextManager[Span]] = nullcontext(NoSpan())


def tracing(endpoint: str | None, routes: Collection[str], version: str = "") -> Tracing:
    """
    Args:
        endpoint: of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318; None for no tracing.
        routes: the paths that are served; any other is told as "other".

    Raises:
        MissingExtra: OpenTelemetry is not installed.
    """
    if endpoint is None:
        return NoTracing()
    try:
        from vlmguard.gateway.otlp import OtlpTracing
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise missing_extra("opentelemetry", "tracing") from None
    return OtlpTracing(endpoint, routes, version)
