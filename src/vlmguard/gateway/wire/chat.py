"""OpenAI's /v1/chat/completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, Final

from vlmguard.chat import Chat, Response, Usage
from vlmguard.errors import TargetError
from vlmguard.gateway.wire.problem import Problem
from vlmguard.gateway.wire.protocol import Conversation, event, fields_of, listed, model_in, stream_in, without
from vlmguard.gateway.wire.reading import BESIDE_MESSAGES, read_message, refuse_beside, refuse_inside
from vlmguard.vlms.completions import completion

OF_MODELS: Final = ("refusal", "thinking", "redacted_thinking")
OF_OTHER_APIS: Final = ("system", "instructions", "previous_response_id", "conversation")
BESIDE_TURNS: Final = (*BESIDE_MESSAGES, *OF_OTHER_APIS)
MOST_CHOICES: Final = 128  # what OpenAI takes for n
KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class OpenAIErrors:
    """Errors in OpenAI's shape."""

    ending = b"data: [DONE]\n\n"

    def error(self, problem: Problem) -> dict[str, Any]:
        default = "invalid_request_error" if problem.status < 500 else "server_error"
        kind = KINDS.get(problem.status, default)
        return {"error": {"message": problem.message, "type": kind, "param": problem.param, "code": None}}

    def error_event(self, problem: Problem) -> bytes:
        return event(self.error(problem))


class ChatCompletions(OpenAIErrors):
    path = "/v1/chat/completions"
    final = (b"[DONE]",)

    def read(self, body: Any) -> Conversation:
        fields = fields_of(body)
        refuse_beside(fields, BESIDE_TURNS, '"messages"')
        refuse_inside(fields, '"messages"')
        turns = listed(fields, "messages", "message")
        messages = tuple(read_message(turn, f"messages[{at}]", OF_MODELS) for at, turn in enumerate(turns))
        chat = Chat(messages, without(fields, "messages"), list(fields).index("messages"))
        return Conversation(chat, model_in(fields), stream_in(fields), fields)

    def write(self, asked: Conversation, chat: Chat) -> dict[str, Any]:
        return chat.to_wire()

    def answer(self, said: Response, asked: Conversation, request_id: str, created: int) -> dict[str, Any]:
        own = _own_choice(said)
        message = {"role": "assistant", "content": said.text, "refusal": None}
        choice = own or {"message": message, "logprobs": None, "finish_reason": said.finish_reason or "stop"}
        head = {**_head(asked, request_id, created, "chat.completion"), "usage": _usage(said.usage)}
        choices = [{**choice, "index": at} for at in range(_choices(asked))]
        return {**head, **(said.raw if own else {}), "choices": choices}

    async def stream(
        self, pieces: AsyncIterator[str | Response], asked: Conversation, request_id: str, created: int
    ) -> AsyncGenerator[bytes, None]:
        head = _head(asked, request_id, created, "chat.completion.chunk")
        usage: dict[str, Any] = {"usage": None} if asked.include_usage else {}

        def chunk(delta: Mapping[str, Any], finish: str | None = None) -> bytes:
            choice = {"delta": delta, "logprobs": None, "finish_reason": finish}
            return event({**head, "choices": [{"index": at, **choice} for at in range(_choices(asked))], **usage})

        yield chunk({"role": "assistant", "content": ""})
        async for piece in pieces:
            if isinstance(piece, str):
                yield chunk({"content": piece})
                continue
            if calls := _calls(piece):
                yield chunk({"tool_calls": calls})
            yield chunk({}, piece.finish_reason or "stop")
            if asked.include_usage:
                yield event({**head, "choices": [], "usage": _usage(piece.usage)})
        yield self.ending


def _own_choice(said: Response) -> dict[str, Any] | None:
    """A server's own first choice, with its tool calls, if its text is still what a guard lets through.

    The others no guard has read.
    """
    try:
        own = completion(said.raw, 0).text == said.text
    except TargetError:
        return None
    choice: dict[str, Any] = said.raw["choices"][0]
    return choice if own else None


def _calls(said: Response) -> list[dict[str, Any]]:
    message = (_own_choice(said) or {}).get("message") or {}
    return [{"index": at, **call} for at, call in enumerate(message.get("tool_calls") or ())]


def _head(asked: Conversation, request_id: str, created: int, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": created, "model": asked.model}


def _choices(asked: Conversation) -> int:
    wanted = asked.body.get("n")
    return min(wanted, MOST_CHOICES) if isinstance(wanted, int) and wanted > 0 else 1


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
