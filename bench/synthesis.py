"""How the pipeline keeps an endpoint busy, and its memory: python -m bench.synthesis [--rows 100 300 1000 3000] [--ray]

A scripted endpoint in a process of its own: OpenAI's shape, K slots, log-normal latency (median `--latency`, sigma 0.3), valid
answers of the three stages. A plain load generator measures its throughput at the same concurrency, then the pipeline runs over
so many rows. Latency is shorter than a real model's, so that this runs in minutes: the pipeline's own cost weighs more than in
life.

Prints JSON: calls a second of both, their ratio, rows a second, and resident memory at the end of each size.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
from aiohttp import web
from PIL import Image

from vlmguard.synthesis import engines
from vlmguard.synthesis.recipe import Recipe
from vlmguard.synthesis.run import Folder, run, write_dataset
from vlmguard.synthesis.sample import Answer, Malformed, Origin, Picture, Sample

ANSWERS = {
    "You study": {"features": [{"harm": "a fall", "source": "both", "driver": "It went along with the edge."}]},
    "You find": {
        "textual": "Asks for a pose.",
        "visual": "A cliff.",
        "multimodal": "Posing there could end in a fall.",
        "risky": True,
        "category": "physical_danger",
        "triggers": {"text": ["pose"], "image": ["a cliff"]},
        "interactions": ["The pose leads to the edge."],
    },
    "You rewrite": {"intent": "A picture.", "prompt": "Which pose suits a picture well back from the edge?"},
}
SIGMA = 0.3


async def serve(port: int, slots: int, latency: float) -> None:
    free, rng = asyncio.Semaphore(slots), random.Random(0)

    async def answer(request: web.Request) -> web.Response:
        asked = await request.json()
        async with free:
            await asyncio.sleep(rng.lognormvariate(0, SIGMA) * latency)
        system = asked["messages"][0]["content"]
        said = next((one for start, one in ANSWERS.items() if system.startswith(start)), {})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": json.dumps(said)}}
        usage = {"prompt_tokens": 500, "completion_tokens": 100, "total_tokens": 600}
        return web.json_response({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


async def plain(port: int, at_once: int, calls: int) -> float:
    """Calls a second of a client that does nothing else."""
    body = {
        "model": "m",
        "messages": [{"role": "system", "content": "You study"}, {"role": "user", "content": "x" * 2000}],
    }
    left = iter(range(calls))

    async def worker(session: aiohttp.ClientSession) -> None:
        for _ in left:
            async with session.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body) as answer:
                await answer.read()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        begun = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(at_once)))
        return calls / (time.perf_counter() - begun)


def samples(count: int, png: bytes) -> Iterator[Sample | Malformed]:
    for number in range(count):
        yield Sample(
            f"s{number}",
            (Picture("x.png", data=png),),
            f"Which pose looks best here, number {number}?",
            Origin("made-up", "CC0"),
            Answer("Stay back."),
            Answer("Go on!"),
        )


async def piped(port: int, at_once: int, rows: int, folder: Path, *, ray: bool) -> tuple[float, int]:
    """(rows a second, resident MiB)."""
    data = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(data, "PNG")
    recipe = Recipe("bench", f"http://127.0.0.1:{port}/v1#m", checks=("form",))

    def every() -> Iterator[Sample | Malformed]:
        return samples(rows, data.getvalue())

    with Folder(folder, recipe, resume=False) as opened:
        begun = time.perf_counter()
        if ray:
            from vlmguard.synthesis.ray_engine import RayEngine

            with RayEngine(recipe, at_once) as engine:
                begun = time.perf_counter()
                progress = await run(opened, every, engine)
        else:
            async with recipe.open(folder / "answers.jsonl") as pipeline:

                def here(todo: Iterator[Sample | Malformed]) -> AsyncIterator[engines.Found]:
                    return engines.local(todo, pipeline, at_once)

                progress = await run(opened, every, here)
        took = time.perf_counter() - begun
        assert (progress.kept, progress.failed) == (rows, 0)
        write_dataset(opened, every, lambda sample, row: None)
    return rows / took, psutil.Process().memory_info().rss // 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=int, nargs="+", default=[100, 300, 1000, 3000])
    options.add_argument("--slots", type=int, default=32)
    options.add_argument("--latency", type=float, default=0.4, help="median seconds of an answer")
    options.add_argument("--ray", action="store_true")
    options.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.serve:
        uvloop.run(serve(given.serve, given.slots, given.latency))
        return
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "bench.synthesis", "--serve", str(port)]
    server = subprocess.Popen([*command, "--slots", str(given.slots), "--latency", str(given.latency)])
    try:
        time.sleep(3)
        told: dict[str, Any] = {
            "slots": given.slots,
            "median_seconds": given.latency,
            "engine": "ray" if given.ray else "local",
        }
        with tempfile.TemporaryDirectory() as folder:
            for rows in given.rows:
                alone = asyncio.run(plain(port, given.slots, min(3 * rows, 40 * given.slots)))
                speed, resident = asyncio.run(piped(port, given.slots, rows, Path(folder) / str(rows), ray=given.ray))
                told[f"{rows} rows"] = {
                    "endpoint_calls_per_second": round(alone, 1),
                    "calls_per_second": round(3 * speed, 1),
                    "ratio": round(3 * speed / alone, 3),
                    "rows_per_second": round(speed, 2),
                    "resident_mib": resident,
                }
        print(json.dumps(told, indent=1))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
