"""What one API's spelling of conversations is to the gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import orjson

from vlmguard.chat import Chat, Message, Response
from vlmguard.errors import ConfigError
from vlmguard.gateway.wire.problem import Problem
from vlmguard.parts import flat
from vlmguard.strict_json import unexpected

FINISHED_FOR_LENGTH: Final = "length"


@dataclass(frozen=True)
class Conversation:
    """A request as it was read.

    Args:
        chat: what a guard sees, and a model in this process gets.
        body: the parsed request, never changed.
        places: for every message of the chat where it stands in the body; None for one that has a field of its own.
    """

    chat: Chat
    model: str
    stream: bool
    body: Mapping[str, Any] = field(repr=False)
    places: tuple[int | None, ...] = ()

    @property
    def include_usage(self) -> bool:
        """Whether a stream of OpenAI's ends with a usage chunk."""
        options = self.body.get("stream_options")
        return isinstance(options, Mapping) and options.get("include_usage") is True


class Wire(Protocol):
    """
    Args:
        path: of its route.
        ending: what must end a stream; b"" where nothing must.
        final: names, or the whole data, of the events that end a stream.
    """

    @property
    def path(self) -> str: ...
    @property
    def ending(self) -> bytes: ...
    @property
    def final(self) -> Collection[bytes]: ...

    def read(self, body: Any) -> Conversation:
        """Reads what `parse_json` gave. Raises BadRequest on what a guard could read differently from a model, or not at all."""
        ...

    def write(self, asked: Conversation, chat: Chat) -> dict[str, Any]:
        """The request with the chat's changed text and pictures, all else as it came; only to be read."""
        ...

    def answer(self, said: Response, asked: Conversation, request_id: str, created: int) -> dict[str, Any]:
        """An answer that the gateway makes: a refusal, or one of a model in this process."""
        ...

    def stream(
        self, pieces: AsyncIterator[str | Response], asked: Conversation, request_id: str, created: int
    ) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events."""
        ...

    def error(self, problem: Problem) -> dict[str, Any]: ...

    def error_event(self, problem: Problem) -> bytes:
        """The error in a stream that has begun."""
        ...


def fields_of(body: Any) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise unexpected("an object", body, "the request")
    return body


def listed(body: Mapping[str, Any], name: str, what: str) -> list[Any]:
    found = body.get(name)
    if not isinstance(found, list) or not found:
        raise unexpected(f"an array of one {what} or more", found, name)
    return found


def model_in(body: Mapping[str, Any]) -> str:
    model = body.get("model", "")
    if not isinstance(model, str):
        raise unexpected("a string", model, "model")
    return model


def stream_in(body: Mapping[str, Any]) -> bool:
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise unexpected("true or false", stream, "stream")
    return bool(stream)


def without(fields: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key not in names}


def changes(asked: Conversation, chat: Chat) -> Iterable[tuple[int | None, Message, Message]]:
    """Each message that the guard changed: its place in the body, what it is now, what it was.

    Raises ConfigError for a guard that takes messages out or puts one between them; behind the last it may.
    """
    was = asked.chat.messages
    if [turn.role for turn in chat.messages[: len(was)]] != [turn.role for turn in was]:
        raise ConfigError("the guard moved or removed messages, which this API cannot tell", "Use another guard.")
    return [trio for trio in zip(asked.places, chat.messages, was, strict=False) if trio[1] is not trio[2]]


def added(asked: Conversation, chat: Chat) -> tuple[Message, ...]:
    """The messages behind those that were asked, of a guard that found no user's turn to change."""
    return chat.messages[len(asked.chat.messages) :]


def as_it_came(message: Message) -> frozenset[int]:
    """The identities of its raw parts: a part that the guard kept is still the same object."""
    return frozenset(id(part.raw) for part in flat(message.parts))


def event(data: Mapping[str, Any], name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + orjson.dumps(data) + b"\n\n"
