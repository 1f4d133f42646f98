"""What every backend must do, once for all of them. A new one is added to `BACKENDS`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests import tiny
from tests.chat_server import ChatServer, Reply, said, streamed
from vlmguard.chat import Chat, Response
from vlmguard.images import to_data_uri
from vlmguard.vlms.endpoint import Endpoint
from vlmguard.vlms.local import Local
from vlmguard.vlms.protocol import VLM, Capability, closing, need
from vlmguard.vlms.scripted import Scripted

TEXT = "a cat sits"


@asynccontextmanager
async def scripted() -> AsyncIterator[VLM]:
    yield Scripted(TEXT, delay=0.01)


class BothWays(ChatServer):
    """Streams when asked to."""

    def reply(self) -> Reply:
        body = streamed("a cat ", "sits") if self.requests[-1]["stream"] else said(TEXT)
        return Reply(body, delay=0.05, gap=0.05)


@asynccontextmanager
async def endpoint() -> AsyncIterator[VLM]:
    async with BothWays() as server:
        yield Endpoint(server.url, "ours")


@asynccontextmanager
async def local() -> AsyncIterator[VLM]:
    yield Local(*tiny.build("llava"), "tiny")


BACKENDS = {"scripted": scripted, "endpoint": endpoint, "local": local}


@pytest.fixture(params=BACKENDS)
async def vlm(request: pytest.FixtureRequest) -> AsyncIterator[VLM]:
    async with BACKENDS[request.param]() as made:
        yield made
        await made.aclose()
        await made.aclose()  # closing twice does no harm


@pytest.fixture
def chat(red_square: bytes) -> Chat:
    return Chat.of("what is it?", [red_square], max_tokens=6, temperature=0)


@pytest.fixture
def red_square() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(file, "PNG")
    return file.getvalue()


def test_it_is_a_vlm_with_a_name_and_abilities(vlm: VLM) -> None:
    assert isinstance(vlm, VLM)
    assert vlm.name
    need(vlm, {Capability.TEXT, Capability.NO_IMAGE, Capability.TEMPERATURE}, "this test")


async def test_a_call_answers_and_counts(vlm: VLM, chat: Chat) -> None:
    response = await vlm(chat)
    assert response.text
    assert response.finish_reason in ("stop", "length")
    assert response.usage.calls == 1
    assert response.usage.prompt_tokens > 0
    assert response.usage.completion_tokens > 0
    assert response.usage.seconds > 0
    assert response.trace == ()


async def test_a_stream_is_texts_then_one_response(vlm: VLM, chat: Chat) -> None:
    whole = await vlm(chat)
    *texts, response = [piece async for piece in vlm.stream(chat)]
    assert all(isinstance(text, str) and text for text in texts)
    assert isinstance(response, Response)
    assert "".join(map(str, texts)) == response.text == whole.text
    assert response.usage.calls == 1
    assert response.usage.completion_tokens == whole.usage.completion_tokens


async def test_the_chat_is_unchanged(vlm: VLM, chat: Chat, red_square: bytes) -> None:
    before = chat.to_wire()
    await vlm(chat)
    async for _ in vlm.stream(chat):
        pass
    assert chat.to_wire() == before
    assert chat.images[0].url == to_data_uri(red_square)


async def test_many_at_once_answer_as_one(vlm: VLM, chat: Chat) -> None:
    alone = (await vlm(chat)).text
    assert {response.text for response in await asyncio.gather(*(vlm(chat) for _ in range(8)))} == {alone}


async def test_without_a_picture(vlm: VLM) -> None:
    assert (await vlm(Chat.of("hello", max_tokens=6))).usage.calls == 1


async def test_a_cancelled_call_leaves_it_usable(vlm: VLM, chat: Chat) -> None:
    task = asyncio.create_task(vlm(chat))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await vlm(chat)).text


async def test_a_stream_left_early_leaves_it_usable(vlm: VLM, chat: Chat) -> None:
    async with closing(vlm.stream(chat)) as stream:
        assert isinstance(await anext(stream), str)
    assert (await vlm(chat)).text
