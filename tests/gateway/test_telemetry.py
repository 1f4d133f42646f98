import subprocess
import sys

import pytest

from tests.gateway.ended import ROUTES, Request
from vlmguard.gateway.sections import Telemetry as Section
from vlmguard.gateway.telemetry import Load, Telemetry
from vlmguard.gateway.tracing import NoTracing


async def test_by_default_there_are_metrics_and_no_tracing() -> None:
    telemetry = Telemetry.of(Section(), ROUTES, lambda: Load(waiting=4))
    telemetry.observe(Request(pictures=2))
    content, kind = await telemetry.exposition()
    assert b"vlmguard_images_total 2.0" in content
    assert b"vlmguard_waiting 4.0" in content
    assert kind.startswith("text/plain")
    assert isinstance(telemetry.tracing, NoTracing)
    await telemetry.keep_fresh()
    await telemetry.aclose()


async def test_without_metrics_nothing_is_counted() -> None:
    telemetry = Telemetry.of(Section(metrics=False), ROUTES)
    telemetry.observe(Request())
    await telemetry.keep_fresh()
    assert telemetry.metrics is None


async def test_an_endpoint_turns_tracing_on() -> None:
    telemetry = Telemetry.of(Section(otlp_endpoint="http://127.0.0.1:4318"), ROUTES)
    assert not isinstance(telemetry.tracing, NoTracing)
    await telemetry.aclose()


@pytest.mark.parametrize("module", ["opentelemetry", "prometheus_client", "torch"])
def test_what_is_off_is_not_imported(module: str) -> None:
    script = (
        "import sys; from vlmguard.gateway.sections import Telemetry as Section;"
        "from vlmguard.gateway.telemetry import Telemetry, configure_logs;"
        f"Telemetry.of(Section(metrics=False), ()); sys.exit({module!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
