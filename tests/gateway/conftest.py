"""One upstream and one gateway with default settings for all tests of a file, which share their event loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.gateway.running import Running, Upstream, running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_upstream() -> AsyncIterator[Upstream]:
    async with Upstream() as upstream:
        yield upstream


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_gateway(shared_upstream: Upstream) -> AsyncIterator[Running]:
    async with running(shared_upstream) as gateway:
        yield gateway


@pytest.fixture
def upstream(shared_upstream: Upstream) -> Iterator[Upstream]:
    """It says what is ordinary until a test has it say something else."""
    shared_upstream.says()
    yield shared_upstream
    shared_upstream.says()


@pytest.fixture
def gateway(shared_gateway: Running, upstream: Upstream) -> Running:
    """In front of `upstream`."""
    shared_gateway.rewriter.judged.clear()
    return shared_gateway
