"""OpenAI's /v1/responses.

Each item that carries text or pictures becomes a message of the chat: messages keep their role, what a tool gave becomes a
`tool` message, `instructions` a system message in front. What the gateway never saw is refused: stored answers, prompts and files.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping
from typing import Any, Final

from vlmguard.chat import Chat, Message, Response, Usage
from vlmguard.errors import BadRequest
from vlmguard.gateway.wire.chat import OpenAIErrors
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
from vlmguard.gateway.wire.reading import (
    BESIDE_CONTENT,
    BESIDE_MESSAGES,
    REMEDY,
    read_content,
    read_message,
    refuse_beside,
    refuse_inside,
    told,
)
from vlmguard.parts import Text
from vlmguard.strict_json import unexpected

STORED: Final = ("previous_response_id", "conversation", "prompt")
BESIDE_INPUT: Final = ("messages", *(name for name in BESIDE_MESSAGES if name not in ("input", *STORED)))
BESIDE_OUTPUT: Final = ("content", *BESIDE_CONTENT)
OF_TOOLS: Final = (
    *("function_call_output", "custom_tool_call_output", "computer_call_output"),
    *("local_shell_call_output", "apply_patch_call_output"),
)
OF_MODELS: Final = (
    *("function_call", "custom_tool_call", "computer_call", "local_shell_call", "apply_patch_call"),
    *("web_search_call", "reasoning"),
)


class Responses(OpenAIErrors):
    path = "/v1/responses"
    ending = b""
    final = (b"response.completed", b"response.incomplete", b"response.failed")

    def read(self, body: Any) -> Conversation:
        fields = fields_of(body)
        _refuse_stored(fields)
        refuse_beside(fields, BESIDE_INPUT, '"input"')
        refuse_inside(fields, '"input"')
        turns = [_turn(item, f"input[{at}]") for at, item in enumerate(_items(fields))]
        instructions = fields.get("instructions")
        if instructions is not None and not isinstance(instructions, str):
            raise unexpected("a string", instructions, "instructions")
        front = [Message.of("system", instructions)] if instructions else []
        extra, limit = without(fields, "input", "instructions"), fields.get("max_output_tokens")
        chat = Chat((*front, *turns), {**extra, "max_tokens": limit} if limit else extra)
        places = (*(None for _ in front), *range(len(turns)))
        return Conversation(chat, model_in(fields), stream_in(fields), fields, places)

    def write(self, asked: Conversation, chat: Chat) -> dict[str, Any]:
        written, items = dict(asked.body), _items(asked.body)
        for place, new, old in changes(asked, chat):
            content = _content(new, as_it_came(old))
            if place is None:
                written["instructions"] = new.text
            elif items[place].get("type") in OF_TOOLS:
                items[place] = {**items[place], "output": _output(items[place], content)}
            else:
                items[place] = {**items[place], "content": content}
        items += ({"role": new.role, "content": _content(new)} for new in added(asked, chat))
        bare = isinstance(asked.body["input"], str) and len(items) == 1 and isinstance(items[0]["content"], str)
        return {**written, "input": items[0]["content"] if bare else items}

    def answer(self, said: Response, asked: Conversation, request_id: str, created: int) -> dict[str, Any]:
        cut = said.finish_reason == FINISHED_FOR_LENGTH
        return {
            **_head(asked, request_id, created),
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [_message(request_id, said.text, "incomplete" if cut else "completed")],
            "usage": _usage(said.usage),
        }

    async def stream(
        self, pieces: AsyncIterator[str | Response], asked: Conversation, request_id: str, created: int
    ) -> AsyncGenerator[bytes, None]:
        count = 0

        def told(kind: str, **fields: Any) -> bytes:
            nonlocal count
            made = event({"type": kind, "sequence_number": count, **fields}, kind)
            count += 1
            return made

        started = {**_head(asked, request_id, created), "status": "in_progress", "output": [], "usage": None}
        item = {"output_index": 0, "item_id": f"msg_{request_id}"}
        part = {**item, "content_index": 0}
        yield told("response.created", response=started)
        yield told("response.in_progress", response=started)
        yield told("response.output_item.added", output_index=0, item=_message(request_id, None, "in_progress"))
        yield told("response.content_part.added", **part, part=_text(""))
        async for piece in pieces:
            if isinstance(piece, str):
                yield told("response.output_text.delta", **part, delta=piece, logprobs=[])
                continue
            whole = self.answer(piece, asked, request_id, created)
            yield told("response.output_text.done", **part, text=piece.text, logprobs=[])
            yield told("response.content_part.done", **part, part=_text(piece.text))
            yield told("response.output_item.done", output_index=0, item=whole["output"][0])
            yield told(f"response.{whole['status']}", response=whole)

    def error_event(self, problem: Problem) -> bytes:
        error = self.error(problem)["error"]
        fields = {"code": error["type"], "message": error["message"], "param": error["param"]}
        return event({"type": "error", "sequence_number": 0, **fields}, "error")


def _refuse_stored(fields: Mapping[str, Any]) -> None:
    if found := next((name for name in STORED if fields.get(name)), None):
        remedy = "Send the conversation itself in input."
        raise BadRequest(f"{found} names what the gateway has never seen", remedy, param=found)


def _items(fields: Mapping[str, Any]) -> list[Any]:
    """The items of the input, in a list of their own."""
    given = fields.get("input")
    return [{"role": "user", "content": given}] if isinstance(given, str) else list(listed(fields, "input", "item"))


def _turn(item: Any, where: str) -> Message:
    """An item as a message of a chat."""
    if not isinstance(item, Mapping):
        raise unexpected("an object", item, where)
    kind = item.get("type")
    if kind in (None, "message"):
        return read_message(item, where, ("refusal",))
    if kind in OF_TOOLS:
        refuse_beside(item, BESIDE_OUTPUT, '"output"', where)
        output = item.get("output")
        content = [output] if isinstance(output, Mapping) else output
        return read_content({"role": "tool", "content": content}, "tool", content, f"{where}.output", ())
    if kind in OF_MODELS:
        return Message("assistant", (Text(told(item), item),), {"role": "assistant", "content": [item]})
    raise BadRequest(f"{where} is of type {str(kind)[:40]!r}, which the guard cannot read", REMEDY, param=where)


def _content(turn: Message, kept: Collection[int] = ()) -> Any:
    """Its content; `kept` are the parts that stay as they came."""
    content = turn.raw.get("content")
    return [_part(raw, kept) for raw in content] if isinstance(content, list) else content


def _part(raw: Any, kept: Collection[int]) -> Any:
    """A part as this API spells it: what a guard made or changed may be spelled as in a chat."""
    if isinstance(raw, str) or id(raw) in kept:
        return raw
    if raw.get("type") == "text":
        return {**raw, "type": "input_text"}
    if raw.get("type") == "image_url" and isinstance(source := raw["image_url"], Mapping):
        return {**without(source, "url"), **raw, "type": "input_image", "image_url": source["url"]}
    return raw


def _output(item: Mapping[str, Any], content: Any) -> Any:
    """A tool's output in the form that it had."""
    if isinstance(item.get("output"), Mapping) and isinstance(content, list):
        return {**content[0], "type": item["output"]["type"]}
    return content


def _head(asked: Conversation, request_id: str, created: int) -> dict[str, Any]:
    body = asked.body
    return {
        "id": f"resp_{request_id}",
        "object": "response",
        "created_at": created,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "metadata": body.get("metadata") or {},
        "model": asked.model,
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "store": False,
        "temperature": body.get("temperature"),
        "text": body.get("text") or {"format": {"type": "text"}},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": body.get("tools") or [],
        "top_p": body.get("top_p"),
        "truncation": "disabled",
    }


def _message(request_id: str, text: str | None, status: str) -> dict[str, Any]:
    content = [] if text is None else [_text(text)]
    return {"id": f"msg_{request_id}", "type": "message", "status": status, "role": "assistant", "content": content}


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
