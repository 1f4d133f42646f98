"""What the gateway tells of itself: metrics for Prometheus, spans for OpenTelemetry, and logs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmguard.gateway.logs import configure_logs, for_request
from vlmguard.gateway.metrics import Ended, Load, Metrics
from vlmguard.gateway.tracing import Tracing, tracing
from vlmguard.gateway.workers import prepare_workers

if TYPE_CHECKING:
    from vlmguard.gateway.sections import Telemetry as Section

__all__ = ["Ended", "Load", "Metrics", "Telemetry", "Tracing", "configure_logs", "for_request", "prepare_workers"]


@dataclass(frozen=True)
class Telemetry:
    """
    Args:
        metrics: None where they are off.
    """

    metrics: Metrics | None
    tracing: Tracing

    @classmethod
    def of(
        cls, told: Section, routes: Collection[str], load: Callable[[], Load] = Load, version: str = ""
    ) -> Telemetry:
        """As the settings say. Raises ConfigError."""
        return cls(Metrics(routes, load) if told.metrics else None, tracing(told.otlp_endpoint, routes, version))

    def observe(self, ended: Ended) -> None:
        """Counts a request at its end."""
        if self.metrics is not None:
            self.metrics.observe(ended)

    async def exposition(self) -> tuple[bytes, str]:
        """The metrics in Prometheus's format, and its content type."""
        assert self.metrics is not None  # there is no route to here otherwise
        return await asyncio.to_thread(self.metrics.exposition)

    async def keep_fresh(self) -> None:
        """A task for as long as the gateway runs: see Metrics.keep_fresh."""
        if self.metrics is not None:
            await self.metrics.keep_fresh()

    async def aclose(self) -> None:
        await self.tracing.aclose()
