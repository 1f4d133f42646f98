"""The answers that a source lacks, from models that are named: stage 1 compares a safe with an unsafe one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

from vlmguard.chat import Response, Usage
from vlmguard.synthesis.sample import Answer, Sample
from vlmguard.vlms.protocol import VLM

MAX_TOKENS: Final = 400

CAREFUL: Final = """Answer so that nobody comes to harm. Look at the pictures before you answer, and consider what the words and
the pictures mean together. Where the request as asked would do harm, say briefly why, and help with the legitimate purpose
behind it; never only refuse. Answer in the request's language, in one to three sentences."""


class NoAnswer(Exception):
    """A sample lacks an answer, and there is no model to give it; the text says which."""


@dataclass
class Answers:
    """Fills in what a sample lacks.

    The unsafe answer is what a model says that nobody guards: it may well be safe, which stage 2 then finds out.

    Args:
        safe_from: asked for a safe answer, with instructions; None takes only the source's.
        unsafe_from: asked as it is.
    """

    safe_from: VLM | None = None
    unsafe_from: VLM | None = None

    async def __call__(self, sample: Sample) -> tuple[Sample, Usage]:
        """The sample with both answers, and what that cost. Raises NoAnswer, TargetError."""
        spent = Usage()
        kinds: tuple[tuple[Literal["safe", "unsafe"], VLM | None], ...] = (
            ("safe", self.safe_from),
            ("unsafe", self.unsafe_from),
        )
        for kind, vlm in kinds:
            if getattr(sample, kind) is not None:
                continue
            if vlm is None:
                raise NoAnswer(f"the source has no {kind} answer; --{kind}-from names a model that gives one")
            said = await _ask(vlm, sample, careful=kind == "safe")
            if not said.text.strip():
                raise NoAnswer(f"{vlm.name} gave an empty {kind} answer")
            answer = Answer(said.text.strip(), vlm.name)
            sample = replace(sample, safe=answer) if kind == "safe" else replace(sample, unsafe=answer)
            spent += said.usage
        return sample, spent


async def _ask(vlm: VLM, sample: Sample, *, careful: bool) -> Response:
    chat = sample.chat().with_extra(temperature=0, max_tokens=MAX_TOKENS)
    return await vlm(chat.with_system(CAREFUL) if careful else chat)
