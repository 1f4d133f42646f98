"""The guarded routes: body -> one parse -> limits -> remote pictures -> guard -> target.

What the guard read is what is sent: a chat that it leaves alone goes on as the very bytes that came.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from vlmguard.chat import Chat
from vlmguard.gateway.exchange import Exchange, Handle
from vlmguard.gateway.keys import check_pictures
from vlmguard.gateway.upstream import Call
from vlmguard.gateway.wire import Wire
from vlmguard.images import open_url
from vlmguard.pixels import outline
from vlmguard.strict_json import parse_json

if TYPE_CHECKING:
    from vlmguard.gateway.config import Key


def guarded(wire: Wire) -> Handle:
    """What the route of one API does."""

    async def handle(exchange: Exchange, key: Key) -> None:
        gateway, facts = exchange.gateway, exchange.facts
        body = await exchange.body()
        async with exchange.while_connected():
            read = wire.read(parse_json(body, gateway.settings.server.max_body_bytes))
            facts.asked(read)
            chat = await seen(exchange, key, read.chat)
            policy = gateway.settings.policy_for(wire.path, key)
            facts.mode = policy.mode
            call = Call(wire, read, chat, body, exchange.headers, facts.request_id)
            async with gateway.guards[policy.mode].open(call, facts) as answer:
                await exchange.pass_on(answer, wire)

    return handle


async def seen(exchange: Exchange, key: Key, chat: Chat) -> Chat:
    """The chat with its remote pictures in it, within what the key may send. Raises BadRequest."""
    check_pictures(key, len(chat.images))
    chat = await exchange.gateway.fetcher.fetched(chat)
    if key.pixels is not None and chat.images:
        check_pictures(key, len(chat.images), await asyncio.to_thread(pixels_in, chat))
    exchange.facts.look(chat, hashes=exchange.gateway.audit_log is not None)
    return chat


def pixels_in(chat: Chat) -> int:
    """Of all its pictures and frames together, as their headers say. Raises ImageError."""
    return sum(math.prod(outline(open_url(image.url))) for image in chat.images)
