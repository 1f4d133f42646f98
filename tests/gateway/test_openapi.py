"""The description at /openapi.json, held against the running gateway by requests that schemathesis makes from it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import Case, CheckFunction, GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi import checks

from tests import stand_ins
from tests.gateway.running import running
from vlmguard.gateway.config import Settings
from vlmguard.gateway.guardrails import LITELLM
from vlmguard.gateway.openapi import document

DOCS = Settings.model_validate({"server": {"docs": True}})
DESCRIBED = schemathesis.openapi.from_dict(document(Settings()))
OPERATIONS = {it.label: it for it in (told.ok() for told in DESCRIBED.get_all_operations() if isinstance(told, Ok))}
POSTED = [label for label in OPERATIONS if label.startswith("POST")]
CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
FEW, MANY = 30, 340  # requests for each of the six routes: 2,040 with MANY


@pytest.fixture(scope="module")
def root() -> Iterator[str]:
    """The address of a gateway that runs in a thread: a scripted rewriter, a scripted target in its own process."""
    patch, started, told = pytest.MonkeyPatch(), threading.Event(), dict[str, Any]()
    stand_ins.install(patch)

    async def serve() -> None:
        try:
            async with running("packaged:assistant") as gateway:
                told.update(root=gateway.root, loop=asyncio.get_running_loop(), end=(end := asyncio.Event()))
                started.set()
                await end.wait()
        finally:
            started.set()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    started.wait()
    yield told["root"]
    told["loop"].call_soon_threadsafe(told["end"].set)
    thread.join()
    patch.undo()


def hold(label: str, root: str, count: int) -> None:
    """Asks the route with requests that fit its description, and with some that do not."""
    operation = OPERATIONS[label]
    cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode))
    # what LiteLLM's guardrail can't read it blocks, with 200
    checked = CHECKS if LITELLM in label else [*CHECKS, checks.negative_data_rejection]
    with requests.Session() as session:

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(cases)
        def asked(case: Case[Any]) -> None:
            case.call_and_validate(root, session, checks=checked)

        asked()


@pytest.mark.parametrize("label", OPERATIONS)
def test_the_gateway_answers_as_described(label: str, root: str) -> None:
    hold(label, root, FEW if label in POSTED else 1)


@pytest.mark.slow
@pytest.mark.parametrize("label", POSTED)
def test_the_gateway_answers_many_requests_as_described(label: str, root: str) -> None:
    hold(label, root, MANY)
