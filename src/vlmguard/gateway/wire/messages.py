"""Anthropic's /v1/messages.

A chat's messages keep Anthropic's own blocks, which `vlmguard.parts` reads; `system` becomes a system message in front.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection
from typing import Any, Final

from vlmguard.chat import Chat, Message, Response, Usage
from vlmguard.gateway.wire.problem import Problem
from vlmguard.gateway.wire.protocol import (
    FINISHED_FOR_LENGTH,
    Conversation,
    added,
    as_it_came,
    changes,
    event,
    fields_of,
    listed,
    model_in,
    stream_in,
    without,
)
from vlmguard.gateway.wire.reading import BESIDE_MESSAGES, read_content, read_message, refuse_beside, refuse_inside
from vlmguard.images import open_url, to_data_uri
from vlmguard.strict_json import unexpected

OF_MODELS: Final = ("thinking", "redacted_thinking", "tool_use", "server_tool_use")
ROLES: Final = ("user", "assistant", "system")
KINDS: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Messages:
    path = "/v1/messages"
    ending = b""
    final = (b"message_stop",)

    def read(self, body: Any) -> Conversation:
        fields = fields_of(body)
        refuse_beside(fields, BESIDE_MESSAGES, '"messages"')
        refuse_inside(fields, '"messages"')
        turns = [_turn(turn, f"messages[{at}]") for at, turn in enumerate(listed(fields, "messages", "message"))]
        system, stops = fields.get("system"), fields.get("stop_sequences")
        first = read_content({"role": "system", "content": system}, "system", system, "system", ())
        front = [first] if system else []
        extra = without(fields, "messages", "system", "stop_sequences")
        chat = Chat((*front, *turns), {**extra, "stop": stops} if stops else extra)
        places = (*(None for _ in front), *range(len(turns)))
        return Conversation(chat, model_in(fields), stream_in(fields), fields, places)

    def write(self, asked: Conversation, chat: Chat) -> dict[str, Any]:
        written, messages = dict(asked.body), list(asked.body["messages"])
        for place, new, old in changes(asked, chat):
            content = _content(new, as_it_came(old))
            if place is None:
                written["system"] = content
            else:
                messages[place] = {**messages[place], "content": content}
        messages += ({"role": new.role, "content": _content(new)} for new in added(asked, chat))
        return {**written, "messages": messages}

    def answer(self, said: Response, asked: Conversation, request_id: str, created: int) -> dict[str, Any]:
        return {
            **_head(asked, request_id),
            "content": [{"type": "text", "text": said.text}],
            "stop_reason": _reason(said),
            "stop_sequence": None,
            "usage": _usage(said.usage),
        }

    async def stream(
        self, pieces: AsyncIterator[str | Response], asked: Conversation, request_id: str, created: int
    ) -> AsyncGenerator[bytes, None]:
        def told(kind: str, **fields: Any) -> bytes:
            return event({"type": kind, **fields}, kind)

        head = {**_head(asked, request_id), "content": [], "stop_reason": None, "stop_sequence": None}
        yield told("message_start", message={**head, "usage": _usage(Usage())})
        yield told("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async for piece in pieces:
            if isinstance(piece, str):
                yield told("content_block_delta", index=0, delta={"type": "text_delta", "text": piece})
                continue
            yield told("content_block_stop", index=0)
            delta = {"stop_reason": _reason(piece), "stop_sequence": None}
            yield told("message_delta", delta=delta, usage=_usage(piece.usage))
        yield told("message_stop")

    def error(self, problem: Problem) -> dict[str, Any]:
        default = "invalid_request_error" if problem.status < 500 else "api_error"
        return {"type": "error", "error": {"type": KINDS.get(problem.status, default), "message": problem.message}}

    def error_event(self, problem: Problem) -> bytes:
        return event(self.error(problem), "error")


def _turn(raw: Any, where: str) -> Message:
    message = read_message(raw, where, OF_MODELS)
    if message.role not in ROLES:
        raise unexpected(f"one of {', '.join(ROLES)}", message.role, f"{where}.role")
    return message


def _content(turn: Message, kept: Collection[int] = ()) -> Any:
    """Its content; `kept` are the parts that stay as they came."""
    content = turn.raw.get("content")
    return [_block(raw, kept) for raw in content] if isinstance(content, list) else content


def _block(raw: Any, kept: Collection[int]) -> Any:
    """A part as Anthropic spells it: a picture that the guard made or changed is spelled as OpenAI's."""
    if isinstance(raw, str) or id(raw) in kept:
        return raw
    if isinstance(inner := raw.get("content"), list):
        was_text = len(inner) == 1 and isinstance(inner[0], str)  # of a tool's result that is a bare text
        return {**raw, "content": inner[0] if was_text else [_block(one, kept) for one in inner]}
    if raw.get("type") != "image_url":
        return raw
    head, _, data = to_data_uri(open_url(raw["image_url"]["url"])).partition(";base64,")
    source = {"type": "base64", "media_type": head.removeprefix("data:"), "data": data}
    return {"type": "image", "source": source, **without(raw, "type", "image_url")}


def _head(asked: Conversation, request_id: str) -> dict[str, Any]:
    return {"id": f"msg_{request_id}", "type": "message", "role": "assistant", "model": asked.model}


def _reason(said: Response) -> str:
    return "max_tokens" if said.finish_reason == FINISHED_FOR_LENGTH else "end_turn"


def _usage(usage: Usage) -> dict[str, int]:
    return {"input_tokens": usage.prompt_tokens, "output_tokens": usage.completion_tokens}
