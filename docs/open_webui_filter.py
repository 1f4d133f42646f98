"""
title: VLMGuard
author: VLMGuard
version: 0.1.0
license: Apache-2.0
description: Shows each request, pictures included, to a VLMGuard gateway, and sends on what the gateway makes of it.
"""

# A filter function of Open WebUI (written against 0.12.4): Admin Panel, Functions, +, paste this file; then turn it on
# and make it global. It has no switch in the chat, so users cannot turn it off. docs/gateway.md says what it does not see.

import json
from typing import Any, Literal

import aiohttp
from pydantic import BaseModel, Field

GUARD = "/v1/guard"
READ_BY_MODELS = ("role", "name", "content", "tool_calls", "tool_call_id")  # of a message; the rest is Open WebUI's own
REFUSAL = (
    "I can't help with this request. If you tell me what you want to achieve, I'll gladly help you find a safe way "
    "to do it."
)


class Blocked(Exception):
    """Open WebUI shows the message in place of an answer, and asks no model."""


class Unreachable(Exception):
    """The gateway did not say what it makes of a request."""


class Filter:
    class Valves(BaseModel):
        """What an administrator can set."""

        url: str = Field(default="http://127.0.0.1:8080", description="The gateway, as this server reaches it.")
        key: str = Field(
            default="",
            description="A key of the gateway's; `vlmguard key` makes one.",
            json_schema_extra={"input": {"type": "password"}},
        )
        seconds: float = Field(default=30.0, gt=0, description="To wait for the gateway.")
        unreachable: Literal["block", "allow"] = Field(
            default="block", description="What to do with a request while the gateway cannot be asked."
        )
        refusal: str = Field(default=REFUSAL, description="What a user reads when a request is refused.")
        priority: int = Field(
            default=1000, description="Lower runs earlier. What a later filter adds is not seen by the guard."
        )

    def __init__(self) -> None:
        self.valves = self.Valves()

    async def inlet(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body with what is to be sent in it: words, and pictures where the gateway's policy is about them.

        Raises:
            Blocked: the guard refuses it, or cannot read it, or cannot be asked.
        """
        messages = body.get("messages") or []
        if not any(message.get("role") == "user" for message in messages):
            return body
        try:
            verdict = await self._asked(messages)
        except Unreachable as error:
            if self.valves.unreachable == "allow":
                return body
            raise Blocked(f"This request cannot be checked now, so it was not sent ({error}).") from None
        if verdict["action"] == "refused":
            raise Blocked(self.valves.refusal)
        for message, sent in zip(messages, verdict.get("messages", messages), strict=True):
            message["content"] = sent.get("content")
        return body

    async def _asked(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The gateway's verdict. Raises Unreachable, or Blocked where it says that the request is at fault."""
        seen = [{name: message[name] for name in READ_BY_MODELS if name in message} for message in messages]
        headers = {"Authorization": f"Bearer {self.valves.key}"} if self.valves.key else {}
        timeout = aiohttp.ClientTimeout(total=self.valves.seconds)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout, headers=headers) as session,
                session.post(self.valves.url.rstrip("/") + GUARD, json={"messages": seen}) as answer,
            ):
                status, text = answer.status, await answer.text()
        except TimeoutError:
            raise Unreachable(f"no answer in {self.valves.seconds:g} s") from None
        except aiohttp.ClientError as error:
            raise Unreachable(type(error).__name__) from None
        if status == 200:
            verdict: dict[str, Any] = json.loads(text)
            return verdict
        if status == 429 or status >= 500:
            raise Unreachable(_reason(status, text))
        # the fault is the request's, the key's or the address's: waiting mends none of them
        raise Blocked(f"This request was not sent: {_reason(status, text)}")


def _reason(status: int, text: str) -> str:
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):  # another server's words
        return f"{GUARD} answered with status {status}"
