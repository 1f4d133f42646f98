"""Who answers the three stages' questions: any VLM, or a file of answers that were written for the project.

    Question --Analyst--> text        each stage parses its own answers
    Desk                              one sample's talk with the analyst: costs by stage, one repair of an unreadable answer
    Recorded                          every answer is kept by its question's key: an interrupted run asks nothing twice (F112)

A record of answers and a file of authored ones have the same lines: {"key", "stage", "answer", ...}.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Final, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel, ValidationError

from vlmguard.chat import Chat, Message, Response, Usage
from vlmguard.errors import BadAnswer, BadRequest, ConfigError, Upstream
from vlmguard.journal import Journal
from vlmguard.rewriter.protocol import quote, script
from vlmguard.synthesis.sample import Sample
from vlmguard.vlms.protocol import VLM

Parsed = TypeVar("Parsed", bound=BaseModel)

MAX_TOKENS: Final = 1200  # of one answer
LEAST_REPEATED: Final = 4  # times that a run of ten words stands in an answer that goes round in circles


class AnswerUnusable(BadAnswer):
    """The analyst's answer is no answer: unreadable, cut off, a refusal, in another language, or there is none.

    Args:
        what: is wrong with it: "is not JSON".
        usage: what it cost all the same.
    """

    def __init__(self, what: str, usage: Usage | None = None) -> None:
        super().__init__(f"the analyst's answer {what}")
        self.usage = usage or Usage()


@dataclass(frozen=True)
class Question:
    """One stage's question about one sample.

    Args:
        stage: "hindsight", "causal" or "optimize".
        schema: of the JSON object that answers it; servers that can are held to it.
    """

    stage: str
    sample: Sample = field(repr=False)
    system: str = field(repr=False)
    text: str = field(repr=False)
    schema: type[BaseModel] = field(repr=False)

    @property
    def key(self) -> str:
        """SHA-256 of all that the analyst reads: instructions, text, the pictures' own hashes."""
        read = [self.system, self.text, [picture.sha256 for picture in self.sample.pictures]]
        return hashlib.sha256(json.dumps(read, ensure_ascii=False).encode()).hexdigest()

    def chat(self) -> Chat:
        pictures = [picture.read() for picture in self.sample.pictures]
        asked = Chat.of(self.text, pictures, system=self.system)
        return asked.with_extra(temperature=0, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Reply:
    text: str
    usage: Usage = field(default_factory=Usage)


@runtime_checkable
class Analyst(Protocol):
    """Answers questions. Raises AnswerUnusable where there is no answer, TargetError where the call fails."""

    @property
    def name(self) -> str: ...

    async def __call__(self, question: Question) -> Reply: ...

    async def aclose(self) -> None: ...


@dataclass
class Asked:
    """A VLM as the analyst: an endpoint or a local model.

    It is asked for JSON of the stage's schema; where that option is refused, plainly, from then on.
    """

    vlm: VLM
    constrained: bool = True

    @property
    def name(self) -> str:
        return self.vlm.name

    async def __call__(self, question: Question) -> Reply:
        chat = question.chat()
        if not self.constrained:
            return _said(await self._timed(chat))
        form = {"name": question.stage, "schema": question.schema.model_json_schema(), "strict": True}
        try:
            answer = await self._timed(chat.with_extra(response_format={"type": "json_schema", "json_schema": form}))
        except (Upstream, ConfigError, BadRequest) as error:
            if isinstance(error, Upstream) and error.status not in (400, 404, 422):
                raise
            answer = await self._timed(chat)  # raises again where the form was not the reason
            self.constrained = False
        return _said(answer)

    async def _timed(self, chat: Chat) -> Response:
        begun = time.perf_counter()
        answer = await self.vlm(chat)
        if answer.usage.seconds:
            return answer
        return replace(answer, usage=replace(answer.usage, seconds=time.perf_counter() - begun))

    async def aclose(self) -> None:
        await self.vlm.aclose()


def _said(answer: Response) -> Reply:
    """Raises AnswerUnusable for one that was cut off or filtered: no parser needs to look at it."""
    if answer.finish_reason == "length":
        raise AnswerUnusable("was cut off", answer.usage)
    if answer.finish_reason == "content_filter":
        raise AnswerUnusable("was withheld by its server's filter", answer.usage)
    return Reply(answer.text, answer.usage)


@dataclass
class Authored:
    """Answers that were written for the project, by their questions' keys.

    Raises ConfigError for a file that holds none.
    """

    path: Path
    answers: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            lines = [json.loads(line) for line in self.path.read_text("utf-8").split("\n") if line.strip()]
            self.answers = {line["key"]: line["answer"] for line in lines}
        except OSError as error:
            raise ConfigError(f"{self.path} cannot be read: {error.strerror}", "Check the path.") from None
        except (ValueError, KeyError, TypeError) as error:
            remedy = 'A line is {"key": ..., "stage": ..., "answer": ...}.'
            raise ConfigError(f"{self.path} is no file of answers: {error!r}", remedy) from None

    @property
    def name(self) -> str:
        return f"authored:{self.path.name}"

    async def __call__(self, question: Question) -> Reply:
        if question.key not in self.answers:
            raise AnswerUnusable(f"is missing: {self.path.name} has none to this {question.stage} question")
        return Reply(self.answers[question.key])

    async def aclose(self) -> None:
        """Nothing is open."""


@dataclass
class InTurn:
    """Several analysts, asked in turn: endpoints of one model on several machines."""

    analysts: Sequence[Analyst]

    def __post_init__(self) -> None:
        self._turn = cycle(self.analysts)

    @property
    def name(self) -> str:
        return ",".join(dict.fromkeys(one.name for one in self.analysts))

    async def __call__(self, question: Question) -> Reply:
        return await next(self._turn)(question)

    async def aclose(self) -> None:
        for one in self.analysts:
            await one.aclose()


@dataclass
class Recorded:
    """An analyst whose answers are written down as they come; what is written is not asked again."""

    analyst: Analyst
    journal: Journal

    @property
    def name(self) -> str:
        return self.analyst.name

    async def __call__(self, question: Question) -> Reply:
        told = self.journal.get(question.key)
        if told is not None:
            return Reply(told["answer"], Usage(**told["usage"]))
        reply = await self.analyst(question)
        self.journal.append(
            {
                "key": question.key,
                "stage": question.stage,
                "sample": question.sample.id,
                "answer": reply.text,
                "usage": asdict(reply.usage),
                "model": self.analyst.name,
            }
        )
        return reply

    async def aclose(self) -> None:
        await self.analyst.aclose()


@dataclass
class Desk:
    """One sample's talk with the analyst.

    Args:
        repairs: how often an unreadable answer is asked for again, with the reason.
    """

    analyst: Analyst
    repairs: int = 1
    costs: dict[str, Usage] = field(default_factory=dict)

    async def ask(self, question: Question, check: Callable[[Parsed], None] | None = None) -> Parsed:
        """The answer, read.

        Args:
            check: raises AnswerUnusable for what the schema cannot say.
        """
        asked = question
        for attempt in range(self.repairs + 1):
            try:
                parsed = read_answer(await self._answer(asked), question.schema)
                if check is not None:
                    check(parsed)  # type: ignore[arg-type]
            except AnswerUnusable as error:
                if attempt == self.repairs or isinstance(self.analyst, Authored):
                    raise
                again = f"{question.text}\n\nAn earlier answer could not be used: {error.message}. Answer in the form asked for."
                asked = replace(question, text=again)
            else:
                return parsed  # type: ignore[return-value]
        raise AssertionError

    async def _answer(self, question: Question) -> str:
        try:
            reply = await self.analyst(question)
        except AnswerUnusable as error:
            self._spend(question.stage, error.usage)
            raise
        self._spend(question.stage, reply.usage)
        return reply.text

    def _spend(self, stage: str, usage: Usage) -> None:
        self.costs[stage] = self.costs.get(stage, Usage()) + usage


_FENCED: Final = re.compile(r"\s*```(?:json)?\s*\n(.*)\n\s*```\s*", re.DOTALL | re.IGNORECASE)
_THOUGHT: Final = re.compile(r"\s*<think>.*?</think>", re.DOTALL)
_REFUSAL: Final = re.compile(
    r"\W*(i['’]?m (really )?sorry|sorry|i (can['’]?t|cannot|am unable|won['’]?t|must decline)|i['’]m unable|as an ai)\b",
    re.IGNORECASE,
)


def read_answer(text: str, schema: type[Parsed]) -> Parsed:
    """The JSON object that the answer is, alone or in one code fence, after a model's own thoughts.

    Raises AnswerUnusable with what is wrong with it; never what it says.
    """
    bare = _THOUGHT.sub("", text, count=1)
    fenced = _FENCED.fullmatch(bare)
    bare = (fenced[1] if fenced else bare).strip()
    if not bare:
        raise AnswerUnusable("is empty")
    if not bare.startswith("{"):
        raise AnswerUnusable("is a refusal" if _REFUSAL.match(bare) else "is not a JSON object")
    if goes_round(bare):
        raise AnswerUnusable("repeats itself")
    try:
        return schema.model_validate_json(bare)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        problem = "is not JSON" if first["type"] == "json_invalid" else f"has a wrong {place or 'form'}: {first['msg']}"
        raise AnswerUnusable(problem) from None


def goes_round(text: str) -> bool:
    """Whether some run of ten words stands LEAST_REPEATED times or oftener."""
    words = text.split()
    counts: dict[tuple[str, ...], int] = {}
    for at in range(len(words) - 9):
        run = tuple(words[at : at + 10])
        counts[run] = counts.get(run, 0) + 1
    return max(counts.values(), default=0) >= LEAST_REPEATED


def check_english(*texts: str) -> None:
    """The analysis is written in English, whatever the request is in. Raises AnswerUnusable for another script."""
    for text in texts:
        if script(text) not in ("latin", "none"):
            raise AnswerUnusable(f"is written in {script(text)} letters, not in English")


def told_request(sample: Sample) -> str:
    """The request as quoted data."""
    lines = [f"Earlier {turn['role']}: {quote(Message.parse(turn).text, None)}" for turn in sample.history]
    count = len(sample.pictures)
    lines.append(f"Pictures: {count} attached, in order" if count else "Pictures: none")
    lines.append(f"Request: {quote(sample.prompt, None)}")
    return "\n".join(lines)


def analyst_of(spec: str) -> Analyst:
    """authored:FILE, any VLM's spec, or several endpoints' with commas between.

    Raises:
        ConfigError: no such file or form. ModelError: the model cannot be loaded.
    """
    from vlmguard import load

    kind, _, rest = spec.partition(":")
    if kind == "authored":
        return Authored(Path(rest))
    several = spec.split(",")
    if len(several) > 1 and all(one.startswith(("http://", "https://")) for one in several):
        return InTurn([Asked(load.vlm(one)) for one in several])
    return Asked(load.vlm(spec))
