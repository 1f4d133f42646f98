"""How samples are worked on: in this process, several at a time; or on Ray, see `ray_engine`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

from vlmguard.synthesis.pipeline import Interrupted
from vlmguard.synthesis.sample import Malformed, Outcome, Sample

Found: TypeAlias = Outcome | Interrupted
Work: TypeAlias = Callable[[Sample | Malformed], Awaitable[Outcome]]


async def local(samples: Iterator[Sample | Malformed], work: Work, concurrency: int) -> AsyncIterator[Found]:
    """What became of each sample, in the order in which they are done; `concurrency` are begun and not done at any time.

    Raises what `work` raises beside Interrupted, and what the source raises; the others are cancelled then.
    """
    found: asyncio.Queue[Found | BaseException | None] = asyncio.Queue(concurrency)
    turn = asyncio.Lock()

    async def worker() -> None:
        while True:
            async with turn:  # a generator gives one thing at a time
                sample = await asyncio.to_thread(next, samples, None)
            if sample is None:
                return
            try:
                await found.put(await work(sample))
            except Interrupted as interrupted:
                await found.put(interrupted)

    workers = [asyncio.create_task(worker()) for _ in range(concurrency)]

    async def watch() -> None:
        try:
            await asyncio.gather(*workers)
        except Exception as error:  # noqa: BLE001 (handed on to the one who reads)
            await found.put(error)
        await found.put(None)

    watcher = asyncio.create_task(watch())
    try:
        while (one := await found.get()) is not None:
            if isinstance(one, BaseException) and not isinstance(one, Interrupted):
                raise one
            yield one
    finally:
        for task in (*workers, watcher):
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*workers, watcher, return_exceptions=True)
