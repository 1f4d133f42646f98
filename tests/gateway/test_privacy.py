"""Nothing that a user wrote stays behind, unless the operator wants it to."""

from __future__ import annotations

import asyncio
import base64
import io
from hashlib import sha256
from typing import Any

import pytest

from tests.gateway.audit_logs import raw
from tests.gateway.running import (
    CHAT,
    ROUTES,
    Reply,
    Running,
    Upstream,
    ask,
    picture,
    running,
    stream,
    whole,
)
from vlmguard.gateway.telemetry import configure_logs

pytestmark = pytest.mark.asyncio(loop_scope="module")

# What nobody may find


MARKER = "Xylophon-7391"


async def test_nothing_that_a_user_wrote_is_in_logs_metrics_or_audit_log(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes well or wrong."""
    lines = io.StringIO()
    configure_logs("debug", lines)
    secret = base64.b64encode(f"{MARKER} {MARKER} {MARKER}".encode()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{secret}"}}
    texts = [MARKER, f"risky {MARKER}", f"unreadable {MARKER}", f"locked {MARKER}", f"slow {MARKER}"]
    requests: list[tuple[str, Any]] = [(path, ask(path, text, user=MARKER)) for path in ROUTES for text in texts]
    requests += [(path, ask(path, text, stream=True)) for path in ROUTES for text in texts]
    requests += [
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": [image]}]}),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": [{"type": MARKER, MARKER: secret}]}]}),
        (CHAT, f'{{"{MARKER}": 1, "{MARKER}": 2}}'.encode()),
        (CHAT, f'{{"messages": "{MARKER}'.encode()),
        (CHAT, {"model": "m", "messages": [{"role": "user", "content": "x", "images": [MARKER]}]}),
    ]
    async with running(upstream, guard={"seconds": 0.05}) as gateway:

        def broken(chat: object) -> None:
            raise ZeroDivisionError(f"in {MARKER}")

        for replies in (
            [],
            [whole({"error": {"message": f"{MARKER} is wrong"}}, 400)],
            [whole({"error": {"message": MARKER}}, 401)],
            [Reply((MARKER.encode(),), 500, "text/html")],
            [Reply((MARKER.encode(),), raw=True)],
            [stream(b'data: {"x": "' + MARKER.encode())],
        ):
            upstream.says(*replies)
            await asyncio.gather(*(gateway.ask(path, body) for path, body in requests))
        monkeypatch.setattr(gateway.rewriter, "judge", broken)
        await gateway.ask(CHAT, ask(CHAT, MARKER))
        await gateway.ask(f"/{MARKER}?{MARKER}={MARKER}", ask(CHAT, MARKER))
        metrics = (await gateway.ask("/metrics", None, "GET")).body
        records = len(gateway.records())
        kept = raw(gateway.log)
    configure_logs("info")
    assert records == 6 * len(requests) + 1
    for place in (kept, metrics, lines.getvalue().encode()):
        assert len(place) > 500
        for form in (MARKER, secret, secret[:24]):
            assert form.encode() not in place


async def test_texts_are_recorded_where_the_operator_says_so(upstream: Upstream) -> None:
    async with running(upstream, audit_log={"texts": True}) as gateway:
        answer = await gateway.ask(CHAT, ask(CHAT, f"risky {MARKER}"))
        texts = gateway.record(answer).texts
        assert texts is not None
        assert (texts.original, texts.sent) == (f"risky {MARKER}", f"Safely: risky {MARKER}")


async def test_pictures_are_recorded_by_hash_and_size(gateway: Running, png: bytes) -> None:
    part = {"type": "image_url", "image_url": {"url": picture(png)}}
    answer = await gateway.ask(CHAT, {"model": "m", "messages": [{"role": "user", "content": [part]}]})
    (image,) = gateway.record(answer).images
    assert (image.sha256, image.bytes) == (sha256(png).hexdigest(), len(png))
