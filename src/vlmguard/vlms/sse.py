"""Server-sent events, as far as chat servers send them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    name: str  # "message" where the server gives none
    data: str


async def events(chunks: AsyncIterable[bytes], limit: int = 8 * 2**20) -> AsyncGenerator[Event, None]:
    """The events in a body that arrives in pieces of any size; comments (keep-alives) are left out.

    Raises:
        ValueError: a line is longer than `limit` bytes, or not UTF-8.
    """
    name, data = "message", list[str]()
    async for line in _lines(chunks, limit):
        if not line:
            if data:
                yield Event(name, "\n".join(data))
            name, data = "message", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
    if data:  # some servers leave out the last blank line
        yield Event(name, "\n".join(data))


async def _lines(chunks: AsyncIterable[bytes], limit: int) -> AsyncGenerator[str, None]:
    rest = b""
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode()
        if len(rest) > limit:
            raise ValueError(f"a line of over {limit} bytes")
    if rest:
        yield rest.removesuffix(b"\r").decode()
