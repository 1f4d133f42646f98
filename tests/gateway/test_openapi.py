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
from starlette.routing import Route

from tests import stand_ins
from tests.gateway.running import running
from vlmguard.gateway.app import build
from vlmguard.gateway.config import Settings
from vlmguard.gateway.guardrails import LITELLM
from vlmguard.gateway.openapi import KEYS, PATH, document

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


async def test_what_is_described_is_what_is_served(rewriter: stand_ins.Rewriter) -> None:
    async with running("packaged:assistant", server={"docs": True}) as gateway:
        told = document(gateway.gateway.settings)
        served = {route.path for route in build(gateway.gateway).routes if isinstance(route, Route)}
        assert served == told["paths"].keys()
        got = await gateway.ask(PATH, method="GET")
        assert (got.status, got.json) == (200, told)
    async with running("packaged:assistant") as gateway:
        got = await gateway.ask(PATH, method="GET")
        assert got.status == 404


@pytest.mark.parametrize(
    ("section", "gone"),
    [
        ({"routes": {"guardrails": False}}, {"/v1/guard", "/v1/webhook", LITELLM}),
        ({"telemetry": {"metrics": False}}, {"/metrics"}),
    ],
)
def test_what_is_not_served_is_not_described(section: dict[str, Any], gone: set[str]) -> None:
    told = document(Settings.model_validate(section))["paths"]
    assert document(Settings())["paths"].keys() - told.keys() == gone


def test_keys_and_a_targets_own_answers_are_described_where_there_are_some() -> None:
    key = {"id": "a", "sha256": "0" * 64}
    told = document(Settings.model_validate({"keys": [key], "target": {"url": "http://127.0.0.1:1/v1"}}))
    chat, plain = (one["paths"]["/v1/chat/completions"]["post"] for one in (told, document(Settings())))
    assert chat["security"] == [{name: []} for name in KEYS]
    assert plain["security"] == []
    assert "default" in chat["responses"]
    assert "default" not in plain["responses"]
    assert told["paths"]["/health/live"]["get"]["security"] == []
