"""`vlmguard serve`: processes, their start and their end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from typer.testing import Result

from tests.gateway.audit_logs import found
from tests.gateway.running import (
    CHAT,
    DONE,
    PATIENCE,
    REWRITER,
    Reply,
    Upstream,
    ask,
    chunk,
    completion,
    stream,
    until,
    whole,
)
from vlmguard.gateway.audit_record import Record
from vlmguard.gateway.config_text import toml

in_one_loop = pytest.mark.asyncio(loop_scope="module")

START_SECONDS = 90.0
BANNER = re.compile(r" at (http://\S+)/v1$", re.MULTILINE)


@dataclass
class Served:
    """A real `vlmguard serve`."""

    process: asyncio.subprocess.Process
    folder: Path
    session: aiohttp.ClientSession
    root: str = ""

    @property
    def said(self) -> str:
        return (self.folder / "said").read_text()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ends(self) -> int:
        async with asyncio.timeout(START_SECONDS):
            return await self.process.wait()

    def records(self) -> list[Record]:
        return found(self.folder / "log.sqlite3")

    def asking(self, path: str, body: Any = None, **headers: str) -> Any:
        given = {"content-type": "application/json", **{name.replace("_", "-"): it for name, it in headers.items()}}
        if body is None:
            return self.session.get(self.root + path)
        return self.session.post(self.root + path, data=json.dumps(body), headers=given)

    async def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        async with self.asking(path, body, **headers) as answer:
            return answer.status, await answer.read()


def settings(folder: Path, **sections: Mapping[str, Any]) -> Path:
    own: dict[str, Mapping[str, Any]] = {
        "server": {"port": 0},
        "guard": {"rewriter": REWRITER},
        "audit_log": {"url": f"sqlite:///{folder / 'log.sqlite3'}"},
    }
    merged = {name: {**own.get(name, {}), **sections.get(name, {})} for name in own | sections}
    path = folder / "vlmguard.toml"
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {toml(it)}\n" for key, it in table.items()) for name, table in merged.items()
    ]
    path.write_text("\n".join(lines))
    return path


@asynccontextmanager
async def served(folder: Path, *options: str, **sections: Mapping[str, Any]) -> AsyncIterator[Served]:
    config = settings(folder, **sections)
    with (folder / "said").open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vlmguard", "serve", "--config", str(config), *options, stdout=said, stderr=said
        )
    async with aiohttp.ClientSession(timeout=PATIENCE) as session:
        server = Served(process, folder, session)
        try:
            await until(lambda: process.returncode is not None or BANNER.search(server.said) is not None, START_SECONDS)
            if banner := BANNER.search(server.said):
                server.root = banner[1]
                await _ready(server)
            yield server
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def _ready(server: Served) -> None:
    async with asyncio.timeout(START_SECONDS):
        while server.process.returncode is None:
            try:
                async with server.session.get(f"{server.root}/health/ready"):
                    return
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.05)


# The end


@in_one_loop
async def test_a_stop_lets_a_stream_come_to_its_end(upstream: Upstream, tmp_path: Path) -> None:
    gate = asyncio.Event()
    upstream.says(stream(chunk("Hel"), gate, chunk("lo."), DONE))
    async with served(tmp_path, target={"url": upstream.url}) as server:
        async with server.asking(CHAT, ask(CHAT, stream=True), x_request_id="draining") as answer:
            assert await answer.content.readany() == chunk("Hel")
            server.signal(signal.SIGTERM)
            await until(lambda: not _listens(server.root))
            assert server.process.returncode is None
            gate.set()
            assert await answer.read() == chunk("lo.") + DONE
        assert await server.ends() == 0
        (record,) = server.records()
        assert (record.request_id, record.action) == ("draining", "passed")
        assert "Traceback" not in server.said


@in_one_loop
async def test_what_outlasts_the_drain_is_told_of_it_and_recorded(upstream: Upstream, tmp_path: Path) -> None:
    upstream.says(stream(chunk("Hel"), 60.0))
    async with served(tmp_path, target={"url": upstream.url}, server={"drain_seconds": 1}) as server:
        async with server.asking(CHAT, ask(CHAT, stream=True)) as answer:
            await answer.content.readany()
            server.signal(signal.SIGTERM)
            rest = await answer.read()
        assert b"shutting down" in rest
        assert rest.endswith(DONE)
        assert await server.ends() == 0
        (record,) = server.records()
        assert (record.action, record.note) == ("error", "the gateway stopped")
        assert "Traceback" not in server.said


def _listens(root: str) -> bool:
    host, _, port = root.removeprefix("http://").rpartition(":")
    with socket.socket() as one:
        return one.connect_ex((host, int(port))) == 0


@in_one_loop
async def test_a_kill_loses_no_answered_requests_record(upstream: Upstream, tmp_path: Path) -> None:
    upstream.says(Reply((0.005, json.dumps(completion()).encode())))
    answered: list[str] = []
    async with served(tmp_path, target={"url": upstream.url}, telemetry={"log_level": "error"}) as server:

        async def load(worker: int) -> None:
            for number in range(10_000):
                name = f"{worker}-{number}"
                try:
                    status, body = await server.ask(CHAT, ask(CHAT), x_request_id=name)
                except aiohttp.ClientError:
                    return
                assert status == 200
                assert json.loads(body) == completion()
                answered.append(name)

        loads = [asyncio.create_task(load(worker)) for worker in range(8)]
        await until(lambda: len(answered) > 150)
        server.signal(signal.SIGKILL)
        await asyncio.gather(*loads)
        assert await server.ends() == -signal.SIGKILL
        kept = {record.request_id for record in server.records()}
        assert set(answered) <= kept
        assert len(answered) > 150


@in_one_loop
async def test_a_kill_in_a_stream_leaves_a_record_that_it_had_begun(upstream: Upstream, tmp_path: Path) -> None:
    upstream.says(stream(chunk("Hel"), 60.0))
    async with served(tmp_path, target={"url": upstream.url}) as server:
        async with server.asking(CHAT, ask(CHAT, "risky", stream=True)) as answer:
            await answer.content.readany()
            server.signal(signal.SIGKILL)
            await server.ends()
        (record,) = server.records()
        assert (record.action, record.risk, record.stream) == ("begun", 0.9, True)


# Several processes


@in_one_loop
async def test_two_workers_serve_and_share_their_metrics(
    upstream: Upstream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.says(whole(completion()))
    metrics = tmp_path / "metrics"
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(metrics))
    async with served(tmp_path, target={"url": upstream.url}, server={"workers": 2}) as server:
        assert not server.root.endswith(":0")

        async def one(_: int) -> int:
            alone = aiohttp.ClientSession(timeout=PATIENCE)  # with a connection of its own
            async with alone as session, session.post(server.root + CHAT, json=ask(CHAT)) as answer:
                return answer.status

        workers: set[int] = set()
        asked = 0
        async with asyncio.timeout(START_SECONDS):
            while len(workers) < 2:
                assert set(await asyncio.gather(*map(one, range(20)))) == {200}
                asked += 20
                workers = {
                    int(file.stem.partition("_")[2]) for file in metrics.glob("counter_*") if _counts(file, CHAT)
                }
        _, told = await server.ask("/metrics")
        assert f'action="passed",route="{CHAT}",status_class="2xx"}} {asked}.0'.encode() in told
        assert len(server.records()) == asked
        server.signal(signal.SIGTERM)
        assert await server.ends() == 0
        assert "Traceback" not in server.said
        assert not any(_lives(worker) for worker in workers)


def _lives(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


def _counts(file: Path, route: str) -> bool:
    """Whether a worker's file has a number for the route."""
    return f'"route": "{route}"'.encode() in file.read_bytes()


@in_one_loop
async def test_workers_that_cannot_start_end_the_whole(upstream: Upstream, tmp_path: Path) -> None:
    (tmp_path / "guard.py").write_text("class Needy:\n    def __init__(self):\n        pass\n")
    broken = {"name": f"{tmp_path / 'guard.py'}:Absent"}
    async with served(
        tmp_path, target={"url": upstream.url, "model": "m"}, server={"workers": 2}, guard=broken
    ) as server:
        assert await server.ends() == 2
        assert "Absent" in server.said
        assert "a worker could not start" in server.said
        assert "Traceback" not in server.said


# The command line


@pytest.fixture
def serve(vlmguard: Callable[..., Result], working_folder: Path) -> Callable[..., Result]:
    return lambda *arguments: vlmguard("serve", *arguments)


def test_checking_shows_the_settings_in_effect_without_secrets(
    serve: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TARGET_KEY", "the-gateways-key")
    config = settings(
        tmp_path,
        target={"url": "http://127.0.0.1:9/v1", "api_key_env": "TARGET_KEY"},
        audit_log={"url": "postgresql://me:password1@127.0.0.1/log"},
    )
    config.write_text(f'{config.read_text()}\n[[keys]]\nid = "app"\nsha256 = "{"ab" * 32}"\n')
    result = serve("--config", config, "--check-config", "--port", 9000, "--policy", "block")
    assert result.exit_code == 0
    told = tomllib.loads(result.stdout)
    assert told["server"]["port"] == 9000
    assert told["policy"]["mode"] == "block"
    assert told["target"]["api_key_env"] == "TARGET_KEY"
    assert told["keys"][0]["id"] == "app"
    for secret in ("the-gateways-key", "password1", "ab" * 32):
        assert secret not in result.output
    assert not list(tmp_path.glob("*.sqlite3"))


def test_by_default_the_packaged_models_are_served_to_this_machine(serve: Callable[..., Result]) -> None:
    told = tomllib.loads(serve("--check-config").stdout)
    assert told["target"]["spec"] == "packaged:assistant"
    assert told["guard"]["rewriter"] == "packaged:rewriter"
    assert (told["server"]["host"], told["server"]["port"]) == ("127.0.0.1", 8080)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[sever]\n", "server"),
        ("[server]\nprot = 1\n", "port"),
        ("[server]\nport = '1'\n", "port"),
        ("[server]\nhost = '0.0.0.0'\n", "keys"),
        ("[target]\nurl = 'http://127.0.0.1:1/v1'\nspec = 'scripted:x'\n", "both"),
        ("[policy]\nmode = 'blok'\n", "block"),
        ("[guard]\nname = 'vlmguard-r2'\n", "vlmguard-r1"),
        ("not toml", "line 1"),
    ],
)
def test_wrong_settings_are_named_with_their_remedy(
    text: str, said: str, serve: Callable[..., Result], tmp_path: Path
) -> None:
    config = tmp_path / "vlmguard.toml"
    config.write_text(text)
    for check in ([], ["--check-config"]):
        result = serve("--config", config, *check)
        assert result.exit_code == 2
        assert said in result.output
        assert "Traceback" not in result.output


def test_a_port_that_is_taken(serve: Callable[..., Result]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = serve("--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "cannot be listened on" in result.output
    assert "--port" in result.output


@pytest.mark.parametrize(
    ("sections", "code", "said"),
    [
        ({"target": {"spec": "no-such-model"}}, 2, "no VLM is named"),
        ({"guard": {"rewriter": "absent.py:Rewriter"}}, 2, "there is no file"),
        ({"audit_log": {"url": "sqlite:////proc/nowhere/log.sqlite3"}}, 1, "audit log"),
        ({"guard": {"name": "guard.py:Needy"}, "target": {"url": "http://127.0.0.1:9/v1"}}, 2, "[target] model"),
        (
            {"guard": {"name": "guard.py:Needy"}, "policy": {"mode": "block"}, "target": {"spec": "scripted:x"}},
            2,
            "modes",
        ),
    ],
)
def test_what_cannot_be_opened_is_named(
    sections: dict[str, Mapping[str, Any]], code: int, said: str, serve: Callable[..., Result], working_folder: Path
) -> None:
    (working_folder / "guard.py").write_text(
        "class Needy:\n    def __init__(self, target):\n        self.name = 'needy'\n"
    )
    chosen = {"target": {"spec": "scripted:Hello."}, **sections}
    result = serve("--config", settings(working_folder, **chosen))
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output
