import asyncio
import gzip
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.gateway.ended import ROUTES
from vlmguard.errors import ConfigError
from vlmguard.gateway.otlp import OtlpTracing
from vlmguard.gateway.tracing import Headers, NoTracing, tracing

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = (b"traceparent", f"00-{TRACE}-{PARENT}-01".encode())
TRACESTATE = (b"tracestate", b"vendor=MARKER")
CHAT = ROUTES[0]


class Collector:
    """A collector on loopback: it keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.paths.append(self.path)
                collector.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def requests(self) -> list[ExportTraceServiceRequest]:
        return [ExportTraceServiceRequest.FromString(body) for body in self.bodies]

    @property
    def spans(self) -> dict[str, Span]:
        told = [r for request in self.requests for r in request.resource_spans]
        return {span.name: span for resource in told for scope in resource.scope_spans for span in scope.spans}

    @contextmanager
    def serving(self) -> Iterator["Collector"]:
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.server.shutdown()
            self.server.server_close()
            thread.join()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Collector().serving() as serving:
        yield serving


@pytest.fixture
async def otlp(collector: Collector) -> AsyncIterator[OtlpTracing]:
    made = OtlpTracing(collector.url, ROUTES, "1.2.3")
    yield made
    await made.aclose()


def told(span: Span) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in span.attributes}


async def test_a_request_is_a_span_with_guard_and_upstream_as_children(collector: Collector, otlp: OtlpTracing) -> None:
    with otlp.request([], "POST", CHAT, stream=True) as request:
        with otlp.span("guard") as guard:
            guard.set(action="flagged", mode="shadow", risk=0.75, threshold=0.5, category="fraud", images=2)
        with otlp.span("upstream") as upstream:
            upstream.set(status=200, prompt_tokens=12, completion_tokens=34)
        request.set(status=200, action="flagged", category=None)
    await otlp.aclose()
    spans = collector.spans
    server, guarding, asking = spans[f"POST {CHAT}"], spans["guard"], spans["upstream"]
    assert len(spans) == 3
    assert set(collector.paths) == {"/v1/traces"}
    assert not server.parent_span_id
    assert guarding.parent_span_id == asking.parent_span_id == server.span_id
    assert guarding.trace_id == asking.trace_id == server.trace_id
    kinds = (Span.SPAN_KIND_SERVER, Span.SPAN_KIND_INTERNAL, Span.SPAN_KIND_CLIENT)
    assert (server.kind, guarding.kind, asking.kind) == kinds
    assert told(server) == {
        "http.request.method": "POST",
        "http.route": CHAT,
        "gen_ai.request.stream": True,
        "http.response.status_code": 200,
        "vlmguard.action": "flagged",
    }
    assert told(guarding) == {
        "vlmguard.action": "flagged",
        "vlmguard.mode": "shadow",
        "vlmguard.risk": 0.75,
        "vlmguard.threshold": 0.5,
        "vlmguard.category": "fraud",
        "vlmguard.images": 2,
    }
    assert told(asking) == {
        "gen_ai.operation.name": "chat",
        "http.response.status_code": 200,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 34,
    }
    resource = {
        pair.key: pair.value.string_value for pair in collector.requests[0].resource_spans[0].resource.attributes
    }
    assert (resource["service.name"], resource["service.version"]) == ("vlmguard", "1.2.3")


async def test_requests_side_by_side_keep_their_own_children(collector: Collector, otlp: OtlpTracing) -> None:
    async def one(route: str, risk: float) -> None:
        with otlp.request([], "POST", route):
            await asyncio.sleep(0.001)

            async def guard() -> None:
                with otlp.span("guard", risk=risk):
                    await asyncio.sleep(0.001)

            await asyncio.create_task(guard())

    await asyncio.gather(*(one(route, index) for index, route in enumerate(ROUTES)))
    await otlp.aclose()
    listed = [
        span
        for request in collector.requests
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]
    roots = {told(span)["http.route"]: span.span_id for span in listed if span.kind == Span.SPAN_KIND_SERVER}
    parents = {told(span)["vlmguard.risk"]: span.parent_span_id for span in listed if span.name == "guard"}
    assert parents == {float(index): roots[route] for index, route in enumerate(ROUTES)}


async def test_a_callers_trace_is_continued_and_passed_on(collector: Collector, otlp: OtlpTracing) -> None:
    headers = [(b"host", b"x"), TRACEPARENT, TRACESTATE]
    with otlp.request(headers, "POST", CHAT), otlp.span("upstream") as upstream:
        onward = upstream.onward(headers)
    await otlp.aclose()
    spans = collector.spans
    server, asking = spans[f"POST {CHAT}"], spans["upstream"]
    assert (server.trace_id.hex(), server.parent_span_id.hex()) == (TRACE, PARENT)
    assert onward == [(b"traceparent", f"00-{TRACE}-{asking.span_id.hex()}-01".encode()), TRACESTATE]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"traceparent", b"\xff\x00MARKER"), TRACESTATE],
        [(b"traceparent", b"00-" + b"0" * 32 + b"-" + b"0" * 16 + b"-01"), TRACESTATE],
        [TRACEPARENT, TRACEPARENT, TRACESTATE],
        [TRACESTATE],
    ],
)
async def test_a_broken_trace_is_not_continued(collector: Collector, otlp: OtlpTracing, headers: Headers) -> None:
    with otlp.request(headers, "POST", CHAT), otlp.span("upstream") as upstream:
        ((name, value),) = upstream.onward(headers)
    await otlp.aclose()
    assert not collector.spans[f"POST {CHAT}"].parent_span_id
    assert name == b"traceparent"
    assert TRACE.encode() not in value


async def test_a_caller_who_is_not_sampled_is_not_recorded_but_passed_on(
    collector: Collector, otlp: OtlpTracing
) -> None:
    headers = [(b"traceparent", f"00-{TRACE}-{PARENT}-00".encode())]
    with otlp.request(headers, "POST", CHAT), otlp.span("upstream", status=200) as upstream:
        ((_, value),) = upstream.onward(headers)
    await otlp.aclose()
    assert not collector.bodies
    assert value.startswith(f"00-{TRACE}-".encode())
    assert value.endswith(b"-00")


async def test_f068_nothing_that_a_caller_wrote_is_in_a_trace(collector: Collector, otlp: OtlpTracing) -> None:
    headers = [(b"authorization", b"Bearer MARKER"), (b"user-agent", b"MARKER"), TRACEPARENT, TRACESTATE]

    def serve() -> None:
        with otlp.request(headers, "MARKER", "/MARKER", action="MARKER", mode="MARKER", category="MARKER"):
            with pytest.raises(RuntimeError), otlp.span("guard", error="MARKER text of a user"):
                raise RuntimeError("MARKER data:image/png;base64,MARKER")
            with otlp.span("upstream", status=500) as upstream:
                upstream.onward(headers)
            raise ValueError("MARKER")

    with pytest.raises(ValueError, match="MARKER"):
        serve()
    await otlp.aclose()
    assert set(collector.spans) == {"_OTHER other", "guard", "upstream"}
    assert all(b"MARKER" not in body and b"Bearer" not in body for body in collector.bodies)
    assert not any(span.events for span in collector.spans.values())
    assert told(collector.spans["_OTHER other"])["vlmguard.category"] == "other"


async def test_an_attribute_that_is_not_known_is_refused(otlp: OtlpTracing) -> None:
    with (
        otlp.request([], "POST", CHAT) as request,
        pytest.raises(TypeError, match="no attribute text: expected one of"),
    ):
        request.set(text="what the user wrote")  # type: ignore[call-arg]


async def test_what_failed_is_told_by_its_class(collector: Collector, otlp: OtlpTracing) -> None:
    with otlp.request([], "POST", CHAT) as request:
        with pytest.raises(asyncio.CancelledError), otlp.span("guard"):
            raise asyncio.CancelledError
        with otlp.span("upstream") as upstream:
            upstream.set(status=429)
        request.set(status=503, error="Upstream")
    await otlp.aclose()
    spans = collector.spans
    assert {told(span)["error.type"] for span in spans.values()} == {"CancelledError", "429", "Upstream"}
    assert all(span.status.code == Status.STATUS_CODE_ERROR and not span.status.message for span in spans.values())


async def test_what_a_caller_did_wrong_does_not_fail_the_servers_span(collector: Collector, otlp: OtlpTracing) -> None:
    with otlp.request([], "POST", CHAT) as request:
        request.set(status=404)
    await otlp.aclose()
    assert collector.spans[f"POST {CHAT}"].status.code == Status.STATUS_CODE_UNSET


async def test_a_span_may_end_in_another_task(collector: Collector, otlp: OtlpTracing) -> None:
    """As one does that an asynchronous generator holds, when the loop closes the generator."""

    async def pieces() -> AsyncIterator[int]:
        with otlp.span("upstream"):
            yield 1

    with otlp.request([], "POST", CHAT):
        made = pieces()
        await anext(made)
        await asyncio.create_task(made.aclose())  # type: ignore[attr-defined]
    await otlp.aclose()
    assert collector.spans["upstream"].parent_span_id == collector.spans[f"POST {CHAT}"].span_id
    assert collector.spans["upstream"].status.code == Status.STATUS_CODE_UNSET


async def test_an_endpoint_with_the_path_is_taken_as_it_is(collector: Collector) -> None:
    made = tracing(f"{collector.url}/v1/traces/", ROUTES)
    with made.request([], "GET", ROUTES[2]):
        pass
    await made.aclose()
    assert collector.paths == ["/v1/traces"]


async def test_a_collector_that_is_not_there_delays_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmguard.gateway.otlp.SEND_SECONDS", 0.2)
    server = Collector()
    server.server.server_close()  # nobody listens there now
    made = OtlpTracing(server.url, ROUTES)
    begun = time.perf_counter()
    for _ in range(100):
        with made.request([], "POST", CHAT), made.span("guard"):
            pass
    assert time.perf_counter() - begun < 1
    await made.aclose()
    assert time.perf_counter() - begun < 3


async def test_without_an_endpoint_nothing_is_made_and_the_callers_trace_goes_on() -> None:
    off = tracing(None, ROUTES)
    assert isinstance(off, NoTracing)
    headers = [(b"host", b"x"), TRACEPARENT, TRACESTATE]
    with off.request(headers, "POST", CHAT, stream=True) as request, off.span("upstream") as upstream:
        request.set(status=200)
        assert upstream.onward(headers) == [TRACEPARENT, TRACESTATE]
    await off.aclose()


def test_an_absent_opentelemetry_is_an_error_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "vlmguard.gateway.otlp")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"vlmguard-r1\[tracing\]"):
        tracing("http://127.0.0.1:4318", ROUTES)
