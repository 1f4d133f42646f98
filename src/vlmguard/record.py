"""What became of one request, as the JSON object that `vlmguard guard` prints and a batch writes.

{"action", "risk", "threshold", "category", "analysis", "prompt", "original", "answer", "usage", "models"}

and "note" where the guard has something to say, as that its rewriter failed and what was done about it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vlmguard.chat import Chat, Response, Step, Usage
from vlmguard.errors import VLMGuardError


class Screened(Protocol):
    """What a guard gives without asking its target; `chat` is what would be sent, None where it is refused."""

    @property
    def chat(self) -> Chat | None: ...
    @property
    def step(self) -> Step: ...
    @property
    def usage(self) -> Usage: ...


class Guard(Protocol):
    """A guard as the command line uses it."""

    async def __call__(self, chat: Chat) -> Response: ...
    async def screen(self, chat: Chat) -> Screened: ...
    async def gate(self, chat: Chat) -> Screened: ...


@dataclass(frozen=True)
class Models:
    """The names of the models that took part; no target means that nothing was asked of one."""

    rewriter: str
    target: str | None = None

    @property
    def fields(self) -> dict[str, str | None]:
        return {"rewriter": self.rewriter, "target": self.target}


async def guarded(guard: Guard, chat: Chat, models: Models) -> dict[str, Any]:
    """Screens the chat and, where there is a target, asks it."""
    if models.target is None:
        screened = await guard.screen(chat)
        return _record(chat, screened.step, screened.usage, models, _sent(chat, screened.step))
    response = await guard(chat)
    step = response.trace[-1]
    return _record(chat, step, response.usage, models, _sent(chat, step), response.text)


async def gated(guard: Guard, chat: Chat, models: Models) -> dict[str, Any]:
    """The gate's verdict alone: no analysis, no rewrite, and nothing is sent."""
    screened = await guard.gate(chat)
    record = _record(chat, screened.step, screened.usage, models, None)
    return {**record, "action": "passed" if screened.step.action == "passed" else "flagged", "analysis": None}


def error_fields(error: Exception) -> dict[str, str]:
    """The error as JSON: its type and the one line that a reader needs."""
    message = " ".join(str(error).split()) if isinstance(error, VLMGuardError) else f"unexpected: {error}"
    return {"type": type(error).__name__, "message": message}


def was_gated(record: Mapping[str, Any]) -> bool:
    """Whether the record is of a gate alone: nothing was sent, though nothing was refused."""
    return record["prompt"] is None and record["action"] != "refused"


def _sent(chat: Chat, step: Step) -> str | None:
    if step.action == "refused":
        return None
    return step.sent if step.action == "rewrote" and step.sent is not None else chat.text


def _record(
    chat: Chat, step: Step, usage: Usage, models: Models, prompt: str | None, answer: str | None = None
) -> dict[str, Any]:
    analysis = {part: step.analysis[part] for part in ("text", "image", "together")} if step.analysis else None
    tokens = usage.prompt_tokens + usage.completion_tokens
    return {
        "action": step.action,
        "risk": step.risk,
        "threshold": step.threshold,
        "category": step.category,
        "analysis": analysis,
        "prompt": prompt,
        "original": chat.text,
        "answer": answer,
        "usage": {"calls": usage.calls, "tokens": tokens, "seconds": round(usage.seconds, 3)},
        "models": models.fields,
        **({"note": step.note} if step.note else {}),
    }
