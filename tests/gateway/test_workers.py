import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.gateway.ended import ROUTES, Series, series
from vlmguard.errors import ConfigError
from vlmguard.gateway.metrics import Metrics
from vlmguard.gateway.workers import FOLDER, prepare_workers

# One worker: it counts some requests, then shows the numbers of all workers for each line on its input.
WORKER = """
import sys
from tests.gateway.ended import ROUTES, Request
from vlmguard.gateway.metrics import Load, Metrics

requests, in_flight = int(sys.argv[1]), int(sys.argv[2])
metrics = Metrics(ROUTES, lambda: Load(in_flight, breaker_open=True))
for _ in range(requests):
    metrics.observe(Request(guard_seconds=0.03, pictures=2))
metrics.refresh()
print("counted", flush=True)
for line in sys.stdin:
    sys.stdout.write(metrics.exposition()[0].decode() + "END\\n")
    sys.stdout.flush()
"""


class Worker:
    def __init__(self, requests: int, in_flight: int) -> None:
        command = [sys.executable, "-c", WORKER, str(requests), str(in_flight)]
        root = Path(__file__).parents[2]  # where `tests` is
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def counted(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "counted\n"

    def scraped(self) -> Series:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return series("".join(iter(self.process.stdout.readline, "END\n")))

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is as it was after the test, whatever the test sets."""
    monkeypatch.setenv(FOLDER, "")


@pytest.mark.usefixtures("no_folder")
def test_whichever_worker_is_scraped_shows_the_numbers_of_all() -> None:
    prepare_workers()
    requests = (
        "vlmguard_requests_total",
        frozenset({"route": ROUTES[0], "action": "passed", "status_class": "2xx"}.items()),
    )
    guard = ("vlmguard_guard_seconds_count", frozenset({("action", "passed")}))
    images, in_flight, breaker = (
        (f"vlmguard_{name}", frozenset[tuple[str, str]]()) for name in ("images_total", "in_flight", "breaker_open")
    )
    with ExitStack() as stack:
        one, other = (stack.enter_context(Worker(*numbers)) for numbers in ((3, 5), (4, 6)))
        one.counted()
        other.counted()
        for worker in (one, other):
            shown = worker.scraped()
            assert [shown[name] for name in (requests, guard, images, in_flight, breaker)] == [7, 7, 14, 11, 2]
        other.process.kill()
        other.process.wait()
        shown = one.scraped()
        # what a dead worker counted stays counted; what it was working on is gone
        assert [shown[name] for name in (requests, guard, images, in_flight, breaker)] == [7, 7, 14, 5, 1]


@pytest.mark.usefixtures("no_folder")
def test_the_workers_folder_goes_with_the_process_that_made_it() -> None:
    script = (
        "import os, sys; from vlmguard.gateway.workers import prepare_workers; folder = prepare_workers();"
        f"assert os.environ['{FOLDER}'] == str(folder) and folder.is_dir();"
        "child = os.fork() or sys.exit(); os.waitpid(child, 0); print(folder.is_dir(), folder)"
    )
    there, folder = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert there == "True"
    assert not Path(folder).exists()


def test_a_folder_that_is_given_is_emptied_of_an_earlier_run_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "metrics"
    monkeypatch.setenv(FOLDER, str(folder))
    assert prepare_workers() == folder
    dead = _dead_process()
    kept = {f"counter_{os.getpid()}.db", "notes.db", f"mine_{dead}.db"}
    for name in (*kept, f"counter_{dead}.db", f"gauge_livesum_{dead}.db"):
        (folder / name).touch()
    prepare_workers()
    assert {file.name for file in folder.iterdir()} == kept


def test_a_folder_that_cannot_be_made_is_an_error_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(FOLDER, str(tmp_path / "file" / "folder"))
    with pytest.raises(ConfigError, match=f"cannot be shared: Not a directory. Set {FOLDER}"):
        prepare_workers()


def test_a_library_that_chose_its_mode_too_early_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))  # and this process imported it before
    with pytest.raises(ConfigError, match="call prepare_workers, before that import"):
        Metrics(ROUTES)


def test_a_folder_that_is_not_there_is_an_error_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="names no folder"):
        Metrics(ROUTES)


def _dead_process() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        return process.pid
