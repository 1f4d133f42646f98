import asyncio
import time

import pytest

from vlmguard.chat import Chat, Response
from vlmguard.errors import ConfigError, RateLimited
from vlmguard.vlms.scripted import Scripted

pytestmark = pytest.mark.asyncio


async def test_a_list_answers_in_order_and_then_says_what_is_wrong() -> None:
    vlm = Scripted(["one", Response("two", "length"), RateLimited("slow down")])
    assert (await vlm(Chat.of("a"))).text == "one"
    assert (await vlm(Chat.of("b"))).finish_reason == "length"
    with pytest.raises(RateLimited):
        await vlm(Chat.of("c"))
    with pytest.raises(ConfigError, match="3 answers and was asked 4 times"):
        await vlm(Chat.of("d"))
    assert [chat.text for chat in vlm.calls] == ["a", "b", "c", "d"]


async def test_a_dict_answers_by_text_and_has_a_default() -> None:
    vlm = Scripted({"hi": "hello", "": "what?"})
    assert (await vlm(Chat.of("hi"))).text == "hello"
    assert (await vlm(Chat.of("other"))).text == "what?"
    with pytest.raises(ConfigError, match="no answer to this text"):
        await Scripted({"hi": "hello"})(Chat.of("other"))


async def test_a_function_sees_the_chat() -> None:
    assert (await Scripted(lambda chat: chat.text.upper())(Chat.of("hi"))).text == "HI"


@pytest.mark.parametrize("text", ["one two  three", " lead", "trail \n", "", "\n", "one"])
async def test_streams_word_by_word(text: str) -> None:
    *words, response = [piece async for piece in Scripted(text).stream(Chat.of("go"))]
    assert isinstance(response, Response)
    assert "".join(map(str, words)) == response.text == text


async def test_delay_and_cancellation() -> None:
    vlm = Scripted("late", delay=5)
    started = time.perf_counter()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(vlm(Chat.of("go")), 0.05)
    assert time.perf_counter() - started < 2
