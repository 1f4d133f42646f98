"""A message read so that no server can read more in it than the guard did.

    raw message --refuse_beside, read_content--> Message     text and pictures; what models and tools said is text, too

Refused: what carries content where a guard doesn't look (F008), parts of a kind that no guard can read, and parts that
one server takes by their type and another by what is in them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import orjson

from vlmguard.chat import RIVALS_OF_CONTENT, RIVALS_OF_MESSAGES, Message
from vlmguard.errors import BadRequest
from vlmguard.parts import IMAGE_SOURCES, IMAGE_TYPES, TEXT_TYPES, Image, Other, Part, Text, parse_parts
from vlmguard.strict_json import unexpected

# Through these, servers take sounds, films, files, and pictures as a model's own numbers.
UNREAD: Final = (
    *("audio", "audio_url", "audio_embeds", "input_audio", "video", "video_url", "video_embeds", "input_video"),
    *("image_embeds", "image_pil", "prompt_embeds", "file", "file_data", "file_url", "file_uri", "input_file"),
    *("document", "documents", "file_ids"),
)
BESIDE_MESSAGES: Final = (
    *RIVALS_OF_MESSAGES,
    *("documents", "chat_template", "prompt_embeds", "input_ids", "input_embeds", "prompt_token_ids"),
    # LiteLLM puts the fields of the first over the request's own, and fetches what the second names.
    *("extra_body", "prompt_id"),
)
# With these, LiteLLM sends messages of their own where the first model fails.
FALLBACKS: Final = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")
BESIDE_CONTENT: Final = (*RIVALS_OF_CONTENT, *UNREAD)
IN_A_TEXT: Final = (*IMAGE_SOURCES, *UNREAD, "content")
IN_AN_IMAGE: Final = (*UNREAD, "content")
OF_A_SOURCE: Final = ("url", "data", "file_id")
OF_TOOLS: Final = ("tool_result",)  # what a tool gave, in a user's turn
SCREENSHOT: Final = "computer_screenshot"
# Of what a model wrote itself: names, and what nobody but its own server can read.
NOT_TOLD: Final = (
    "type",
    "id",
    "call_id",
    "status",
    "caller",
    "cache_control",
    "signature",
    "data",
    "encrypted_content",
)
REMEDY: Final = "Send text and pictures."
APART: Final = "Send each text and picture as a part of its own, in the messages or items of this API."


def refuse_beside(fields: Mapping[str, Any], names: Iterable[str], content: str, where: str = "") -> None:
    """Raises BadRequest where one of the names has content beside the place for it."""
    if found := [name for name in names if fields.get(name)]:
        param = f"{where}.{found[0]}" if where else found[0]
        raise BadRequest(f"{where or 'the request'} has {', '.join(found)} beside {content}", APART, param=param)


def refuse_inside(fields: Mapping[str, Any], content: str) -> None:
    """Raises BadRequest where a field that servers unpack brings content of its own beside the place for it."""
    if isinstance(kwargs := fields.get("chat_template_kwargs"), Mapping):
        refuse_beside(kwargs, ("messages", *BESIDE_MESSAGES), content, "chat_template_kwargs")
    for name in FALLBACKS:
        given = fields.get(name)
        if given and not (isinstance(given, list) and all(_names_models(one) for one in given)):
            remedy = "Name other models only."
            raise BadRequest(f"{name} may bring content beside {content}", remedy, param=name)


def _names_models(fallback: Any) -> bool:
    """Whether it is a model's name, or names of models by a model's."""
    lists = fallback.values() if isinstance(fallback, Mapping) else [[fallback]]
    return all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)


def read_message(raw: Any, where: str, of_models: Collection[str]) -> Message:
    """A message with a role and a content.

    Args:
        of_models: types of parts that models write, and that come back in their turns.
    """
    if not isinstance(raw, Mapping):
        raise unexpected("an object", raw, where)
    refuse_beside(raw, BESIDE_CONTENT, '"content"', where)
    if not isinstance(role := raw.get("role"), str) or not role:
        raise unexpected("a role", role, f"{where}.role")
    return read_content(raw, role, raw.get("content"), f"{where}.content", of_models if role == "assistant" else ())


def read_content(raw: Mapping[str, Any], role: str, content: Any, where: str, of_models: Collection[str]) -> Message:
    """A message whose content stands at `where`."""
    if isinstance(content, str):
        return Message(role, (Text(content, content),), raw)
    if content is not None and not isinstance(content, list):
        raise unexpected("a string, an array or null", content, where)
    return Message(role, _read_parts(parse_parts(content or (), where), where, of_models), raw)


def told(raw: Mapping[str, Any]) -> str:
    """What stands in a model's tool call, thoughts or refusal, one value a line."""
    values = (value for key, value in raw.items() if value and key not in NOT_TOLD)
    return "\n".join(value if isinstance(value, str) else orjson.dumps(value).decode() for value in values)


def _read_parts(parts: Iterable[Part], where: str, of_models: Collection[str]) -> tuple[Part, ...]:
    return tuple(_read_part(part, f"{where}[{at}]", of_models) for at, part in enumerate(parts))


def _read_part(part: Part, where: str, of_models: Collection[str]) -> Part:
    raw = part.raw
    if isinstance(raw, str):
        return part
    kind = (raw.get("type") or "").lower()
    if isinstance(part, Text) and kind in ("", *TEXT_TYPES):
        refuse_beside(raw, IN_A_TEXT, "its text", where)
        return part
    if isinstance(part, Image) and kind in ("", SCREENSHOT, *TEXT_TYPES, *IMAGE_TYPES):
        refuse_beside(raw, IN_AN_IMAGE, "its image", where)
        _refuse_two_sources(raw, where)
        return part
    if isinstance(part, Other) and kind in OF_TOOLS:
        return _read_result(part, where)
    if isinstance(part, Other) and kind in of_models:
        return Text(told(raw), raw)
    raise BadRequest(f"{where} is of type {kind[:40]!r}, which the guard cannot read", REMEDY, param=where)


def _read_result(part: Other, where: str) -> Other:
    content = part.raw.get("content")
    if isinstance(content, str):
        return Other(part.raw, (Text(content, content),))
    if content is not None and not isinstance(content, list):
        raise unexpected("a string, an array or null", content, f"{where}.content")
    refuse_beside(part.raw, UNREAD, "its content", where)
    return Other(part.raw, _read_parts(part.parts, f"{where}.content", ()))


def _refuse_two_sources(raw: Mapping[str, Any], where: str) -> None:
    source = next(raw[key] for key in IMAGE_SOURCES if raw.get(key))
    if isinstance(source, Mapping) and sum(bool(source.get(key)) for key in OF_A_SOURCE) > 1:
        raise BadRequest(f"{where} has two pictures in one source", "Send two parts.", param=where)
