"""A conversation in the shape of an OpenAI chat-completions request, and the answer to it.

    wire JSON --parse_json--> value --Chat.parse--> Chat --.to_wire--> the same value

A `Chat` never changes: every `with_...` gives a new one. The `raw` values in it are shared between chats and
only to be read; what `Chat.parse` takes in and what `to_wire` gives out are copies, so nobody outside can
change a chat. Its `repr` holds counts and a hash, never what a user wrote.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from vlmguard.errors import BadRequest
from vlmguard.parts import Image, Other, Part, Text, flat, map_images, parse_parts, text_part
from vlmguard.strict_json import checked, copied, parse_json, unexpected

__all__ = [
    "Action",
    "Chat",
    "Image",
    "Message",
    "Other",
    "Part",
    "Response",
    "Step",
    "Text",
    "TokenLogprob",
    "Usage",
    "parse_json",
]

# Fields through which other interfaces carry content. One reader would take them and another "content", so a
# guard could be shown something else than the model (F008): they are refused, unless empty.
RIVALS_OF_CONTENT = (
    *("content_blocks", "contents", "parts", "blocks", "text", "prompt", "input", "inputs"),
    *("image", "images", "image_url", "video", "videos", "media", "attachments", "files", "multi_modal_data"),
)
RIVALS_OF_MESSAGES = ("input", "inputs", "prompt", "contents", "content_blocks", "images", "multi_modal_data")

Action: TypeAlias = Literal["passed", "rewrote", "refused", "flagged"]


@dataclass(frozen=True)
class Message:
    """One turn: its role, its parts, and the whole message as it came (`raw`)."""

    role: str
    parts: tuple[Part, ...]
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, role: str, text: str) -> Self:
        return cls(role, (Text(text, text),), {"role": role, "content": text})

    @classmethod
    def parse(cls, raw: Any, where: str = "message") -> Self:
        """Reads one message.

        Raises:
            BadRequest: it has no role, a content of a wrong type, or content outside "content".
        """
        if not isinstance(raw, Mapping):
            raise unexpected("an object", raw, where)
        _refuse_rivals(raw, RIVALS_OF_CONTENT, '"content"', where)
        if not isinstance(role := raw.get("role"), str) or not role:
            raise unexpected("a role", role, f"{where}.role")
        content = raw.get("content")
        if isinstance(content, str):
            return cls(role, (Text(content, content),), raw)
        if content is not None and not isinstance(content, list):
            raise unexpected("a string, an array or null", content, f"{where}.content")
        return cls(role, parse_parts(content or (), f"{where}.content"), raw)

    @property
    def text(self) -> str:
        """Its text parts, joined by line breaks; not those nested in a tool result (see `full_text`)."""
        return "\n".join(part.text for part in self.parts if isinstance(part, Text))

    @property
    def full_text(self) -> str:
        """All its text, that nested in tool results included: what a guard has to read."""
        return "\n".join(part.text for part in flat(self.parts) if isinstance(part, Text))

    @property
    def images(self) -> tuple[Image, ...]:
        """Its images, those nested in tool results included."""
        return tuple(part for part in flat(self.parts) if isinstance(part, Image))

    def with_parts(self, parts: Iterable[Part]) -> "Message":
        """The message with other parts; without any its content is "", which every server takes."""
        parts = tuple(parts)
        if not parts:
            return Message(self.role, (Text("", ""),), {**self.raw, "content": ""})
        return Message(self.role, parts, {**self.raw, "content": [part.raw for part in parts]})

    def with_text(self, text: str) -> "Message":
        """The message with `text` in place of its text parts.

        It goes where the first text part is, or after the images where there is none. Other text parts go;
        fields of theirs that the first one lacks (`cache_control`, F031) move to it. A string content, or
        none, becomes the string.
        """
        content = self.raw.get("content")
        if not isinstance(content, list):
            return Message(self.role, (Text(text, text),), {**self.raw, "content": text})
        at = [index for index, part in enumerate(self.parts) if isinstance(part, Text)]
        if not at:
            return self.with_parts((*self.parts, text_part(text)))
        first, *rest = (self.parts[index].raw for index in at)
        moved = {key: value for raw in rest if isinstance(raw, Mapping) for key, value in raw.items()}
        own = first if isinstance(first, Mapping) else {"type": "text"}
        added = {key: value for key, value in moved.items() if key not in ("text", "type", *own)}
        merged = {**own, "text": text, **added}
        new = Text(text, text if isinstance(first, str) and not added else merged)
        return self.with_parts(
            new if index == at[0] else part for index, part in enumerate(self.parts) if index not in at[1:]
        )

    def adding(self, text: str) -> "Message":
        """The message with `text` after its own, in a paragraph or part of its own."""
        if isinstance(self.raw.get("content"), list):
            return self.with_parts((*self.parts, text_part(text)))
        return self.with_text(f"{self.text}\n\n{text}" if self.text else text)

    def mapping_images(self, change: "Callable[[Image], Image | None]") -> "Message":
        """The message with each image changed, or left out where `change` gives None."""
        return self.with_parts(map_images(self.parts, change)) if self.images else self


@dataclass(frozen=True, repr=False)
class Chat:
    """A conversation and every other field of the request (`extra`: model, temperature, tools, ...)."""

    messages: tuple[Message, ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    before: int = 0  # how many of the other fields come before "messages"

    @classmethod
    def parse(cls, wire: Mapping[str, Any]) -> "Chat":
        """Reads a chat-completions request.

        Raises:
            BadRequest: it is malformed, or holds content that a guard and a model could read differently.
        """
        if not isinstance(wire, Mapping):
            raise unexpected("an object", wire, "the request")
        fields = checked(wire)
        _refuse_rivals(fields, RIVALS_OF_MESSAGES, '"messages"', "the request")
        turns = fields.get("messages")
        if not isinstance(turns, list) or not turns:
            raise unexpected("an array of one message or more", turns, "messages")
        messages = tuple(Message.parse(turn, f"messages[{index}]") for index, turn in enumerate(turns))
        before = list(fields).index("messages")
        return cls(messages, {key: value for key, value in fields.items() if key != "messages"}, before)

    @classmethod
    def of(
        cls,
        text: str | None,
        images: Sequence[bytes | str | Path] = (),
        *,
        system: str | None = None,
        turns: Sequence[Mapping[str, Any]] = (),
        **extra: Any,
    ) -> "Chat":
        """A chat that ends with a user turn of `images`, then `text`.

        Args:
            images: encoded bytes, local files, or URLs (a `str` that starts with "data:" or contains "://").
            turns: earlier messages, between the system message and the last turn.
            extra: other fields of the request, such as `model`.

        Raises:
            ImageUnreadable: an image is missing or broken.
        """
        sources = (Path(it) if isinstance(it, str) and not _is_url(it) else it for it in images)
        pictures = [Image.of(source).raw for source in sources]
        content = [*pictures, text_part(text).raw] if text is not None and pictures else pictures or text
        system_turn = [] if system is None else [Message.of("system", system).raw]
        last_turn = [] if content is None else [{"role": "user", "content": content}]
        return cls.parse({"messages": [*system_turn, *turns, *last_turn], **extra})

    def __repr__(self) -> str:
        return f"Chat({len(self.messages)} messages, {len(self.images)} images, {self.fingerprint[:12]})"

    @property
    def last_user(self) -> int | None:
        """The place of the last user turn, or None."""
        users = (at for at, turn in enumerate(self.messages) if turn.role.strip().lower() == "user")
        return max(users, default=None)

    @property
    def text(self) -> str:
        """The text of the last user turn, "" where there is none."""
        return "" if self.last_user is None else self.messages[self.last_user].text

    @property
    def images(self) -> tuple[Image, ...]:
        """The images of all turns and roles, in order."""
        return tuple(image for turn in self.messages for image in turn.images)

    @property
    def others(self) -> tuple[Other, ...]:
        """The parts that a guard cannot read (audio, video, files): a policy may want to refuse them."""
        parts = (part for turn in self.messages for part in flat(turn.parts))
        return tuple(part for part in parts if isinstance(part, Other) and not part.parts)

    def with_text(self, text: str) -> "Chat":
        """The chat with `text` in the last user turn, all else as it was.

        A user turn is added where there is none. See `Message.with_text` for turns of several parts.
        """
        if self.last_user is None:
            return self.with_message("user", text)
        if text == self.text:
            return self
        return self._put(self.last_user, self.messages[self.last_user].with_text(text))

    def without_images(self) -> "Chat":
        return replace(self, messages=tuple(turn.mapping_images(lambda _: None) for turn in self.messages))

    def with_images(self, images: Sequence[Image | bytes | str | Path | None]) -> "Chat":
        """The chat with each image replaced by the one at its place in `images`; None removes it.

        A shorter list removes the rest. What is left of a longer one goes to the last user turn, before its
        text. A `str` is a URL, never a file.
        """
        supply = list(images)

        def swap(old: Image) -> Image | None:
            new = supply.pop(0) if supply else None
            return new if new is None or isinstance(new, Image) else old.at(Image.of(new).url)

        chat = replace(self, messages=tuple(turn.mapping_images(swap) for turn in self.messages))
        added = [Image.of(image) for image in supply if image is not None]
        if not added:
            return chat
        if chat.last_user is None:
            return replace(chat, messages=(*chat.messages, Message.of("user", "").with_parts(added)))
        turn = chat.messages[chat.last_user]
        own = [text_part(part.raw) if isinstance(part.raw, str) else part for part in turn.parts if part.raw]
        first = next((at for at, part in enumerate(own) if isinstance(part, Text)), len(own))
        return chat._put(chat.last_user, turn.with_parts((*own[:first], *added, *own[first:])))

    def with_system(self, text: str) -> "Chat":
        """The chat with `text` added to its first system message, or a new system message in front."""
        for at, turn in enumerate(self.messages):
            if turn.role in ("system", "developer"):
                return self._put(at, turn.adding(text))
        return replace(self, messages=(Message.of("system", text), *self.messages))

    def with_message(self, role: str, text: str) -> "Chat":
        return replace(self, messages=(*self.messages, Message.of(role, text)))

    def with_extra(self, **fields: Any) -> "Chat":
        """The chat with other fields of the request set; those it had keep their place."""
        if "messages" in fields:
            raise BadRequest("messages is not another field", "Use with_text or with_message.", param="messages")
        return replace(self, extra={**self.extra, **checked(fields)})

    def to_wire(self) -> dict[str, Any]:
        """The request as JSON values, a copy; an unchanged chat gives what was parsed, in the same order."""
        fields = list(self.extra.items())
        fields.insert(self.before, ("messages", [turn.raw for turn in self.messages]))
        wire: dict[str, Any] = copied(dict(fields))
        return wire

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of the whole request as canonical JSON."""
        canonical = json.dumps(self.to_wire(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _put(self, at: int, message: Message) -> "Chat":
        return replace(self, messages=(*self.messages[:at], message, *self.messages[at + 1 :]))


@dataclass(frozen=True)
class Usage:
    """What an answer cost, summed over every model asked."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.calls + other.calls,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Step:
    """What one guard did with a request.

    Args:
        risk: the probability in [0, 1] that was held against `threshold`.
        sent: the text that went on in place of the user's.
    """

    guard: str
    action: Action
    analysis: Mapping[str, str] | None = None
    sent: str | None = None
    risk: float | None = None
    category: str | None = None
    threshold: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its natural log-probability, and those of the likeliest tokens in its place."""

    token: str
    logprob: float
    top: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Response:
    """A VLM's answer; `trace` has one step for each guard it went through, `raw` the server's own answer."""

    text: str
    finish_reason: str | None = "stop"
    usage: Usage = Usage()
    trace: tuple[Step, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    raw: Any = None

    def with_step(self, step: Step) -> "Response":
        return replace(self, trace=(*self.trace, step))

    def plus(self, usage: Usage) -> "Response":
        return replace(self, usage=self.usage + usage)


def _refuse_rivals(raw: Mapping[str, Any], rivals: Sequence[str], beside: str, where: str) -> None:
    if found := [key for key in rivals if raw.get(key)]:
        names = ", ".join(found)
        raise BadRequest(f"{where} has {names} beside {beside}", f"Put all content into {beside}.", param=found[0])


def _is_url(text: str) -> bool:
    return text[:5].lower() == "data:" or "://" in text
