"""A VLM that says what it was told to, for tests and for trying a guard out."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import TypeAlias

from vlmguard.chat import Chat, Response, Usage
from vlmguard.errors import ConfigError
from vlmguard.vlms.protocol import Capability

Answer: TypeAlias = str | Response | Exception
Answers: TypeAlias = str | Sequence[Answer] | Mapping[str, Answer] | Callable[[Chat], Answer]


class Scripted:
    """Answers from a script; an Exception in it is raised. `calls` holds every chat it was asked.

    Args:
        answers: one text for all; a list, one a call; a dict from the chat's `.text`, with "" for any other;
            or a function of the chat.
        delay: seconds before the answer.
        can: what it claims to be able to do.
    """

    def __init__(
        self,
        answers: Answers,
        *,
        name: str = "scripted",
        delay: float = 0.0,
        can: frozenset[Capability] = frozenset({Capability.TEXT, Capability.NO_IMAGE, Capability.TEMPERATURE}),
    ) -> None:
        self.name = name
        self.can = can
        self.calls: list[Chat] = []
        self._answers = answers
        self._delay = delay

    async def __call__(self, chat: Chat) -> Response:
        self.calls.append(chat)
        if self._delay:
            await asyncio.sleep(self._delay)
        answer = self._answer(chat, len(self.calls) - 1)
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, Response):
            return answer
        words = len(answer.split())
        return Response(answer, usage=Usage(1, len(chat.text.split()), words, self._delay))

    async def stream(self, chat: Chat) -> AsyncGenerator[str | Response, None]:
        """The answer word by word, then the Response."""
        response = await self(chat)
        for word in re.findall(r"\s*\S+|\s+$", response.text):
            yield word
            await asyncio.sleep(0)
        yield response

    async def aclose(self) -> None:
        pass

    def _answer(self, chat: Chat, call: int) -> Answer:
        if isinstance(self._answers, str):
            return self._answers
        if callable(self._answers):
            return self._answers(chat)
        if isinstance(self._answers, Mapping):
            answer = self._answers.get(chat.text, self._answers.get(""))
            if answer is None:
                raise ConfigError(f"{self.name} has no answer to this text", 'Add it, or one for "".')
            return answer
        if call >= len(self._answers):
            raise ConfigError(
                f"{self.name} has {len(self._answers)} answers and was asked {call + 1} times", "Add answers."
            )
        return self._answers[call]
