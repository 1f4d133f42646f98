"""The engine in this process: how many are worked on together, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.synthesis.standing_in import sample
from vlmguard.errors import AuthenticationFailed, Timeout
from vlmguard.synthesis.engines import local
from vlmguard.synthesis.pipeline import Interrupted
from vlmguard.synthesis.sample import Malformed, Outcome, Sample


def samples(count: int) -> Iterator[Sample | Malformed]:
    for number in range(count):
        yield Malformed(str(number), "")


async def test_all_are_done_and_never_more_than_so_many_together() -> None:
    running, most, begun = 0, 0, 0

    def counted() -> Iterator[Sample | Malformed]:
        nonlocal begun
        for one in samples(50):
            begun += 1
            yield one

    async def work(one: Sample | Malformed) -> Outcome:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        return Outcome(one.id, "source", "none")

    done = []
    async for found in local(counted(), work, 8):
        assert isinstance(found, Outcome)
        done.append(found.id)
        assert begun - len(done) <= 8 * 3  # begun, done and not taken, and the one at hand: never the whole source
    assert sorted(done, key=int) == [str(number) for number in range(50)]
    assert most == 8


async def test_one_that_is_interrupted_does_not_stop_the_others() -> None:
    async def work(one: Sample | Malformed) -> Outcome:
        if one.id == "1":
            raise Interrupted(sample("1"), "causal", Timeout("late"))
        return Outcome(one.id, "source", "none")

    found = [one async for one in local(samples(4), work, 2)]
    assert sum(isinstance(one, Interrupted) for one in found) == 1
    assert sum(isinstance(one, Outcome) for one in found) == 3


async def test_what_every_sample_would_meet_ends_it() -> None:
    waiting = asyncio.Event()
    cancelled = []

    async def work(one: Sample | Malformed) -> Outcome:
        if one.id == "3":
            raise AuthenticationFailed("no key")
        try:
            await waiting.wait()
        except asyncio.CancelledError:
            cancelled.append(one.id)
            raise
        raise AssertionError

    with pytest.raises(AuthenticationFailed):
        async for _ in local(samples(100), work, 4):
            pass
    assert len(cancelled) == 3


async def test_a_source_that_breaks_ends_it_after_what_was_done() -> None:
    def broken() -> Iterator[Sample | Malformed]:
        yield from samples(2)
        raise OSError("gone")

    async def work(one: Sample | Malformed) -> Outcome:
        return Outcome(one.id, "source", "none")

    engine = local(broken(), work, 1)
    assert [(await anext(engine)), (await anext(engine))] == [
        Outcome("0", "source", "none"),
        Outcome("1", "source", "none"),
    ]
    with pytest.raises(OSError, match="gone"):
        await anext(engine)


async def test_leaving_early_leaves_nothing_running() -> None:
    async def work(one: Sample | Malformed) -> Outcome:
        return Outcome(one.id, "source", "none")

    engine = local(samples(1000), work, 4)
    async for _ in engine:
        break
    await engine.aclose()  # type: ignore[attr-defined]
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others
