"""`vlmguard serve`: the gateway's process or processes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
from collections.abc import Generator, Mapping
from contextlib import AsyncExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import uvicorn
import uvloop
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import STARTUP_FAILURE
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.supervisors import Multiprocess

from vlmguard.commands.terminal import print_error, say
from vlmguard.errors import ConfigError, VLMGuardError
from vlmguard.gateway.app import build
from vlmguard.gateway.config import Settings, load
from vlmguard.gateway.gateway import Gateway, opened
from vlmguard.gateway.telemetry import configure_logs, prepare_workers

GIVEN: Final = "VLMGUARD_SERVE"  # what a worker is told: the settings' file and the options of the command line
KEEP_ALIVE_SECONDS: Final = 75  # longer than clients keep an idle connection, so that none is closed under a request
BACKLOG: Final = 2048
PIECE_BYTES: Final = 2 * 2**20  # a picture of 1.5 MB in base64
# glibc's mallopt(3): blocks from the heap up to 32 MiB, its most, and up to 128 MiB of it kept free, 16 taken at a time.
MALLOC: Final = {-3: 32 * 2**20, -1: 128 * 2**20, -2: 16 * 2**20}
START_SECONDS: Final = 30  # for a worker to come up on a busy machine before it is taken for hung


def serve(path: Path | None, options: Mapping[str, Any], *, check: bool) -> None:
    """Serves until it is told to stop, then lets what has begun come to its end.

    Args:
        path: of the settings, TOML.
        options: of the command line, from "section.key" to a value; None for one that was not given.
        check: only print the settings in effect.

    Raises:
        ConfigError: the settings are wrong, or the address is taken. ModelError, AuditLogError: as `opened`.
    """
    settings = load(path, options)
    if check:
        print(settings.shown())
        return
    configure_logs(settings.telemetry.log_level)
    keep_memory()
    with closing(bound(settings)) as listening:
        if settings.server.workers == 1:
            uvloop.run(_one(settings, listening))
            return
        os.environ[GIVEN] = json.dumps({"path": str(path) if path else None, "options": dict(options)})
        prepare_workers()
        config = uvicorn.Config(
            "vlmguard.commands.serve:Worker",
            factory=True,
            lifespan="on",
            workers=settings.server.workers,
            timeout_worker_healthcheck=START_SECONDS,
            **_options(settings),
        )
        say(_banner(settings, listening))
        workers = Multiprocess(config, sockets=[listening])
        workers.run()
        if any(worker.exitcode == STARTUP_FAILURE for worker in workers.processes):
            raise ConfigError("a worker could not start", "Its own line says why.")


def keep_memory() -> None:
    """Lets this process keep the memory of one picture for the next: fetching it anew, page by page, costs a third of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, other C libraries need not
    if mallopt is not None:
        for what, size in MALLOC.items():
            mallopt(what, size)


def bound(settings: Settings) -> socket.socket:
    """The socket to listen on. Raises ConfigError where it can't be had."""
    server = settings.server
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    # Named as TCP: asyncio turns Nagle's algorithm off only then, and pieces of a stream would wait 40 ms for each other.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((server.host, server.port))
    except OSError as error:
        listening.close()
        place = f"{server.host}:{server.port}"
        raise ConfigError(
            f"{place} cannot be listened on: {error.strerror}", "Choose another --port or --host."
        ) from None
    listening.set_inheritable(True)
    return listening


async def _one(settings: Settings, listening: socket.socket) -> None:
    say(f"loading {settings.guard.rewriter} and {_target(settings)}")
    async with opened(settings) as gateway:
        server = server_of(gateway)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.handle_exit, number, None)
        say(_banner(settings, listening))
        await server.serve(sockets=[listening])


def server_of(gateway: Gateway) -> Server:
    """What serves an open gateway in this process."""
    return Server(uvicorn.Config(build(gateway), lifespan="off", **_options(gateway.settings)))


class Server(uvicorn.Server):
    """It leaves the signals to us: uvicorn's own way ends the process before the audit log is closed."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class LargePieces(HttpToolsProtocol):
    """Wakes the application for a whole body, or for PIECE_BYTES of it: it can't begin with less, and each wake costs.

    What has come is joined once; a buffer that grows would be copied again and again.
    """

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._pieces: list[bytes] = []
        self._size = 0

    def on_body(self, body: bytes) -> None:
        if (self.parser.should_upgrade() and self._should_upgrade()) or self.cycle.response_complete:
            return
        self._pieces.append(body)
        self._size += len(body)
        if self._size > PIECE_BYTES:
            self.flow.pause_reading()
            self._hand_over()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._hand_over()
        super().on_message_complete()

    def _hand_over(self) -> None:
        if self._pieces and not self.cycle.response_complete:
            held = [bytes(self.cycle.body)] if self.cycle.body else []
            self.cycle.body = b"".join(held + self._pieces)  # type: ignore[assignment] # given on as bytes, not grown
        self._pieces, self._size = [], 0


class Worker:
    """One of several processes: it opens its own gateway when it starts."""

    def __init__(self) -> None:
        given = json.loads(os.environ[GIVEN])
        self.settings = load(Path(given["path"]) if given["path"] else None, given["options"])
        configure_logs(self.settings.telemetry.log_level)
        keep_memory()
        self.app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        assert self.app is not None
        await self.app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        async with AsyncExitStack() as stack:
            try:
                gateway = await stack.enter_async_context(opened(self.settings))
            except VLMGuardError as error:
                print_error(error, as_json=False)
                os._exit(STARTUP_FAILURE)  # its parent would wait long for a sign of life from one that takes its time
            self.app = build(gateway)
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "loop": "uvloop",
        "http": LargePieces,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "date_header": True,
        "proxy_headers": False,
        "backlog": BACKLOG,
        "timeout_keep_alive": KEEP_ALIVE_SECONDS,
        "timeout_graceful_shutdown": round(settings.server.drain_seconds),
    }


def _banner(settings: Settings, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    return (
        f"guarding {_target(settings)} with {settings.guard.name} ({settings.guard.rewriter}, mode {settings.policy.mode}) "
        f"at http://{host}:{port}/v1"
    )


def _target(settings: Settings) -> str:
    return str(settings.target.url or settings.target.spec)
