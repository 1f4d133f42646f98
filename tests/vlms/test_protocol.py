from collections.abc import AsyncIterator

import pytest

from vlmguard.chat import Response
from vlmguard.errors import CapabilityError
from vlmguard.vlms.endpoint import Endpoint
from vlmguard.vlms.protocol import VLM, Capability, closing, need
from vlmguard.vlms.scripted import Scripted


def test_backends_are_vlms() -> None:
    assert isinstance(Scripted("yes"), VLM)
    assert isinstance(Endpoint("http://127.0.0.1:1/v1", "m"), VLM)


def test_need_passes_what_is_there() -> None:
    need(Scripted("yes"), {Capability.TEXT, Capability.NO_IMAGE}, "Ecso")


def test_need_names_guard_capability_and_backend() -> None:
    with pytest.raises(CapabilityError) as caught:
        need(Scripted("yes", name="target"), {Capability.HIDDEN, Capability.TEXT, Capability.LOGITS}, "Cmrm")
    message = str(caught.value)
    assert "Cmrm needs hidden, logits, which target (Scripted)" in message
    assert "hf:" in message


@pytest.mark.asyncio
async def test_closing_closes_the_stream() -> None:
    closed = []

    async def stream() -> AsyncIterator[str | Response]:
        try:
            yield "a"
            yield "b"
        finally:
            closed.append(True)

    async with closing(stream()) as texts:
        assert await anext(texts) == "a"
    assert closed
