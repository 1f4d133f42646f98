import asyncio
import hashlib
import io
import json
import logging
import os
import pty
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog

from vlmguard.errors import AuditLogError, BadRequest, ConfigError
from vlmguard.gateway.logs import Level, configure_logs, for_request
from vlmguard.gateway.logs import Lines as Handler

Lines = Callable[[], list[dict[str, Any]]]
NAMES = ("vlmguard", "uvicorn", "uvicorn.error", "uvicorn.access")
MARKER = "MARKER a user's own words"
LOG = structlog.get_logger("vlmguard.test")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in (None, *NAMES)}
    yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream: io.StringIO) -> Lines:
    """The lines that were logged, each of which is one JSON object."""
    configure_logs("info", stream)
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


@contextmanager
def nobody_else_listening() -> Iterator[None]:
    """Pytest's own handlers cannot format all that ours can."""
    root = logging.getLogger()
    every = root.handlers[:]
    root.handlers[:] = [handler for handler in every if isinstance(handler, Handler)]
    yield
    root.handlers[:] = every


def test_a_line_is_a_json_object_with_time_level_and_logger(lines: Lines) -> None:
    LOG.warning("the rewriter is slow", seconds=2.5, images=3, held=True, mode=None)
    (line,) = lines()
    assert list(line)[:4] == ["time", "level", "event", "logger"]
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "event": "the rewriter is slow",
        "logger": "vlmguard.test",
        "seconds": 2.5,
        "images": 3,
        "held": True,
        "mode": None,
    }


def test_it_goes_to_standard_error_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    LOG.info("up")
    out, err = capsys.readouterr()
    assert (out, json.loads(err)["event"]) == ("", "up")


async def test_lines_of_a_request_have_its_id_the_libraries_too(lines: Lines) -> None:
    async def work(request_id: str) -> None:
        with for_request(request_id):
            await asyncio.sleep(0)
            LOG.info("ours")
            await asyncio.to_thread(logging.getLogger("aiohttp.client").warning, "theirs")

    await asyncio.gather(work("req_1"), work("req_2"))
    LOG.info("after")
    told = sorted((line["event"], line.get("request_id")) for line in lines() if line["event"] != "after")
    assert told == [("ours", "req_1"), ("ours", "req_2"), ("theirs", "req_1"), ("theirs", "req_2")]
    assert "request_id" not in lines()[-1]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_the_level_is_that_of_the_settings(stream: io.StringIO, level: Level) -> None:
    configure_logs(level, stream)
    levels = ["debug", "info", "warning", "error"]
    for name in levels:
        getattr(LOG, name)(name)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == levels[levels.index(level) :]


@pytest.mark.parametrize("name", ["uvicorn.error", "aiohttp.server", "sqlalchemy.engine", "asyncio"])
def test_a_librarys_lines_have_the_same_format(lines: Lines, name: str) -> None:
    logging.getLogger(name).error("it %s after %d s", "failed", 3)
    (line,) = lines()
    assert line.pop("time")
    assert line == {"level": "error", "event": "it failed after 3 s", "logger": name}


def test_libraries_are_not_heard_below_warning_whatever_the_level(stream: io.StringIO) -> None:
    configure_logs("debug", stream)
    logging.getLogger("uvicorn.error").info("Application startup complete.")
    logging.getLogger("uvicorn.access").info('127.0.0.1 - "GET /?q=%s HTTP/1.1" 200', MARKER)
    logging.getLogger("sqlalchemy.engine").info("[parameters: (%r)]", MARKER)
    logging.getLogger("openai").debug("Request options: %s", MARKER)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["Application startup complete."]


def test_a_second_call_replaces_the_first(stream: io.StringIO, lines: Lines) -> None:
    uvicorn, second = logging.getLogger("uvicorn"), io.StringIO()
    uvicorn.addHandler(logging.StreamHandler(stream))
    uvicorn.propagate = False
    configure_logs("info", second)
    LOG.info("once")
    logging.getLogger("uvicorn.error").info("once, too")
    assert not lines()
    assert [json.loads(line)["event"] for line in second.getvalue().splitlines()] == ["once", "once, too"]


@pytest.mark.parametrize(
    "name", ["text", "messages", "prompt", "body", "content", "image_url", "user_text", "Request-Body", "sent"]
)
def test_f066_content_is_told_by_length_and_hash(stream: io.StringIO, lines: Lines, name: str) -> None:
    LOG.info("x", **{name: MARKER})
    LOG.info("x", **{name: {"role": MARKER, "parts": [{"a": MARKER}, MARKER]}})
    assert "MARKER" not in stream.getvalue()
    assert lines()[0][name] == f"[25 characters, sha256 {hashlib.sha256(MARKER.encode()).hexdigest()[:12]}]"


@pytest.mark.parametrize(
    "name", ["authorization", "Authorization", "api_key", "x-api-key", "headers", "cookie", "token"]
)
def test_secrets_are_withheld_and_not_even_hashed(lines: Lines, name: str) -> None:
    LOG.info("x", **{name: "Bearer sk-123"})
    LOG.info("x", request={name: b"Bearer sk-123"})
    one, other = lines()
    assert one[name] == other["request"][name] == "[withheld]"


def test_bytes_are_told_by_length_and_hash_under_any_name(stream: io.StringIO, lines: Lines) -> None:
    for value in (b"MARKER", bytearray(b"MARKER"), memoryview(b"MARKER")):
        LOG.info("x", anything=value, nested=[{"deep": value}])
    assert "MARKER" not in stream.getvalue()
    assert [line["anything"] for line in lines()] == [
        f"[6 bytes, sha256 {hashlib.sha256(b'MARKER').hexdigest()[:12]}]"
    ] * 3


def test_a_long_string_is_cut_with_its_length_and_hash(lines: Lines) -> None:
    short, long = "s" * 512, "l" * 512 + "MARKER"
    LOG.info(long, short=short, long=long, nested=[long])
    (line,) = lines()
    cut = f"{'l' * 64}... [518 characters, sha256 {hashlib.sha256(long.encode()).hexdigest()[:12]}]"
    assert line["short"] == short
    assert line["long"] == line["event"] == cut
    assert line["nested"] == [cut]


def test_f067_a_picture_in_a_string_is_told_by_length_and_hash(stream: io.StringIO, lines: Lines) -> None:
    LOG.info("x", url="data:image/png;base64,MARKER", note="got data:image/png;base64,MARKER")
    logging.getLogger("aiohttp").error("cannot read %s", "data:image/png;base64,MARKER")
    assert "MARKER" not in stream.getvalue()
    assert len(lines()) == 2


def test_an_object_is_told_by_its_class(stream: io.StringIO, lines: Lines) -> None:
    class Chat:
        def __repr__(self) -> str:
            return MARKER

    with nobody_else_listening():
        LOG.info("x", chat=Chat(), path=Path("a/b"), several=(1, {2}), big=10**5000, odd=float("nan"))
    (line,) = lines()
    assert "MARKER" not in stream.getvalue()
    assert (line["chat"], line["path"], line["several"]) == ("[Chat]", "a/b", [1, [2]])
    assert (line["big"], line["odd"]) == ("[a number of 16610 bits]", "nan")


def test_containers_are_bounded(stream: io.StringIO, lines: Lines) -> None:
    deep: list[Any] = []
    deep.append(deep)
    LOG.info("x", deep=deep, wide=list(range(10_000)), many={str(n): n for n in range(10_000)})
    (line,) = lines()
    assert line["deep"] == [[["[1 items]"]]]
    assert (len(line["wide"]), len(line["many"])) == (16, 16)
    assert len(stream.getvalue()) < 2000


@pytest.mark.parametrize(
    "odd", ["a\nb", "a\r\nb", "a\0b", "a\x1b[2Jb", "a\u2028b", "a\x85b", 'a"}\n{"b', "a\ud800b", "ключ 图"]
)
def test_no_character_of_a_callers_breaks_a_line(stream: io.StringIO, lines: Lines, odd: str) -> None:
    LOG.info(odd, name=odd, **{odd: 1})
    logging.getLogger("uvicorn.error").warning("x", extra={"x": odd})
    one, _ = lines()
    assert (one["name"], one[odd]) == (odd, 1)
    assert stream.getvalue().isascii()
    assert stream.getvalue().replace("\n", "").isprintable()


def test_a_terminal_gets_lines_for_people_without_control_characters() -> None:
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w", encoding="utf-8") as terminal:
        configure_logs("info", terminal)
        with for_request("req_1"):
            LOG.info("got \x1b[2J it\nagain", name="a\x1b[31m\nb", text=MARKER, where={"a": "\x1b"})
        shown = os.read(ours, 65536).decode()
        logging.getLogger().handlers.clear()
    os.close(ours)
    assert shown.count("\n") == 1
    assert "\x1b" not in shown
    assert "MARKER" not in shown
    assert "req_1" in shown
    assert r"got \x1b[2J it\nagain" in shown


def test_an_exception_is_told_without_its_message(stream: io.StringIO, lines: Lines) -> None:
    try:
        try:
            json.loads(MARKER)
        except ValueError as cause:
            raise BadRequest(f"cannot read {MARKER}") from cause
    except BadRequest as error:
        LOG.exception("a fault")
        LOG.error("a fault", exc_info=error)
        logging.getLogger("uvicorn.error").error("Exception in ASGI application\n", exc_info=error)
        LOG.error("a fault", error=ExceptionGroup(MARKER, [error]))
    assert "MARKER" not in stream.getvalue()
    one, *others, grouped = lines()
    assert one["error"]["type"] == "BadRequest"
    assert one["error"]["because"]["type"] == "JSONDecodeError"
    assert one["error"]["at"][-1].startswith("gateway/test_logs.py:")
    assert [other["error"] for other in others] == [one["error"], one["error"]]
    assert grouped["error"]["several"] == [one["error"]]
    assert others[1]["event"] == "Exception in ASGI application"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (ConfigError("the model is missing", "Name one."), "the model is missing. Name one."),
        (AuditLogError("the disk is full", "Make room."), "the disk is full. Make room."),
    ],
)
def test_what_an_operator_has_to_know_of_an_exception_is_told(lines: Lines, error: Exception, message: str) -> None:
    LOG.error("x", exc_info=error)
    LOG.error("x", error=error)
    assert [line["error"]["message"] for line in lines()] == [message, message]


async def test_a_task_that_failed_unseen_is_told_without_its_exception(stream: io.StringIO, lines: Lines) -> None:
    async def fail() -> None:
        raise ValueError(MARKER)

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    del task
    (line,) = lines()
    assert (line["event"], line["error"]["type"]) == ("Task exception was never retrieved", "ValueError")
    assert "MARKER" not in stream.getvalue()


def test_a_record_that_cannot_be_formatted_is_told_without_its_arguments(
    stream: io.StringIO, lines: Lines, capsys: pytest.CaptureFixture[str]
) -> None:
    with nobody_else_listening():
        logging.getLogger("aiohttp").error("%d", MARKER)
    assert lines() == [{"level": "error", "event": "a log line could not be written", "logger": "aiohttp"}]
    assert capsys.readouterr() == ("", "")


def test_a_stream_that_is_gone_stops_nobody(stream: io.StringIO, lines: Lines) -> None:
    stream.close()
    LOG.error("x")
    logging.getLogger().handlers.clear()


def test_warnings_are_lines_too(lines: Lines) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    (line,) = lines()
    assert line["logger"] == "py.warnings"
    assert line["event"].endswith("DeprecationWarning: old")
