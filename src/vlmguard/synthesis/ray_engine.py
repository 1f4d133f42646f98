"""The pipeline on Ray Data: any number of machines, each with its own models or clients.

    driver: source -> queue --> read task -> blocks --> actors (recipe.open() once each) --> blocks of outcomes --> journal

The queue holds few samples, so the source is read no faster than the actors work. An outcome is written by the driver as its block
arrives: what has arrived survives a kill, the rest is done again. The analyst's answers are not recorded here: every actor would
need the one file.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, Final, Self

from vlmguard.errors import VLMGuardError, missing_extra
from vlmguard.synthesis.engines import Found
from vlmguard.synthesis.pipeline import Interrupted, Pipeline
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.sample import Malformed, Sample

AHEAD: Final = 2  # samples in the queue for each that may be in work
COLUMN: Final = "pickled"


class RayEngine:
    """An engine, see `run.Engine`. A context: it joins the cluster of $RAY_ADDRESS, else starts a local one and ends it.

    Args:
        concurrency: samples in work, over all actors.
        actors: by default one for each two processors of the cluster.

    Raises:
        MissingExtra: "ray" is not installed. VLMGuardError: an actor died for good.
    """

    def __init__(self, recipe: Recipe, concurrency: int, actors: int | None = None) -> None:
        self.recipe, self.concurrency, self._actors = recipe, concurrency, actors

    def __enter__(self) -> Self:
        try:
            import ray
        except ImportError as error:
            raise missing_extra("ray", "ray") from error
        self._started = not ray.is_initialized()
        if self._started:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            address = os.environ.get("RAY_ADDRESS")
            local = {} if address else {"include_dashboard": False, "num_cpus": max(2, os.cpu_count() or 1)}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = None  # a block goes on as it is: none waits until 128 MiB have come
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._started:
            ray.shutdown()

    @property
    def actors(self) -> int:
        import ray

        return self._actors or max(1, int(ray.cluster_resources().get("CPU", 1)) // 2)

    async def __call__(self, samples: Iterator[Sample | Malformed]) -> AsyncIterator[Found]:
        arriving: asyncio.Queue[Found | BaseException | None] = asyncio.Queue(self.concurrency)
        loop = asyncio.get_running_loop()
        left = threading.Event()  # nobody reads any more

        def give(one: Found | BaseException | None) -> None:
            asyncio.run_coroutine_threadsafe(arriving.put(one), loop).result()

        def drive() -> None:
            try:
                for one in self._outcomes(samples, left):
                    if left.is_set():
                        return
                    give(one)
            except Exception as error:  # noqa: BLE001 (handed on to the one who reads)
                give(error)
            else:
                give(None)

        threading.Thread(target=drive, name="ray", daemon=True).start()
        try:
            while (one := await arriving.get()) is not None:
                if isinstance(one, BaseException) and not isinstance(one, Interrupted):
                    raise one
                yield one
        finally:
            left.set()

    def _outcomes(self, samples: Iterator[Sample | Malformed], left: threading.Event) -> Iterator[Found]:
        import ray
        from ray.exceptions import RayActorError, RayError
        from ray.util.queue import Queue

        queue = Queue(maxsize=AHEAD * self.concurrency, actor_options={"num_cpus": 0})
        failed: list[BaseException] = []

        def feed() -> None:
            try:
                for sample in samples:
                    if left.is_set():
                        break
                    queue.put(pickle.dumps(sample))
            except Exception as error:  # noqa: BLE001 (the source's; raised by the reader below)
                failed.append(error)
            finally:
                queue.put(None)

        feeding = threading.Thread(target=feed, name="samples", daemon=True)
        feeding.start()
        actors = min(self.actors, self.concurrency)
        each = -(-self.concurrency // actors)
        done = ray.data.read_datasource(_source(queue), override_num_blocks=1).map_batches(
            _Worker,
            fn_constructor_args=(self.recipe,),
            batch_size=1,  # an outcome comes back with its batch: the slowest of several would hold up the others
            compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2 * each),
            num_cpus=1,
            max_concurrency=each,
        )
        try:
            for row in done.iter_rows():
                found = pickle.loads(row[COLUMN])
                if isinstance(found, Exception) and not isinstance(found, Interrupted):
                    raise found
                yield found
        except RayActorError as error:
            raise VLMGuardError("an actor of Ray died", "Look at Ray's logs; then run again with --resume.") from error
        except RayError as error:
            raise VLMGuardError(f"Ray failed: {type(error).__name__}", "Look at Ray's logs.") from error
        if failed:
            raise failed[0]


def _source(queue: Any) -> Any:
    """A data source of one task that gives what the queue gives, block by block, until None."""
    import pyarrow
    from ray.data import Datasource
    from ray.data.block import BlockMetadata
    from ray.data.datasource import ReadTask

    def read() -> Iterator[Any]:
        ended = False
        while not ended:
            one = queue.get()
            ended = one is None
            if not ended:
                yield pyarrow.table({COLUMN: pyarrow.array([one], pyarrow.binary())})

    class Queued(Datasource):  # type: ignore[misc]
        def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(read, unknown)]

        def estimate_inmemory_data_size(self) -> int | None:
            return None

    return Queued()


class _Worker:
    """An actor's part: the pipeline, opened once on the actor's own event loop."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._opening = asyncio.Lock()
        self._pipeline: Pipeline | None = None
        self._stack = AsyncExitStack()

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        yield {COLUMN: [pickle.dumps(await self._one(pickle.loads(one))) for one in batch[COLUMN]]}

    async def _one(self, sample: Sample | Malformed) -> Found | Exception:
        """What is raised comes back as a value: Ray would wrap it, and try the block again."""
        try:
            async with self._opening:
                if self._pipeline is None:
                    self._pipeline = await self._stack.enter_async_context(self.recipe.open())
            return await self._pipeline(sample)
        except Exception as error:  # noqa: BLE001 (the driver raises it)
            return error
