"""The gateway as an ASGI application: which path goes where.

A path that is not named here is refused: nothing is passed on unguarded that the operator did not allow by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from vlmguard.gateway import openapi
from vlmguard.gateway.exchange import Exchange, Handle
from vlmguard.gateway.gateway import Gateway
from vlmguard.gateway.guarded import guarded
from vlmguard.gateway.guarding import Screening
from vlmguard.gateway.guardrails import GUARDRAILS, guardrail
from vlmguard.gateway.plain import models, unguarded
from vlmguard.gateway.sections import MODELS
from vlmguard.gateway.web import Shape
from vlmguard.gateway.wire import CHAT, WIRES
from vlmguard.gateway.wire.problem import Problem

EVERY_METHOD: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")


class Endpoint:
    """One route as an ASGI application."""

    def __init__(self, gateway: Gateway, shape: Shape, handle: Handle) -> None:
        self.gateway, self.shape, self.handle = gateway, shape, handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await Exchange(self.gateway, self.shape, self.handle, scope, receive, send).run()


def build(gateway: Gateway) -> Starlette:
    """The application of an open gateway."""

    told = gateway.settings

    async def live(request: Request) -> Response:
        return _json(200, {"status": "live"})

    async def ready(request: Request) -> Response:
        waits = gateway.not_ready()
        return _json(503 if waits else 200, {"status": "waits", "for": waits} if waits else {"status": "ready"})

    async def metrics(request: Request) -> Response:
        content, kind = await gateway.telemetry.exposition()
        return Response(content, headers={"content-type": kind})

    async def described(request: Request) -> Response:
        return _json(200, openapi.document(told))

    app = Starlette(
        routes=[
            *(_post(wire.path, Endpoint(gateway, wire, guarded(wire))) for wire in WIRES),
            *_guardrails(gateway),
            Route(MODELS, Endpoint(gateway, CHAT, models), methods=["GET"]),
            *(Route(path, Endpoint(gateway, CHAT, unguarded), methods=EVERY_METHOD) for path in told.routes.allow),
            Route("/health/live", live),
            Route("/health/ready", ready),
            *([Route("/metrics", metrics)] if told.telemetry.metrics else []),
            *([Route(openapi.PATH, described)] if told.server.docs else []),
        ],
        exception_handlers={404: _refused, 405: _refused},
    )
    app.router.redirect_slashes = False
    return app


async def _refused(request: Request, error: Exception) -> Response:
    """A path that is not served, or a method that it does not know; in the shape of the API whose path is the nearest."""
    shape = next((wire for wire in WIRES if request.url.path.startswith(wire.path)), CHAT)
    if getattr(error, "status_code", 404) == 405:
        headers = getattr(error, "headers", None)
        problem = Problem(405, f"{request.method} is not served here")
        return _json(405, shape.error(problem), headers)
    text = (
        "the path is not served: the gateway guards what it knows and passes nothing else on. Its operator can name it"
    )
    return _json(404, shape.error(Problem(404, text)))


def _guardrails(gateway: Gateway) -> list[Route]:
    """Without the target; a guard that has to see its answers has none."""
    if not gateway.settings.routes.guardrails or not isinstance(gateway.guards["rewrite"], Screening):
        return []
    return [_post(path, Endpoint(gateway, CHAT, guardrail(rail))) for path, rail in GUARDRAILS.items()]


def _post(path: str, endpoint: Endpoint) -> Route:
    return Route(path, endpoint, methods=["POST"])


def _json(status: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")
