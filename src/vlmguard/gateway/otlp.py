"""Spans that go to a collector as OTLP over HTTP, in batches and from a thread of their own.

OpenTelemetry's own variables hold: OTEL_EXPORTER_OTLP_HEADERS (a collector's key), OTEL_TRACES_SAMPLER,
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_SCHEDULE_DELAY.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Final, Self, TypeAlias, Unpack, get_args

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vlmguard.gateway.metrics import ACTIONS, OTHER, bounded
from vlmguard.gateway.tracing import CONTEXT, Attributes, Headers, Part
from vlmguard.guards.policy import Mode
from vlmguard.rewriter.protocol import CATEGORIES

Value: TypeAlias = str | int | float | bool

PATH: Final = "/v1/traces"  # OTLP's own, under the collector's root
SEND_SECONDS: Final = 5.0  # for one batch with its retries; a gateway that stops waits that long for a dead collector
METHODS: Final = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
CLASS_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
PROPAGATOR: Final = TraceContextTextMapPropagator()
NOWHERE: Final = Context()

# In which task a request's span is open, so that its parts find their parent.
_request: ContextVar[Context] = ContextVar("vlmguard_request_span", default=NOWHERE)


def _one_of(known: Collection[str]) -> Callable[[str], Value]:
    return lambda value: bounded(value, known)


def _class_name(value: str) -> Value:
    return value if CLASS_NAME.fullmatch(value) else OTHER


# Each attribute's name for OpenTelemetry (its semantic conventions' where there is one), and what makes its value safe.
MEANINGS: Final[Mapping[str, tuple[str, Callable[..., Value]]]] = {
    "status": ("http.response.status_code", int),
    "action": ("vlmguard.action", _one_of(ACTIONS)),
    "mode": ("vlmguard.mode", _one_of(get_args(Mode))),
    "risk": ("vlmguard.risk", float),
    "threshold": ("vlmguard.threshold", float),
    "category": ("vlmguard.category", _one_of(CATEGORIES)),
    "error": ("error.type", _class_name),
    "images": ("vlmguard.images", int),
    "stream": ("gen_ai.request.stream", bool),
    "prompt_tokens": ("gen_ai.usage.input_tokens", int),
    "completion_tokens": ("gen_ai.usage.output_tokens", int),
}


class OtlpSpan:
    """An open span; as a context manager it ends with the block, and tells the class of what broke the block off.

    Args:
        failed_from: the lowest status of an answer that makes the span a failed one.
        root: make it the parent of the spans of this task.
    """

    def __init__(self, span: trace.Span, failed_from: int, *, root: bool) -> None:
        self._span, self._failed_from, self._root = span, failed_from, root
        self._token: Token[Context] | None = None

    def __enter__(self) -> Self:
        if self._root:
            self._token = _request.set(trace.set_span_in_context(self._span, NOWHERE))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and kind is not GeneratorExit:
            self._fail(kind.__name__)
        self._span.end()
        if self._token is not None:
            _request.reset(self._token)

    def set(self, **attributes: Unpack[Attributes]) -> None:
        for name, value in attributes.items():
            if name not in MEANINGS:
                raise TypeError(f"a span has no attribute {name}: expected one of {', '.join(MEANINGS)}")
            if value is not None:
                known_as, checked = MEANINGS[name]
                self._span.set_attribute(known_as, checked(value))
        status = attributes.get("status")
        if status is not None and status >= self._failed_from:
            self._fail(attributes.get("error") or str(status))

    def onward(self, headers: Headers) -> Headers:
        """The traceparent of this span; with the caller's tracestate where the trace is the caller's."""
        carrier: dict[str, str] = {}
        PROPAGATOR.inject(carrier, trace.set_span_in_context(self._span, NOWHERE))
        own = carrier["traceparent"].encode()
        given = [value for name, value in headers if name == CONTEXT[0]]
        continued = len(given) == 1 and given[0][3:35] == own[3:35]  # the trace's id
        return [(CONTEXT[0], own), *(pair for pair in headers if continued and pair[0] == CONTEXT[1])]

    def _fail(self, error: str) -> None:
        # No description, and no exception's own event: both would hold its message, which may quote a user.
        self._span.set_status(Status(StatusCode.ERROR))
        self._span.set_attribute("error.type", error if error.isdecimal() else _class_name(error))


class OtlpTracing:
    """
    Args:
        endpoint: the collector's root; one that ends in /v1/traces is taken as it is.
        routes: the paths that are served; any other is told as "other".
    """

    def __init__(self, endpoint: str, routes: Collection[str], version: str = "") -> None:
        root = endpoint.rstrip("/").removesuffix(PATH)
        service = {"service.name": os.environ.get("OTEL_SERVICE_NAME", "vlmguard"), "service.version": version}
        self._routes = frozenset(routes)
        self._provider = TracerProvider(resource=Resource.create(service))
        exporter = OTLPSpanExporter(root + PATH, timeout=SEND_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("vlmguard.gateway", version or None)

    def request(self, headers: Headers, method: str, route: str, **attributes: Unpack[Attributes]) -> OtlpSpan:
        method = method if method in METHODS else "_OTHER"  # as the conventions have it
        route = bounded(route, self._routes)
        span = self._tracer.start_span(
            f"{method} {route}",
            _context_of(headers),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
        )
        return self._begun(span, attributes, failed_from=500, root=True)

    def span(self, name: Part, **attributes: Unpack[Attributes]) -> OtlpSpan:
        upstream = name == "upstream"
        span = self._tracer.start_span(
            name,
            _request.get(),
            SpanKind.CLIENT if upstream else SpanKind.INTERNAL,
            {"gen_ai.operation.name": "chat"} if upstream else None,
        )
        return self._begun(span, attributes, failed_from=400, root=False)

    async def aclose(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)

    def _begun(self, span: trace.Span, attributes: Attributes, *, failed_from: int, root: bool) -> OtlpSpan:
        begun = OtlpSpan(span, failed_from, root=root)
        begun.set(**attributes)
        return begun


def _context_of(headers: Headers) -> Context:
    """Where the caller's traceparent stands. Its tracestate is text of the caller's, and stays out of the spans."""
    given = [value for name, value in headers if name == CONTEXT[0]]
    if len(given) != 1:
        return NOWHERE
    return PROPAGATOR.extract({"traceparent": given[0].decode("latin-1")}, NOWHERE)
