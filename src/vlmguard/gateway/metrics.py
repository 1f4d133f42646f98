"""What Prometheus is told of the gateway.

Each label has a bounded set of values. What a caller writes (a path, a model's name, a key) becomes none: a value that
is not known beforehand counts as "other".

Several workers show their numbers together: see workers.py. prometheus_client chooses how to keep numbers when it is
imported, so this module imports it only when the metrics are made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol, get_args

from vlmguard.chat import Step
from vlmguard.gateway.audit_record import Action
from vlmguard.gateway.workers import forget_the_dead, shared_folder

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OTHER: Final = "other"
ACTIONS: Final = frozenset(get_args(Action))
STATUS_CLASSES: Final = frozenset(range(1, 6))
FAILURES: Final = frozenset(
    (
        *("Timeout", "RateLimited", "AuthenticationFailed", "Upstream", "BadAnswer", "ContextTooLong"),
        *("RewriteUnreadable", "ConfigError", "ModelError"),
    )
)
GUARD_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
ANSWER_SECONDS: Final = (0.0025, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)


class Load(NamedTuple):
    """How the process stands at a moment.

    Args:
        in_flight: requests being worked on; `waiting` are those in the queue.
        audit_waiting: records that are not yet durable.
    """

    in_flight: int = 0
    waiting: int = 0
    breaker_open: bool = False
    audit_waiting: int = 0


class Ended(Protocol):
    """What is known of a request at its end.

    Args:
        upstream_first_byte_seconds: from asking the target to the first byte of its answer.
        seconds: since the request came.
    """

    @property
    def route(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def status(self) -> int: ...
    @property
    def step(self) -> Step | None: ...
    @property
    def guard_seconds(self) -> float | None: ...
    @property
    def upstream_first_byte_seconds(self) -> float | None: ...
    @property
    def seconds(self) -> float: ...
    @property
    def pictures(self) -> int: ...


class Metrics:
    """
    Args:
        routes: the paths that are served: the values of the label `route`.
        load: asked when the gauges are read.
    """

    def __init__(self, routes: Collection[str], load: Callable[[], Load] = Load) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self._routes, self._load = frozenset(routes), load
        self.registry = CollectorRegistry()
        self._folder = shared_folder(self.registry)
        own = None if self._folder else self.registry  # the files hold this process's numbers too

        def gauge(name: str, told: str) -> Gauge:
            return Gauge(f"vlmguard_{name}", told, registry=own, multiprocess_mode="livesum")

        def histogram(name: str, told: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"vlmguard_{name}", told, labels, registry=own, buckets=buckets)

        def counter(name: str, told: str, *labels: str) -> Counter:
            return Counter(f"vlmguard_{name}", told, labels, registry=own)

        self._requests = counter("requests_total", "Requests answered", "route", "action", "status_class")
        self._failures = counter("rewriter_failures_total", "Requests on which the guard failed, by error", "kind")
        self._images = counter("images_total", "Pictures in guarded requests")
        self._guard = histogram("guard_seconds", "Time of the guard", GUARD_SECONDS, "action")
        self._first_byte = histogram(
            "upstream_first_byte_seconds", "From asking the target to the first byte of its answer", ANSWER_SECONDS
        )
        self._whole = histogram("request_seconds", "From a request's coming to its end", ANSWER_SECONDS)
        self._in_flight = gauge("in_flight", "Requests being worked on")
        self._waiting = gauge("waiting", "Requests in the queue")
        self._breaker = gauge("breaker_open", "Workers whose circuit to the rewriter is open")
        self._audit = gauge("audit_log_waiting", "Records on their way into the audit log")
        self._counted: dict[tuple[str, str, int], Counter] = {}
        self._guarded: dict[str, Histogram] = {}

    def observe(self, ended: Ended) -> None:
        """Counts a request at its end."""
        key = (ended.route, ended.action, ended.status // 100)
        (self._counted.get(key) or self._count_of(*key)).inc()
        self._whole.observe(ended.seconds)
        if ended.guard_seconds is not None:
            (self._guarded.get(ended.action) or self._guard_of(ended.action)).observe(ended.guard_seconds)
        if ended.upstream_first_byte_seconds is not None:
            self._first_byte.observe(ended.upstream_first_byte_seconds)
        if ended.pictures:
            self._images.inc(ended.pictures)
        if ended.step is not None and ended.step.note is not None:
            kind = failure_in(ended.step.note)
            if kind is not None:
                self._failures.labels(kind).inc()

    def refresh(self) -> None:
        """Sets the gauges to how this process stands now."""
        load = self._load()
        self._in_flight.set(load.in_flight)
        self._waiting.set(load.waiting)
        self._breaker.set(load.breaker_open)
        self._audit.set(load.audit_waiting)

    async def keep_fresh(self, seconds: float = 1.0) -> None:
        """Refreshes for ever where other workers may be scraped for this one; else the scrape itself does."""
        while self._folder is not None:
            self.refresh()
            await asyncio.sleep(seconds)

    def exposition(self) -> tuple[bytes, str]:
        """The numbers of all workers and the content type. It reads files: some milliseconds, not for the event loop."""
        self.refresh()
        if self._folder is not None:
            forget_the_dead(self._folder)
        return exposition(self.registry)

    def _count_of(self, route: str, action: str, hundreds: int) -> Counter:
        known = route in self._routes, action in ACTIONS, hundreds in STATUS_CLASSES
        label = f"{hundreds}xx" if known[2] else OTHER
        child = self._requests.labels(bounded(route, self._routes), bounded(action, ACTIONS), label)
        if all(known):  # so that what is kept is bounded as well
            self._counted[route, action, hundreds] = child
        return child

    def _guard_of(self, action: str) -> Histogram:
        child = self._guard.labels(bounded(action, ACTIONS))
        if action in ACTIONS:
            self._guarded[action] = child
        return child


def exposition(registry: CollectorRegistry) -> tuple[bytes, str]:
    """The registry in Prometheus's text format, and the content type of that."""
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

    return generate_latest(registry), CONTENT_TYPE_LATEST


def bounded(value: str, known: Collection[str]) -> str:
    return value if value in known else OTHER


def failure_in(note: str) -> str | None:
    """The kind of failure that a guard's note tells of ("Timeout: ...", "static wrapper; Upstream: ..."), if any."""
    kind = note.partition(":")[0].rpartition("; ")[2]
    return bounded(kind, FAILURES) if kind[:1].isupper() else None
