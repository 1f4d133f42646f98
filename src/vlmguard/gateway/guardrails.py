"""The guard without the target, for who calls the model himself: /v1/guard, LiteLLM's generic guardrail, a webhook.

Each says what it makes of a chat, and the rewritten request; nothing is sent anywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import orjson

from vlmguard.chat import Chat, Image, Message, Text
from vlmguard.errors import BadRequest
from vlmguard.gateway.exchange import Exchange, Handle
from vlmguard.gateway.guarded import seen
from vlmguard.gateway.guarding import Screening
from vlmguard.gateway.upstream import JSON
from vlmguard.gateway.wire import CHAT
from vlmguard.gateway.wire.protocol import fields_of
from vlmguard.gateway.wire.reading import refuse_beside
from vlmguard.guards.policy import REFUSAL
from vlmguard.guards.vlmguard_r1 import Screened
from vlmguard.parts import flat
from vlmguard.strict_json import parse_json, unexpected

if TYPE_CHECKING:
    from vlmguard.gateway.config import Key

GUARD: Final = "/v1/guard"
WEBHOOK: Final = "/v1/webhook"
LITELLM: Final = "/beta/litellm_basic_guardrail_api"
TAKEN_OUT: Final = " "  # in place of a text that went into the rewritten one: many servers refuse an empty text


@dataclass(frozen=True)
class Guardrail:
    """
    Args:
        read: the body to a chat; None where there is nothing to judge.
        answer: what is said of it.
        refused: what is said of a chat that cannot be read; None answers with the error.
    """

    read: Callable[[Mapping[str, Any]], Chat | None]
    answer: Callable[[Mapping[str, Any], Screened | None, str], dict[str, Any]]
    refused: Callable[[BadRequest], dict[str, Any]] | None = None


def guardrail(rail: Guardrail) -> Handle:
    """What the route of a guardrail does."""

    async def handle(exchange: Exchange, key: Key) -> None:
        gateway, facts = exchange.gateway, exchange.facts
        body = await exchange.body()
        async with exchange.while_connected():
            fields = fields_of(parse_json(body, gateway.settings.server.max_body_bytes))
            policy = gateway.settings.policy_for(exchange.path, key)
            facts.mode = policy.mode
            try:
                screened = await _screened(exchange, key, rail.read(fields), gateway.guards[policy.mode])
            except BadRequest as error:
                if rail.refused is None:
                    raise
                facts.action, facts.note = "refused", type(error).__name__
                told = rail.refused(error)
            else:
                told = rail.answer(fields, screened, facts.request_id)
            await exchange.answer(200, orjson.dumps(told), JSON)

    return handle


async def _screened(exchange: Exchange, key: Key, chat: Chat | None, guard: object) -> Screened | None:
    """What the guard makes of the chat. One with remote pictures is changed in any case: what was fetched is in it."""
    if chat is None:
        exchange.facts.action = "passed"
        return None
    assert isinstance(guard, Screening)  # these routes are there for such guards alone
    begun = time.perf_counter()
    screened = await guard.screen(await seen(exchange, key, chat))
    exchange.facts.screened(screened.step, time.perf_counter() - begun)
    return replace(screened, original=chat)


def _guard_chat(body: Mapping[str, Any]) -> Chat:
    return CHAT.read(body).chat


def _guard_answer(body: Mapping[str, Any], screened: Screened | None, request_id: str) -> dict[str, Any]:
    """The verdict, as `vlmguard guard --json` says it, and the messages to send where they are not those that came."""
    assert screened is not None
    step, sent = screened.step, screened.chat
    return {
        "request_id": request_id,
        "action": step.action,
        "risk": step.risk,
        "threshold": step.threshold,
        "category": step.category,
        "analysis": dict(step.analysis) if step.analysis else None,
        "prompt": sent.text if sent else None,
        "original": screened.original.text,
        **({"messages": _rows(sent)} if sent and sent is not screened.original else {}),
        **({"note": step.note} if step.note else {}),
    }


def _webhook_chat(body: Mapping[str, Any]) -> Chat:
    if "messages" in body:
        refuse_beside(body, ("text", "images"), '"messages"')
        return CHAT.read({"messages": body["messages"]}).chat
    text, images = body.get("text"), _strings(body, "images")
    if text is not None and not isinstance(text, str):
        raise unexpected("a string", text, "text")
    if not text and not images:
        raise BadRequest("there is nothing to guard", 'Send "messages", or "text", "images" or both.')
    return _chat(_turn([text] if text else [], images))


def _webhook_answer(body: Mapping[str, Any], screened: Screened | None, request_id: str) -> dict[str, Any]:
    assert screened is not None
    step, sent = screened.step, screened.chat
    told: dict[str, Any] = {"request_id": request_id, "risk": step.risk, "category": step.category}
    if sent is None:
        return {**told, "action": "block", "reason": REFUSAL}
    if sent is screened.original:
        return {**told, "action": "allow"}
    changed = {"messages": _rows(sent)} if "messages" in body else _pictures(screened)
    return {**told, "action": "modify", "text": sent.text, **changed}


def _litellm_chat(body: Mapping[str, Any]) -> Chat | None:
    """The conversation that LiteLLM tells. What stands in its lists of texts and pictures alone comes as later turns.

    An answer of a model is not judged here, since this guard reads requests.
    """
    if body.get("input_type") == "response":
        return None
    texts, images = _strings(body, "texts"), _strings(body, "images")
    told = body.get("structured_messages") or _called(body)
    chat = CHAT.read({"messages": told}).chat if told else None
    if chat and _tells(chat, body):
        return chat
    known = {image.url for image in chat.images} if chat else set()
    unseen = [image for image in images if image not in known]
    last = [_turn(texts[-1:], unseen)] if texts or unseen else []
    turns = [*(_rows(chat) if chat else ()), *(_turn([text], ()) for text in texts[:-1]), *last]
    return _chat(*turns) if turns else None


def _litellm_answer(body: Mapping[str, Any], screened: Screened | None, request_id: str) -> dict[str, Any]:
    """LiteLLM takes changed texts by their places, changed pictures only in messages; what it can't take is blocked."""
    if screened is None or screened.chat is screened.original:
        return {"action": "NONE"}
    blocked = {"action": "BLOCKED", "blocked_reason": REFUSAL}
    if screened.chat is None:
        return blocked
    texts, pictures, changed = _strings(body, "texts"), _pictures(screened), screened.chat.text
    if changed == screened.original.text:
        new: list[str] | None = texts
    elif _tells(screened.original, body):
        new = _rewritten(texts, screened)
    else:
        new = [*texts[:-1], changed] if texts else None
    if new is not None and not pictures:
        return {"action": "GUARDRAIL_INTERVENED", "texts": new}
    if not _tells(screened.original, body):
        return {"action": "NONE"} if screened.step.action in ("passed", "flagged") else blocked
    rows = {"structured_messages": _rows(screened.chat)}
    return {"action": "GUARDRAIL_INTERVENED", "texts": new or texts, **pictures, **rows}


def _litellm_refused(error: BadRequest) -> dict[str, Any]:
    return {"action": "BLOCKED", "blocked_reason": str(error)}


def _called(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tool calls that come without a conversation."""
    calls = body.get("tool_calls")
    return [{"role": "assistant", "content": None, "tool_calls": calls}] if calls else []


def _tells(chat: Chat, body: Mapping[str, Any]) -> bool:
    """Whether the chat is LiteLLM's own conversation, with its texts in their order, so that places in one are places in
    the other, and with every picture."""
    told, pictures = body.get("structured_messages"), {image.url for image in chat.images}
    return bool(told) and _said(chat.messages) == _strings(body, "texts") and pictures >= {*_strings(body, "images")}


def _rewritten(texts: Sequence[str], screened: Screened) -> list[str] | None:
    """As many texts in the same order, with the rewritten request in the place of the last user turn's first one.

    None where that turn has no text of its own.
    """
    original, sent = screened.original, screened.chat
    assert sent is not None
    at = original.last_user
    if at is None or not any(isinstance(part, Text) for part in original.messages[at].parts):
        return None
    before, turn, new = len(_said(original.messages[:at])), list[str](), [sent.text]
    for part in original.messages[at].parts:
        own = [new.pop() if new else TAKEN_OUT] if isinstance(part, Text) else []
        turn += own or [inner.text for inner in flat([part]) if isinstance(inner, Text)]
    return [*texts[:before], *turn, *texts[before + len(turn) :]]


def _said(turns: Sequence[Message]) -> list[str]:
    """Every text of the turns, as LiteLLM counts them: one for each part."""
    return [part.text for turn in turns for part in flat(turn.parts) if isinstance(part, Text)]


def _pictures(screened: Screened) -> dict[str, Any]:
    """All pictures, if one is not what came."""
    sent = [image.url for image in screened.chat.images] if screened.chat else []
    return {"images": sent} if sent != [image.url for image in screened.original.images] else {}


def _rows(chat: Chat) -> list[Mapping[str, Any]]:
    return [turn.raw for turn in chat.messages]


def _chat(*turns: Mapping[str, Any]) -> Chat:
    return CHAT.read({"messages": list(turns)}).chat


def _turn(texts: Sequence[str], images: Sequence[str]) -> dict[str, Any]:
    pictures = [Image.of(image).raw for image in images]
    return {"role": "user", "content": [*pictures, *({"type": "text", "text": text} for text in texts)]}


def _strings(body: Mapping[str, Any], name: str) -> list[str]:
    given = body.get(name)
    if given is None:
        return []
    if not isinstance(given, list) or not all(isinstance(one, str) for one in given):
        raise unexpected("an array of strings", given, name)
    return given


GUARDRAILS: Final[Mapping[str, Guardrail]] = {
    GUARD: Guardrail(_guard_chat, _guard_answer),
    WEBHOOK: Guardrail(_webhook_chat, _webhook_answer),
    LITELLM: Guardrail(_litellm_chat, _litellm_answer, _litellm_refused),
}
