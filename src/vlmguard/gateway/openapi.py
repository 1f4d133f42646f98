"""What the gateway serves, as OpenAPI 3.1 for people and generators of clients; [server] docs puts it at /openapi.json.

The requests are as open as the code: fields that aren't named go on to the target, and what no guard can read is a 400.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from vlmguard.commands.doctor import version
from vlmguard.gateway.sections import GUARDRAILS, MODELS
from vlmguard.gateway.wire import responses
from vlmguard.gateway.wire.messages import ROLES
from vlmguard.parts import IMAGE_TYPES, TEXT_TYPES

if TYPE_CHECKING:
    from vlmguard.gateway.config import Settings

Schema: TypeAlias = dict[str, Any]

PATH: Final = "/openapi.json"
WHY: Final[Mapping[str, str]] = {
    "400": "The request can't be read, or holds what no guard can read. The message says what, and what to do.",
    "401": "The gateway doesn't know the key.",
    "403": "The key may not call this route.",
    "408": "The body took too long to arrive.",
    "413": "The body, or a picture in it, is too large.",
    "415": "The body isn't called JSON, or it is compressed.",
    "429": "Too many requests; Retry-After says how long to wait.",
    "500": "A fault or a wrong setting of the gateway; its log has more under the x-request-id.",
    "502": "The target failed, or refused the gateway's own key.",
    "503": "The audit log can't be written, so nothing is answered.",
    "504": "The target, or the whole request, took too long.",
}
OF_A_BODY: Final = ("400", "408", "413", "415")


def document(settings: Settings) -> Schema:
    """The description of a gateway with these settings."""
    rails = dict(zip(GUARDRAILS, _guardrails(), strict=True)) if settings.routes.guardrails else {}
    guarded = {
        "/v1/chat/completions": _guarded("OpenAI's chat completions", "Chat", "ChatAnswer", "Error"),
        "/v1/responses": _guarded(
            "OpenAI's responses; nothing stored can be named", "Responses", "ResponsesAnswer", "Error"
        ),
        "/v1/messages": _guarded("Anthropic's messages", "Messages", "MessagesAnswer", "AnthropicError"),
    }
    models = _operation("The target's models, and what they take and give", "ModelList", "Error")
    api = {**{path: {"post": told} for path, told in {**guarded, **rails}.items()}, MODELS: {"get": models}}
    for item in api.values():
        for told in item.values():
            _fit(told, settings)
    return {
        "openapi": "3.1.0",
        "info": {"title": "VLMGuard", "version": version(), "summary": "A guard in front of a vision-language model"},
        "paths": {**api, **_operators(settings)},
        "components": {"schemas": SCHEMAS, "headers": HEADERS, "securitySchemes": KEYS},
    }


def _fit(told: Schema, settings: Settings) -> None:
    """Keys where there are some; a target that is a server has answers of its own."""
    told["security"] = [{name: []} for name in KEYS] if settings.keys else []
    if settings.target.url is not None:
        told["responses"]["default"] = {"description": "The target's own answer, as it came."}


def _guarded(summary: str, asked: str, answered: str, error: str) -> Schema:
    told = _operation(summary, answered, error, asked)
    told["responses"]["200"]["content"]["text/event-stream"] = {"schema": _ref("Event")}
    return told


def _guardrails() -> tuple[Schema, ...]:
    return (
        _operation("The verdict and the rewritten request, without the target", "Verdict", "Error", "Chat"),
        _operation("LiteLLM's generic guardrail", "LiteLLMAnswer", "Error", "LiteLLM"),
        _operation("A webhook: allow, block or modify", "WebhookAnswer", "Error", "Webhook"),
    )


def _operation(summary: str, answered: str, error: str, asked: str | None = None) -> Schema:
    statuses = [status for status in WHY if asked or status not in OF_A_BODY]
    errors = {status: _response(WHY[status], error) for status in statuses}
    errors["429"]["headers"]["retry-after"] = {"schema": {"type": "string"}}
    told: Schema = {"summary": summary, "responses": {"200": _response("The answer.", answered), **errors}}
    if asked:
        told["requestBody"] = {"required": True, "content": _json(asked)}
    return told


def _operators(settings: Settings) -> Schema:
    """For who runs the gateway; no key is asked for."""
    text = {"text/plain": {"schema": {"type": "string"}}}
    live, waits = (
        {"description": "It runs."},
        {"description": "It waits for what it names.", "content": _json("Health")},
    )
    told = {
        "/health/live": {"200": {**live, "content": _json("Health")}},
        "/health/ready": {"200": {"description": "It can serve.", "content": _json("Health")}, "503": waits},
    }
    if settings.server.docs:
        told[PATH] = {"200": {"description": "This.", "content": {"application/json": {"schema": {"type": "object"}}}}}
    if settings.telemetry.metrics:
        told["/metrics"] = {"200": {"description": "For Prometheus.", "content": text}}
    return {path: {"get": {"responses": responses, "security": []}} for path, responses in told.items()}


def _response(description: str, schema: str) -> Schema:
    headers = {name: {"$ref": f"#/components/headers/{name}"} for name in HEADERS}
    return {"description": description, "headers": headers, "content": _json(schema)}


def _json(schema: str) -> Schema:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(*required: str, **properties: Any) -> Schema:
    return {"type": "object", "required": list(required), "properties": properties}


def _list(items: Schema, least: int = 0) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, {"type": "null"}]}


STRING: Final[Schema] = {"type": "string"}
NUMBER: Final[Schema] = {"type": "number"}
WHOLE: Final[Schema] = {"type": "integer"}
URL: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "examples": [
        "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
    ],
}
CONTENT: Final = _or_null(STRING, _list({"anyOf": [STRING, _ref("TextPart"), _ref("ImagePart"), _ref("OtherPart")]}))
ROLE: Final[Schema] = {"type": "string", "minLength": 1}
ASKED: Final[Schema] = {"model": STRING, "stream": {"type": ["boolean", "null"]}}
MESSAGES: Final = _list(_ref("Message"), 1)

KEYS: Final[Schema] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
HEADERS: Final[Schema] = {
    "x-request-id": {"required": True, "schema": STRING, "description": "The caller's own, or a new one."},
    "x-vlmguard-action": {"schema": {"enum": ["passed", "rewrote", "refused", "flagged", "error"]}},
    "x-vlmguard-risk": {"schema": {"type": "string", "pattern": r"^[01]\.\d+$"}},
    "x-vlmguard-policy": {"schema": {"enum": ["off", "shadow", "rewrite", "block"]}},
    "x-vlmguard-latency-ms": {"schema": STRING},
}
SCHEMAS: Final[Mapping[str, Schema]] = {
    "Chat": _object("messages", messages=MESSAGES, **ASKED),
    "Messages": _object(
        "messages",
        messages=_list({"allOf": [_ref("Message"), _object("role", role={"enum": list(ROLES)})]}, 1),
        system=CONTENT,
        **ASKED,
    ),
    "Responses": _object(
        "input", input={"anyOf": [STRING, _list(_ref("Item"), 1)]}, instructions=_or_null(STRING), **ASKED
    ),
    "Message": _object("role", role=ROLE, content=CONTENT),
    "Item": {
        "anyOf": [
            _object("role", type={"enum": ["message", None]}, role=ROLE, content=CONTENT),
            _object("type", type={"enum": list(responses.OF_TOOLS)}, output={"anyOf": [CONTENT, _ref("ImagePart")]}),
            _object("type", type={"enum": list(responses.OF_MODELS)}),
        ]
    },
    "TextPart": _object("text", type={"enum": [*TEXT_TYPES, "", None]}, text=STRING),
    "ImagePart": {
        "anyOf": [
            _object(
                "image_url",
                type={"enum": [*IMAGE_TYPES, "", None]},
                image_url={"anyOf": [URL, _object("url", url=URL)]},
            ),
            _object("type", "source", type={"const": "image"}, source=_ref("ImageSource")),
        ]
    },
    "ImageSource": {"anyOf": [_object("data", data=URL, media_type=STRING), _object("url", url=URL)]},
    "OtherPart": {
        "description": "A tool's result, or in an assistant's turn what a model wrote: a call, a thought, a refusal.",
        "type": "object",
        "required": ["type"],
        "properties": {"type": {"type": "string"}, "content": CONTENT},
    },
    "LiteLLM": _object(
        **{name: _or_null(_list(STRING)) for name in ("texts", "images")},
        structured_messages=_or_null(MESSAGES),
        input_type={"enum": ["request", "response"]},
        tool_calls=_or_null(_list({"type": "object"})),
    ),
    "Webhook": {
        "anyOf": [
            _object("messages", messages=MESSAGES),
            _object("text", text={"type": "string", "minLength": 1}, images=_or_null(_list(URL))),
            _object("images", text=_or_null(STRING), images=_list(URL, 1)),
        ]
    },
    "ChatAnswer": _object("id", "model", "choices", id=STRING, model=STRING, choices=_list({"type": "object"})),
    "ResponsesAnswer": _object("id", "status", "output", id=STRING, status=STRING, output=_list({"type": "object"})),
    "MessagesAnswer": _object(
        "id",
        "type",
        "role",
        "content",
        id=STRING,
        type={"const": "message"},
        role=STRING,
        content=_list({"type": "object"}),
    ),
    "ModelList": _object("object", "data", object={"const": "list"}, data=_list(_object("id", id=STRING))),
    "Verdict": _object(
        *("request_id", "action", "risk", "threshold", "category", "analysis", "prompt", "original"),
        request_id=STRING,
        action={"enum": ["passed", "rewrote", "refused", "flagged"]},
        risk=_or_null(NUMBER),
        threshold=_or_null(NUMBER),
        category=_or_null(STRING),
        analysis=_or_null({"type": "object"}),
        prompt=_or_null(STRING),
        original=STRING,
        messages=MESSAGES,
        note=STRING,
    ),
    "LiteLLMAnswer": _object(
        "action",
        action={"enum": ["NONE", "BLOCKED", "GUARDRAIL_INTERVENED"]},
        blocked_reason=STRING,
        texts=_list(STRING),
        images=_list(STRING),
        structured_messages=MESSAGES,
    ),
    "WebhookAnswer": _object(
        *("request_id", "action", "risk", "category"),
        request_id=STRING,
        action={"enum": ["allow", "block", "modify"]},
        risk=_or_null(NUMBER),
        category=_or_null(STRING),
        reason=STRING,
        text=STRING,
        images=_list(STRING),
        messages=MESSAGES,
    ),
    "Error": _object(
        "error",
        error=_object("message", "type", message=STRING, type=STRING, param=_or_null(STRING), code={"type": "null"}),
    ),
    "AnthropicError": _object(
        *("type", "error"),
        type={"const": "error"},
        error=_object("type", "message", type=STRING, message=STRING),
    ),
    "Event": _object("data", event=STRING, data=STRING),
    "Health": _object("status", status={"enum": ["live", "ready", "waits"]}, **{"for": STRING}),
}
