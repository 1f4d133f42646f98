"""The answers of chat-completions servers, whole or streamed, and their errors, read into our own terms."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmguard.chat import Response, TokenLogprob, Usage
from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    ContextTooLong,
    RateLimited,
    TargetError,
    Timeout,
    Upstream,
)

TOO_LONG = re.compile(
    r"context[ _-]?(length|window|size)|maximum (context|prompt|input|model) ?len|too many (input )?tokens"
    r"|(prompt|input|request|message)s? (is|are) too (long|large)|longer than the maximum|reduce the length",
    re.IGNORECASE,
)
PICTURE = re.compile(r"data:[\w/+.-]*;base64,\S*|[A-Za-z0-9+/=_-]{120,}")  # F066: no image bytes in an error
SHOWN_CHARACTERS = 300
EMPTY_FOR_A_REASON = (
    "content_filter",
    "length",
    "tool_calls",
    "function_call",
)  # finish reasons that go with a null content
MEANT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "audio")  # fields that do
GROWING = ("content", "refusal", "reasoning_content", "reasoning")  # fields that a stream sends in pieces


def completion(answer: Any, seconds: float) -> Response:
    """Reads a whole answer.

    Raises:
        BadAnswer: it has no message with a content (F040).
        TargetError: it is an error with HTTP status 200.
    """
    answer = _object(answer, "the answer")
    if answer.get("error"):
        raise error_of(_status_in(answer), answer)
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        raise BadAnswer("the answer has no choices")
    choice = _object(choices[0], "choices[0]")
    reason = choice.get("finish_reason")
    text = _spoken(_object(choice.get("message"), "choices[0].message"), reason)
    return Response(text, reason, usage(answer, seconds), logprobs=_logprobs(choice.get("logprobs")), raw=answer)


def usage(answer: Mapping[str, Any], seconds: float) -> Usage:
    counts = answer.get("usage")
    counts = counts if isinstance(counts, Mapping) else {}
    return Usage(1, _count(counts.get("prompt_tokens")), _count(counts.get("completion_tokens")), seconds)


class Assembly:
    """The chunks of a streamed answer, put together as the server would have sent it whole."""

    def __init__(self) -> None:
        self.text = ""
        self.finish_reason: str | None = None
        self._fields: dict[str, Any] = {}
        self._message: dict[str, Any] = {"role": "assistant", "content": None}
        self._logprobs: list[Any] = []

    def add(self, chunk: Any) -> str:
        """The text in a chunk. Raises TargetError for an error sent in the stream."""
        chunk = _object(chunk, "a chunk")
        if chunk.get("error"):
            raise error_of(_status_in(chunk), chunk)
        self._fields.update((name, value) for name, value in chunk.items() if name != "choices" and value is not None)
        choices = chunk.get("choices")
        choice = _object(choices[0], "choices[0]") if isinstance(choices, list) and choices else {}
        if not choice or choice.get("index"):  # the chunk with the usage has no choices
            return ""
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        logprobs = choice.get("logprobs")
        self._logprobs += (logprobs.get("content") or []) if isinstance(logprobs, Mapping) else []
        return self._extend(_object(choice.get("delta") or {}, "choices[0].delta"))

    def _extend(self, delta: Mapping[str, Any]) -> str:
        pieces = {name: text for name in GROWING if (text := _text(delta.get(name))) is not None}
        for name, piece in pieces.items():
            self._message[name] = (self._message.get(name) or "") + piece
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            _add_call(self._message.setdefault("tool_calls", []), _object(call, "a tool call"))
        said = pieces.get("content", "") + pieces.get("refusal", "")
        self.text += said
        return said

    def response(self, seconds: float) -> Response:
        """Raises BadAnswer when the stream ended too early or said nothing."""
        if self.finish_reason is None:
            raise BadAnswer("the stream broke off before its end", "Ask again.")
        choice = {"index": 0, "message": self._message, "finish_reason": self.finish_reason}
        choice |= {"logprobs": {"content": self._logprobs}} if self._logprobs else {}
        whole = {**self._fields, "object": "chat.completion", "choices": [choice]}
        return replace(completion(whole, seconds), text=self.text)


def error_of(status: int, answer: Any, retry_after: float | None = None, secret: str | None = None) -> TargetError:
    """The error that a status and an error body mean; `secret` never appears in it."""
    code, said = _error_in(answer)
    said = PICTURE.sub("...", said.replace(secret, "***") if secret else said)
    said = said if len(said) <= SHOWN_CHARACTERS else said[:SHOWN_CHARACTERS] + "..."
    if status in (401, 403):
        remedy = "Set VLMGUARD_API_KEY to a key that this server and model take."
        return AuthenticationFailed(f"refused the key ({status}): {said}", remedy)
    if status == 429:
        return RateLimited(f"too many requests: {said}", "Ask less often.", retry_after=retry_after)
    if status == 413 or (400 <= status < 500 and (code == "context_length_exceeded" or TOO_LONG.search(said))):
        return ContextTooLong(f"the request is too long ({status}): {said}", "Shorten it, or send smaller pictures.")
    if status in (408, 504):
        return Timeout(f"the server gave up waiting ({status}): {said}", "Try again, or ask for fewer tokens.")
    remedy = "Check the address and the model's name." if status == 404 else ""
    return Upstream(f"answered {status}: {said}", remedy, status=status)


def _error_in(answer: Any) -> tuple[str, str]:
    """The code and message of an error body, in the shapes that servers use."""
    inner = answer.get("error", answer) if isinstance(answer, Mapping) else answer
    if not isinstance(inner, Mapping):
        return "", str(inner or "no message")
    said = inner.get("message") or inner.get("detail") or inner.get("error") or "no message"
    return str(inner.get("code") or ""), str(said)


def _status_in(answer: Mapping[str, Any]) -> int:
    """The status that an error sent with HTTP status 200 stands for."""
    error = answer["error"]
    given = [error.get("code"), error.get("status")] if isinstance(error, Mapping) else []
    kind = str(error.get("type") or error.get("code")) if isinstance(error, Mapping) else ""
    known = {"rate_limit_error": 429, "rate_limit_exceeded": 429, "invalid_request_error": 400}
    found = (int(code) for code in map(str, given) if code.isdigit() and 400 <= int(code) < 600)
    return next(found, known.get(kind, 400 if TOO_LONG.search(_error_in(answer)[1]) else 502))


def _spoken(message: Mapping[str, Any], reason: Any) -> str:
    text = _text(message.get("content"))
    if text is not None:
        return text
    if isinstance(refusal := message.get("refusal"), str):
        return refusal
    if reason in EMPTY_FOR_A_REASON or any(message.get(name) for name in MEANT):
        return ""
    raise BadAnswer("the answer has neither a content nor a refusal nor a call")


def _text(content: Any) -> str | None:
    if isinstance(content, list):
        return "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    if content is None or isinstance(content, str):
        return content
    raise BadAnswer(f"the answer's content is of type {type(content).__name__}")


def _add_call(calls: list[dict[str, Any]], piece: Mapping[str, Any]) -> None:
    """Add a piece of a tool call to the call with its index; names come whole, arguments in pieces."""
    at = piece.get("index")
    at = at if isinstance(at, int) and 0 <= at < len(calls) else len(calls)
    if at == len(calls):
        calls.append({"type": "function", "function": {"name": "", "arguments": ""}})
    call, function = calls[at], piece.get("function")
    call.update((name, value) for name, value in piece.items() if name not in ("index", "function") and value)
    for name, value in function.items() if isinstance(function, Mapping) else ():
        call["function"][name] = call["function"].get(name, "") + value if isinstance(value, str) else value


def _logprobs(given: Any) -> tuple[TokenLogprob, ...]:
    content = given.get("content") if isinstance(given, Mapping) else None
    try:
        return tuple(_logprob(entry) for entry in content or ())
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadAnswer(f"the answer's logprobs cannot be read: {error!r}") from error


def _logprob(entry: Mapping[str, Any]) -> TokenLogprob:
    top: dict[str, float] = {}
    for other in entry.get("top_logprobs") or ():
        top.setdefault(other["token"], float(other["logprob"]))  # likeliest first
    return TokenLogprob(str(entry["token"]), float(entry["logprob"]), top)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _object(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadAnswer(f"{where} is {'null' if value is None else 'a ' + type(value).__name__}, expected an object")
    return value
