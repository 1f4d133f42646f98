import asyncio

import pytest

from vlmguard.errors import RateLimited
from vlmguard.gateway.admission import Admission


class Guest:
    """Goes in and stays until told to leave."""

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.inside = asyncio.Event()
        self.done = asyncio.Event()
        self.task = asyncio.create_task(self._visit())

    async def _visit(self) -> None:
        async with self.admission:
            self.inside.set()
            await self.done.wait()

    async def leave(self) -> None:
        self.done.set()
        await self.task
        await turns()


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def guests(admission: Admission, count: int) -> list[Guest]:
    made = [Guest(admission) for _ in range(count)]
    await turns()
    return made


async def test_who_waits_gets_in_in_turn() -> None:
    admission = Admission(2, 8, 60)
    all_ = await guests(admission, 6)
    assert (admission.running, admission.waiting) == (2, 4)
    for number, guest in enumerate(all_):
        await guest.leave()
        assert [one.inside.is_set() for one in all_] == [at < number + 3 for at in range(6)]
    assert (admission.running, admission.waiting) == (0, 0)


async def test_a_full_queue_refuses_at_once() -> None:
    admission = Admission(1, 1, 20)
    all_ = await guests(admission, 2)
    with pytest.raises(RateLimited, match=r"its queue is full\. Try again later\.") as caught:
        async with admission:
            raise AssertionError("nobody gets in")
    assert caught.value.retry_after == 20
    assert (admission.running, admission.waiting) == (1, 1)
    for guest in all_:
        await guest.leave()
    async with admission:
        assert admission.running == 1


async def test_without_a_queue() -> None:
    admission = Admission(1, 0, 0.001)
    (guest,) = await guests(admission, 1)
    with pytest.raises(RateLimited, match="queue is full") as caught:
        async with admission:
            raise AssertionError("nobody gets in")
    assert caught.value.retry_after == 1
    await guest.leave()


async def test_a_wait_that_takes_too_long_ends() -> None:
    admission = Admission(1, 5, 0.01)
    (guest,) = await guests(admission, 1)
    with pytest.raises(RateLimited, match=r"no place in 0\.01 s"):
        async with admission:
            raise AssertionError("nobody gets in")
    assert (admission.running, admission.waiting) == (1, 0)
    await guest.leave()
    assert admission.running == 0


async def test_who_gives_up_waiting_frees_the_queue() -> None:
    admission = Admission(1, 2, 60)
    inside, gone, last = await guests(admission, 3)
    gone.task.cancel()
    await turns()
    assert gone.task.cancelled()
    assert (admission.running, admission.waiting) == (1, 1)
    await inside.leave()
    assert last.inside.is_set()
    await last.leave()
    assert admission.running == 0


async def test_who_leaves_as_the_place_comes_hands_it_on() -> None:
    admission = Admission(1, 2, 60)
    inside, gone, last = await guests(admission, 3)
    inside.done.set()
    await asyncio.sleep(0)  # it leaves: the place is the next one's, who has not run yet
    assert (admission.waiting, gone.inside.is_set()) == (1, False)
    gone.task.cancel()
    await turns()
    assert gone.task.cancelled()
    assert last.inside.is_set()
    assert admission.running == 1
    await last.leave()
    assert admission.running == 0


async def test_all_who_wait_may_give_up_as_the_place_comes_free() -> None:
    admission = Admission(1, 5, 60)
    inside, *others = await guests(admission, 4)
    inside.done.set()
    for guest in others:
        guest.task.cancel()  # they run after the one inside, which finds them in the queue
    await turns()
    await inside.task
    assert (admission.running, admission.waiting) == (0, 0)
    await asyncio.wait_for(admission.drain(), 1)


async def test_who_is_cancelled_as_the_wait_ends_was_never_inside() -> None:
    admission = Admission(1, 5, 60)
    inside, other = await guests(admission, 2)
    (place,) = admission._queue
    admission._expire(place)
    other.task.cancel()
    await turns()
    assert other.task.cancelled()
    assert (admission.running, admission.waiting) == (1, 0)
    await inside.leave()


async def test_an_error_inside_frees_the_place() -> None:
    admission = Admission(1, 0, 60)
    with pytest.raises(KeyError):
        async with admission:
            raise KeyError
    async with admission:
        assert admission.running == 1
    assert admission.running == 0


async def test_draining_waits_for_all_inside_and_in_the_queue_and_lets_no_one_else_in() -> None:
    admission = Admission(1, 5, 60)
    first, second = await guests(admission, 2)
    drained = asyncio.create_task(admission.drain())
    await turns()
    with pytest.raises(RateLimited, match="shutting down"):
        async with admission:
            raise AssertionError("nobody gets in")
    await first.leave()
    assert second.inside.is_set()
    assert not drained.done()
    await second.leave()
    assert drained.done()


async def test_an_idle_one_is_drained_at_once() -> None:
    await asyncio.wait_for(Admission(1, 1, 1).drain(), 1)


async def test_many_at_random_never_exceed_the_places_and_none_is_lost() -> None:
    admission, most, served = Admission(3, 1000, 60), 0, 0

    async def visit(number: int) -> None:
        nonlocal most, served
        async with admission:
            most = max(most, admission.running)
            for _ in range(number % 4):
                await asyncio.sleep(0)
        served += 1

    tasks = [asyncio.create_task(visit(number)) for number in range(300)]
    for number, task in enumerate(tasks):
        if number % 7 == 0:
            await asyncio.sleep(0)
            task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3
    assert served == outcomes.count(None)
    assert served >= 250
    assert (admission.running, admission.waiting) == (0, 0)
