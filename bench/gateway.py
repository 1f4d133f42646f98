"""What the gateway adds to a request, beside a LiteLLM proxy: python -m bench.gateway --litellm build/litellm/bin/litellm

One instant mock upstream. Every way to it is measured in every round, one after the other, so that they share the
machine's moods: direct; through us with the guard off, in shadow, and rewriting (a scripted rewriter each time); and
through LiteLLM (make counterparts). A chat of 1 KB,
and one with a picture of 1 MB; 1, 16 and 64 clients. The load comes from this process over plain sockets.

Prints JSON: requests a second, milliseconds added at p50, p95 and p99 (over the direct way), requests a second of
processor time, and our ratios to LiteLLM.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import uvloop

HERE = Path(__file__).parent
ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "mock",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "A short answer."}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
    }
).encode()
START_SECONDS = 90
WARM_UP_REQUESTS = 30


class Mock(asyncio.Protocol):
    """Answers every request at once; reads no more of it than where it ends."""

    REPLY = (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: "
        + str(len(ANSWER)).encode()
        + b"\r\n\r\n"
        + ANSWER
    )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.head, self.left = b"", 0

    def data_received(self, data: bytes) -> None:
        while data:
            if not self.left:
                self.head += data
                head, found, data = self.head.partition(b"\r\n\r\n")
                if not found:
                    return
                self.head, self.left = b"", length_in(head)
            taken = min(self.left, len(data))
            self.left, data = self.left - taken, data[taken:]
            if not self.left:
                self.transport.write(self.REPLY)  # type: ignore[attr-defined]


class Client(asyncio.Protocol):
    """One connection that sends a request and waits for the whole answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer, self.answered = b"", asyncio.get_running_loop().create_future()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if found and (len(body) >= length_in(head) if b"chunked" not in head else body.endswith(b"0\r\n\r\n")):
            self.buffer = b""
            if not self.answered.done():
                self.answered.set_result(int(head.split(b" ", 2)[1]))

    def connection_lost(self, error: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(ConnectionError("the server hung up"))

    async def ask(self, request: bytes) -> int:
        self.answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)  # type: ignore[attr-defined]
        status: int = await self.answered
        return status


def length_in(head: bytes) -> int:
    at = head.lower().find(b"content-length:")
    return int(head[at + 15 : head.find(b"\r", at) if head.find(b"\r", at) > 0 else None]) if at >= 0 else 0


@dataclass
class Way:
    """One way to the upstream, and what was measured of it, by (payload, clients)."""

    name: str
    port: int
    process: psutil.Process | None = None
    key: str = ""
    latencies: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    rates: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    per_core: dict[tuple[str, int], list[float]] = field(default_factory=dict)
    failed: int = 0

    def request(self, body: bytes) -> bytes:
        auth = f"authorization: Bearer {self.key}\r\n" if self.key else ""
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\ncontent-type: application/json\r\n"
            f"{auth}content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def processor_seconds(self) -> float:
        if self.process is None:
            return 0.0
        every = [self.process, *self.process.children(recursive=True)]
        return sum(sum(one.cpu_times()[:2]) for one in every)


def bodies() -> dict[str, bytes]:
    """A chat of about 1 KB, and one with a picture whose file has 1 MB."""
    text = "Please tell me what is worth seeing in this town on a rainy day. " * 14
    picture = base64.b64encode(b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(2**20)).decode()
    parts = [
        {"type": "text", "text": "What is in the picture?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
    ]
    return {
        name: json.dumps({"model": "mock", "messages": [{"role": "user", "content": content}]}).encode()
        for name, content in (("text", text), ("image", parts))
    }


async def measure(way: Way, name: str, body: bytes, clients: int, seconds: float) -> None:
    loop = asyncio.get_running_loop()
    request = way.request(body)
    latencies: list[float] = []
    until = 0.0

    async def work() -> None:
        _, client = await loop.create_connection(Client, "127.0.0.1", way.port)
        while time.perf_counter() < until:
            begun = time.perf_counter()
            if await client.ask(request) == 200:
                latencies.append(time.perf_counter() - begun)
            else:
                way.failed += 1
        client.transport.close()

    spent, begun = way.processor_seconds(), time.perf_counter()
    until = begun + seconds
    await asyncio.gather(*(work() for _ in range(clients)))
    took, spent = time.perf_counter() - begun, way.processor_seconds() - spent
    key = name, clients
    way.latencies.setdefault(key, []).extend(latencies)
    way.rates.setdefault(key, []).append(len(latencies) / took)
    if spent:
        way.per_core.setdefault(key, []).append(len(latencies) / spent)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextmanager
def server(command: list[str], port: int, log: Path, **environment: str) -> Iterator[psutil.Process]:
    """The command as a process, once its port answers. Raises RuntimeError with the end of its log when it does not."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **environment})
    try:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-2000:]}") from None
                time.sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(20)


def ours(mode: str, port: int, upstream: int, folder: Path) -> list[str]:
    config = folder / f"{mode}.toml"
    config.write_text(
        f'[server]\nport = {port}\n[target]\nurl = "http://127.0.0.1:{upstream}/v1"\n'
        f'[guard]\nrewriter = "{HERE / "scripted_rewriter.py"}:{"Risky" if mode == "rewrite" else "Harmless"}"\n'
        f'[policy]\nmode = "{mode}"\n[audit_log]\nurl = "sqlite:///{folder / mode}.sqlite3"\n'
        f'[telemetry]\nlog_level = "warning"\n'
    )
    return [sys.executable, "-m", "vlmguard", "serve", "--config", str(config)]


def litellm(program: str, port: int, upstream: int, folder: Path) -> list[str]:
    config = folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: mock\n    litellm_params:\n      model: openai/mock\n"
        f"      api_base: http://127.0.0.1:{upstream}/v1\n      api_key: none\n"
        "litellm_settings:\n  telemetry: false\n"
        "general_settings:\n  dangerously_permit_weak_or_unset_master_key: true\n"  # ours asks for no key either
    )
    return [program, "--config", str(config), "--port", str(port), "--host", "127.0.0.1", "--num_workers", "1"]


def row(way: Way, direct: Way, key: tuple[str, int]) -> dict[str, float]:
    def at(one: Way, share: float) -> float:
        return statistics.quantiles(one.latencies[key], n=1000)[round(share * 1000) - 1] * 1000

    made = {"requests_per_second": round(statistics.median(way.rates[key]), 1)}
    if way.per_core.get(key):
        made["requests_per_core_second"] = round(statistics.median(way.per_core[key]), 1)
    for share in (0.5, 0.95, 0.99):
        made[f"added_p{share * 100:.0f}_ms"] = round(at(way, share) - at(direct, share), 3)
    return made


async def rounds(ways: list[Way], count: int, seconds: float, clients: list[int]) -> None:
    payloads = bodies()
    for number in range(-1, count):  # the first warms up
        for name, body in payloads.items():
            for many in clients:
                for way in ways:
                    if number < 0:
                        await measure(way, name, body, many, min(seconds, 1.0))
                        way.latencies.clear(), way.rates.clear(), way.per_core.clear()
                    else:
                        await measure(way, name, body, many, seconds)
        print(f"round {number + 1} of {count}", file=sys.stderr, flush=True)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--litellm", metavar="PROGRAM", help="a LiteLLM proxy's command; without it, none is measured")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    options.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    options.add_argument("--mock", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.mock:
        uvloop.run(serve_mock(given.mock))
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        upstream = free_port()
        stack.enter_context(
            server([sys.executable, "-m", "bench.gateway", "--mock", str(upstream)], upstream, folder / "mock.log")
        )
        ways = [Way("direct", upstream)]
        for mode in ("off", "shadow", "rewrite"):
            port = free_port()
            process = stack.enter_context(server(ours(mode, port, upstream, folder), port, folder / f"{mode}.log"))
            ways.append(Way(mode, port, process))
        if given.litellm:
            port = free_port()
            command = litellm(given.litellm, port, upstream, folder)
            process = stack.enter_context(server(command, port, folder / "litellm.log", NO_PROXY="127.0.0.1"))
            ways.append(Way("litellm", port, process))
        uvloop.run(rounds(ways, given.rounds, given.seconds, given.clients))
    print(json.dumps(told(ways), indent=1))


def told(ways: list[Way]) -> dict[str, Any]:
    direct = ways[0]
    keys = sorted(direct.rates)
    made: dict[str, Any] = {
        f"{name}, {clients} clients": {way.name: row(way, direct, (name, clients)) for way in ways}
        for name, clients in keys
    }
    made["failed"] = {way.name: way.failed for way in ways}
    named = {way.name: way for way in ways}
    if "litellm" in named:
        made["shadow to litellm"] = {
            f"{name}, {clients} clients": ratios(named["shadow"], named["litellm"], direct, (name, clients))
            for name, clients in keys
        }
    return made


def ratios(own: Way, other: Way, direct: Way, key: tuple[str, int]) -> dict[str, float]:
    mine, theirs = row(own, direct, key), row(other, direct, key)
    made = {"throughput": round(mine["requests_per_second"] / theirs["requests_per_second"], 1)}
    for name in ("added_p50_ms", "added_p99_ms"):
        made[name] = round(mine[name] / theirs[name], 4)
    return made


async def serve_mock(port: int) -> None:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(Mock, "127.0.0.1", port)
    await listening.serve_forever()


if __name__ == "__main__":
    main()
