"""What every guard must do, once for all of them. A new one is added to `MADE`."""

import asyncio
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from tests.stand_ins import Rewriter
from vlmguard import load
from vlmguard.chat import Chat, Response, Usage
from vlmguard.guards import GUARDS
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.rewriter.protocol import Rewrite
from vlmguard.vlms.protocol import VLM, Capability, closing
from vlmguard.vlms.scripted import Scripted

BENIGN, RISKY = "What is in this picture?", "something risky, please"


class Counting(Rewriter):
    """The scripted rewriter; `calls` counts all it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    async def judge(self, chat: Chat) -> Rewrite:
        self.calls += 1
        await asyncio.sleep(0.01)
        return await super().judge(chat)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        self.calls += 1
        return await super().__call__(chat, verdict)


# Of each guard: what makes it round a target, and what counts the calls of its own models.
Made = tuple[VLM, Callable[[], int]]


def vlmguard_r1(target: VLM) -> Made:
    rewriter = Counting()
    return VLMGuardR1(target, rewriter), lambda: rewriter.calls


MADE: dict[str, Callable[[VLM], Made]] = {"vlmguard-r1": vlmguard_r1}


@pytest.fixture(params=GUARDS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def target() -> Scripted:
    return Scripted(lambda chat: Response(f"You said: {chat.text}", usage=Usage(1, 10, 5, 0.01)), delay=0.01)


@pytest.fixture
def made(name: str, target: Scripted) -> Made:
    return MADE[name](target)


@pytest.fixture
def guard(made: Made) -> VLM:
    return made[0]


def test_every_guard_is_tested_here() -> None:
    assert MADE.keys() == GUARDS.keys()


def test_it_is_a_dataclass_round_a_vlm_and_is_one(name: str, guard: VLM, target: Scripted) -> None:
    factory: Any = load.guard(name)
    assert factory.needs <= frozenset(Capability)
    assert is_dataclass(factory)
    assert getattr(guard, fields(factory)[0].name) is target
    assert isinstance(guard, VLM)
    assert name in guard.name
    assert target.name in guard.name
    assert Capability.TEXT in guard.can
    assert Capability.HIDDEN not in guard.can


def test_its_docstring_links_the_paper_and_counts_its_calls(name: str) -> None:
    guard = load.guard(name)
    said = f"{sys.modules[guard.__module__].__doc__}\n{inspect.getdoc(guard)}"
    assert re.search(r"arXiv[: ]\d{4}\.\d{5}", said)
    assert "Calls:" in said
    assert "Differs:" in said


@pytest.mark.parametrize("text", [BENIGN, RISKY])
async def test_the_picture_reaches_the_target(guard: VLM, target: Scripted, png: bytes, text: str) -> None:
    chat = Chat.of(text, [png])
    await guard(chat)
    assert target.calls
    assert all(asked.images == chat.images for asked in target.calls)


@pytest.mark.parametrize("text", [BENIGN, RISKY, ""])
async def test_the_request_object_is_unchanged(guard: VLM, png: bytes, text: str) -> None:
    chat = Chat.of(text, [png], system="Be kind.", temperature=0.5)
    before, fingerprint = chat.to_wire(), chat.fingerprint
    await guard(chat)
    async for _ in guard.stream(chat):
        pass
    assert chat.to_wire() == before
    assert Chat.parse(chat.to_wire()).fingerprint == fingerprint


@pytest.mark.parametrize("text", [BENIGN, RISKY])
async def test_its_step_is_in_the_trace_once(guard: VLM, name: str, text: str) -> None:
    steps = [step for step in (await guard(Chat.of(text))).trace if step.guard == name]
    assert len(steps) == 1
    assert steps[0].action in ("passed", "rewrote", "refused", "flagged")


@pytest.mark.parametrize("text", [BENIGN, RISKY])
async def test_usage_counts_every_call(made: Made, target: Scripted, text: str) -> None:
    guard, own_calls = made
    usage = (await guard(Chat.of(text))).usage
    assert usage.calls == len(target.calls) + own_calls()
    assert usage.prompt_tokens >= 10 * len(target.calls)
    assert usage.seconds > 0


async def test_a_benign_request_is_answered_as_without_it(guard: VLM, target: Scripted, png: bytes) -> None:
    chat = Chat.of(BENIGN, [png])
    assert (await guard(chat)).text == (await target(chat)).text == f"You said: {BENIGN}"


@pytest.mark.parametrize("text", [BENIGN, RISKY])
async def test_a_stream_is_texts_then_one_response(guard: VLM, text: str) -> None:
    whole = await guard(Chat.of(text))
    *texts, response = [piece async for piece in guard.stream(Chat.of(text))]
    assert isinstance(response, Response)
    assert all(isinstance(piece, str) for piece in texts)
    assert "".join(map(str, texts)) == response.text == whole.text
    assert response.usage.calls == whole.usage.calls
    assert [step.action for step in response.trace] == [step.action for step in whole.trace]


@pytest.mark.parametrize("seconds", [0, 0.005, 0.015])
async def test_cancelled_at_any_time_it_asks_nothing_more_and_stays_usable(
    guard: VLM, target: Scripted, seconds: float
) -> None:
    task = asyncio.create_task(guard(Chat.of(RISKY)))
    await asyncio.sleep(seconds)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    asked = len(target.calls)
    await asyncio.sleep(0.05)
    assert len(target.calls) == asked
    assert (await guard(Chat.of(BENIGN))).text


async def test_a_stream_left_early_ends_the_targets(
    guard: VLM, target: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = []
    inner = target.stream

    async def watched(chat: Chat):  # type: ignore[no-untyped-def]
        try:
            async for piece in inner(chat):
                yield piece
        finally:
            ended.append(True)

    monkeypatch.setattr(target, "stream", watched)
    async with closing(guard.stream(Chat.of(BENIGN))) as stream:
        assert isinstance(await anext(stream), str)
    assert ended == [True]


async def test_many_at_once_answer_as_one(guard: VLM) -> None:
    texts = [f"{BENIGN} {number}" for number in range(8)]
    answers = await asyncio.gather(*(guard(Chat.of(text)) for text in texts))
    assert [answer.text for answer in answers] == [f"You said: {text}" for text in texts]


async def test_an_error_of_the_target_passes_through(name: str) -> None:
    from vlmguard.errors import RateLimited

    guard, _ = MADE[name](Scripted([RateLimited("slow down", retry_after=3)]))
    with pytest.raises(RateLimited) as caught:
        await guard(Chat.of(BENIGN))
    assert caught.value.retry_after == 3
