"""An analyst as a file of one's own: `tests/synthesis/slow_analyst.py:SlowAnalyst`. Each answer takes $ANSWER_SECONDS."""

from __future__ import annotations

import asyncio
import json
import os

from tests.synthesis.standing_in import ANSWERS
from vlmguard.chat import Chat, Response, Usage
from vlmguard.vlms.scripted import Scripted

BY_TASK = {"You study": "hindsight", "You find": "causal", "You rewrite": "optimize"}


def answered(chat: Chat) -> Response:
    """What stage is asked says the instructions' beginning."""
    system = chat.messages[0].text
    stage = next(stage for start, stage in BY_TASK.items() if system.startswith(start))
    return Response(json.dumps(ANSWERS[stage]), usage=Usage(1, 10, 5, 0.01))


class SlowAnalyst(Scripted):
    def __init__(self) -> None:
        super().__init__(answered, name="slow", delay=float(os.environ.get("ANSWER_SECONDS", "0")))


class Silent(SlowAnalyst):
    """Never answers: for a run that may only take what is recorded."""

    async def __call__(self, chat: Chat) -> Response:
        await asyncio.sleep(0)
        raise AssertionError("asked again")
