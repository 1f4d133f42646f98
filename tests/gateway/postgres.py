"""A PostgreSQL server of a test's own: Debian's binaries, a temporary folder, a free port of this machine."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg

USER: Final = "tester"
UNPRIVILEGED: Final = "nobody"  # the server refuses to run as root
SECONDS: Final = 30.0
INSTALL_SECONDS: Final = 240
CLUSTERS: Final = Path("/etc/postgresql-common/createcluster.conf")
# The server only counts on its data outliving the test's own kills, not the machine's.
OPTIONS: Final = ("fsync=off", "listen_addresses=127.0.0.1", "unix_socket_directories=", "max_connections=30")


class Absent(Exception):
    """There is no server to be had; says why."""


class Server:
    def __init__(self, binaries: Path, folder: Path) -> None:
        self.binaries, self.folder = binaries, folder
        self.password = secrets.token_hex(8)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None
        self._databases = 0

    def url(self, database: str = "postgres") -> str:
        return f"postgresql+psycopg://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"

    def make(self) -> None:
        password = self.folder / "password"
        password.write_text(self.password, encoding="utf-8")
        if who := _identity():
            for path in (self.folder, password):
                os.chown(path, who["user"], who["group"])
        options = ("--no-sync", "--encoding=UTF8", "--no-locale", "--auth=scram-sha-256", f"--username={USER}")
        self._run("initdb", *options, f"--pwfile={password}", "-D", str(self.folder / "data"))

    def start(self) -> None:
        options = [word for option in (*OPTIONS, f"port={self.port}") for word in ("-c", option)]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.binaries / "postgres", "-D", self.folder / "data", *options],
                **_identity(),
                cwd=self.folder,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + SECONDS
        while True:
            try:
                self.execute("SELECT 1")
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise Absent((self.folder / "log").read_text(encoding="utf-8")[-2000:]) from None
                time.sleep(0.05)

    def stop(self, *, at_once: bool = False) -> None:
        """Breaks off every connection; `at_once` leaves it to the next start to recover, as after a crash."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT if at_once else signal.SIGINT)
            self._process.wait(SECONDS)
        self._process = None

    def execute(self, statement: str, database: str = "postgres") -> list[tuple[Any, ...]]:
        plain = self.url(database).replace("+psycopg", "")
        with psycopg.connect(plain, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def new_database(self, *options: str) -> str:
        """Its URL."""
        self._databases += 1
        name = f"log{self._databases}"
        self.execute(" ".join((f"CREATE DATABASE {name}", *options)))
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self.binaries / program, *arguments], **_identity(), cwd=self.folder, capture_output=True, text=True
        )
        if done.returncode:
            raise Absent(f"{program}: {done.stderr[-2000:]}")


@contextmanager
def serving() -> Iterator[Server]:
    """Raises Absent."""
    binaries = find() or install()
    folder = Path(tempfile.mkdtemp(prefix="vlmguard-postgres-"))  # not in pytest's, which only its own user may enter
    server = Server(binaries, folder)
    try:
        server.make()
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def find() -> Path | None:
    """The folder of the newest server's programs."""
    found = [
        path.parent for path in Path("/usr/lib/postgresql").glob("*/bin/initdb") if (path.parent / "postgres").exists()
    ]
    return max(found, key=lambda path: float(path.parent.name), default=None)


def install() -> Path:
    """Installs Debian's server, without a cluster of the system's own."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        raise Absent("no PostgreSQL server: install Debian's postgresql package")
    if not CLUSTERS.exists():
        CLUSTERS.parent.mkdir(exist_ok=True)
        CLUSTERS.write_text("create_main_cluster = false\n", encoding="utf-8")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    keep = ("-o", "Dpkg::Options::=--force-confold")
    for command in (["update"], [*keep, "install", "-y", "--no-install-recommends", "postgresql"]):
        try:
            done = subprocess.run(
                ["apt-get", "-q", *command], env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise Absent(f"apt-get {command[-1]} took over {INSTALL_SECONDS} s") from None
    if (found := find()) is None:
        raise Absent(f"apt-get can't install postgresql: {done.stderr[-500:]}")
    return found


def _identity() -> Mapping[str, Any]:
    """Whose the server is."""
    if os.geteuid() != 0:
        return {}
    user = pwd.getpwnam(UNPRIVILEGED)
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
