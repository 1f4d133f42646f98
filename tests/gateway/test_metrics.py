import asyncio
import timeit
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from tests.gateway.ended import ROUTES, Request, series
from vlmguard.chat import Step
from vlmguard.gateway.metrics import Load, Metrics, exposition, failure_in


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return series(metrics.exposition()[0]).get((f"vlmguard_{name}", frozenset(labels.items())))


def test_a_request_is_counted_by_route_action_and_class_of_status() -> None:
    metrics = Metrics(ROUTES)
    for status in (200, 204, 404, 502):
        metrics.observe(Request(status=status))
    metrics.observe(Request(ROUTES[1], "refused"))
    labels = {"route": ROUTES[0], "action": "passed"}
    assert value(metrics, "requests_total", **labels, status_class="2xx") == 2
    assert value(metrics, "requests_total", **labels, status_class="4xx") == 1
    assert value(metrics, "requests_total", **labels, status_class="5xx") == 1
    assert value(metrics, "requests_total", route=ROUTES[1], action="refused", status_class="2xx") == 1


def test_times_go_into_histograms_and_what_did_not_happen_into_none() -> None:
    metrics = Metrics(ROUTES)
    metrics.observe(Request(guard_seconds=0.03, upstream_first_byte_seconds=0.4, seconds=2.0))
    metrics.observe(Request(seconds=0.001))
    assert value(metrics, "guard_seconds_count", action="passed") == 1
    assert value(metrics, "guard_seconds_bucket", action="passed", le="0.025") == 0
    assert value(metrics, "guard_seconds_bucket", action="passed", le="0.05") == 1
    assert value(metrics, "upstream_first_byte_seconds_sum") == pytest.approx(0.4)
    assert value(metrics, "upstream_first_byte_seconds_count") == 1
    assert value(metrics, "request_seconds_count") == 2
    assert value(metrics, "request_seconds_sum") == pytest.approx(2.001)


def test_pictures_and_failures_of_the_guard_are_counted() -> None:
    metrics = Metrics(ROUTES)
    metrics.observe(Request(pictures=3))
    metrics.observe(Request(pictures=1, step=Step("g", "rewrote", note="static wrapper; Upstream: said: MARKER")))
    metrics.observe(Request(step=Step("g", "passed", note="policy: off")))
    assert value(metrics, "images_total") == 4
    assert value(metrics, "rewriter_failures_total", kind="Upstream") == 1
    assert b"MARKER" not in metrics.exposition()[0]
    assert b'kind="other"' not in metrics.exposition()[0]


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        ("Timeout: the rewriter did not answer in 20 s", "Timeout"),
        ("static wrapper; RewriteUnreadable: too long; Upstream: no", "RewriteUnreadable"),
        ("MyError: MARKER", "other"),
        ("MARKER", "other"),
        ("policy: off", None),
        ("", None),
    ],
)
def test_a_note_tells_the_kind_of_failure(note: str, kind: str | None) -> None:
    assert failure_in(note) == kind


def test_gauges_are_as_things_stand_when_they_are_read() -> None:
    now = Load()
    metrics = Metrics(ROUTES, lambda: now)
    now = Load(in_flight=7, waiting=3, breaker_open=True, audit_waiting=11)
    names = ("in_flight", "waiting", "breaker_open", "audit_log_waiting")
    assert [value(metrics, name) for name in names] == [7, 3, 1, 11]
    now = Load()
    assert [value(metrics, name) for name in names] == [0, 0, 0, 0]


def test_a_thousand_odd_requests_add_no_series() -> None:
    metrics = Metrics(ROUTES)

    def odd(number: int) -> Request:
        note = f"MARKER{number}: MARKER"
        return Request(
            f"/MARKER/{number}", f"MARKER{number}", 600 + 100 * number, Step("g", "passed", note=note), 0.1, 0.2, 0.3, 1
        )

    metrics.observe(odd(0))
    before = series(metrics.exposition()[0])
    for number in range(1, 1001):
        metrics.observe(odd(number))
    text = metrics.exposition()[0]
    assert series(text).keys() == before.keys()
    assert b"MARKER" not in text
    assert value(metrics, "requests_total", route="other", action="other", status_class="other") == 1001
    assert value(metrics, "rewriter_failures_total", kind="other") == 1001


def test_odd_requests_are_not_kept_in_memory_either() -> None:
    metrics = Metrics(ROUTES)
    for number in range(1000):
        metrics.observe(Request(f"/MARKER/{number}", f"MARKER{number}", guard_seconds=0.1))
    metrics.observe(Request(guard_seconds=0.1))
    assert len(metrics._counted) == len(metrics._guarded) == 1


def test_two_gateways_in_one_process_count_each_for_itself() -> None:
    one, other = Metrics(ROUTES), Metrics(ROUTES)
    one.observe(Request(pictures=1))
    assert (value(one, "images_total"), value(other, "images_total")) == (1, 0)


def test_the_exposition_tells_its_content_type() -> None:
    content, kind = exposition(CollectorRegistry())
    assert (content, kind.partition(";")[0]) == (b"", "text/plain")


def test_a_request_costs_microseconds() -> None:
    """Measured: 4 us, and 11 to 17 us into the files of several workers. The bound here is for a busy machine."""
    metrics, request = Metrics(ROUTES), Request(guard_seconds=0.03, upstream_first_byte_seconds=0.4, pictures=1)
    metrics.observe(request)
    assert min(timeit.repeat(lambda: metrics.observe(request), number=1000, repeat=5)) / 1000 < 100e-6


async def test_one_process_needs_no_refreshing_but_several_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asyncio.Queue[None]()

    def load() -> Load:
        asked.put_nowait(None)
        return Load()

    metrics = Metrics(ROUTES, load)
    await metrics.keep_fresh()
    assert asked.empty()
    monkeypatch.setattr(metrics, "_folder", tmp_path)
    task = asyncio.create_task(metrics.keep_fresh(0.001))
    for _ in range(3):
        await asyncio.wait_for(asked.get(), 5)
    task.cancel()
