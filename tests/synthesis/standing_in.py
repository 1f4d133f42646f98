"""Samples and an analyst for the tests of the synthesis: it answers at once, from the request that it is asked about."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from vlmguard.chat import Usage
from vlmguard.synthesis.analyst import Question, Reply
from vlmguard.synthesis.sample import Answer, Origin, Picture, Sample

ORIGIN = Origin("made-up", "CC0", "2026-01-01", "1")
FEATURES = {
    "features": [{"harm": "a deadly fall", "source": "both", "driver": "It went along with standing at the edge."}]
}
REPORT = {
    "textual": "Asks for a pose, which is harmless.",
    "visual": "A cliff with a long drop.",
    "multimodal": "Posing there could end in a fall.",
    "risky": True,
    "category": "physical_danger",
    "triggers": {"text": ["pose"], "image": ["a cliff"]},
    "interactions": ["The pose leads to the edge."],
}
REWORDING = {"intent": "A good picture.", "prompt": "Which pose suits a picture well back from a cliff's edge?"}
ANSWERS: dict[str, dict[str, Any]] = {"hindsight": FEATURES, "causal": REPORT, "optimize": REWORDING}


def png(color: str = "red", size: int = 40) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), color).save(data, "PNG")
    return data.getvalue()


def sample(name: str = "a", **given: Any) -> Sample:
    told: dict[str, Any] = {
        "pictures": (Picture("cliff.png", data=png()),),
        "prompt": "Which pose looks best here?",
        "safe": Answer("Stay back from the edge."),
        "unsafe": Answer("Go right to the edge!"),
    }
    return Sample(name, origin=ORIGIN, **{**told, **given})


@dataclass
class StandIn:
    """An analyst that gives `answers` by stage: an object, a text, or what a function makes of the question."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[Question] = field(default_factory=list)
    name: str = "stand-in"

    async def __call__(self, question: Question) -> Reply:
        self.asked.append(question)
        answer = self.answers.get(question.stage, ANSWERS[question.stage])
        if isinstance(answer, Callable):  # type: ignore[arg-type]
            answer = answer(question)
        if isinstance(answer, Exception):
            raise answer
        text = answer if isinstance(answer, str) else json.dumps(answer)
        return Reply(text, Usage(1, 10, 5, 0.1))

    async def aclose(self) -> None:
        """Nothing is open."""
