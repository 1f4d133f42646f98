"""Logs: one JSON object a line on standard error, or lines for people where that is a terminal.

Ours (structlog) and the libraries' (logging) take the same way:

    event -> request_id, level, time -> log_fields.scrub -> JSON, in which a control character is an escape

The libraries are heard from "warning" on, whatever the level: their debug lines hold bodies and SQL parameters.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import MutableMapping
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, TextIO, TypeAlias

import structlog
from structlog.contextvars import bound_contextvars, merge_contextvars
from structlog.types import EventDict, Processor

from vlmguard.gateway.log_fields import scrub

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

OURS: Final = "vlmguard"
SERVERS: Final = ("uvicorn", "uvicorn.error")  # what they say at "info" is about starting and stopping
ACCESS: Final = "uvicorn.access"  # holds query strings, and every request is in the audit log
FIRST: Final = ("time", "level", "event", "logger", "request_id")


class Lines(logging.StreamHandler[TextIO]):
    """The one handler. A record that cannot be formatted is told by its logger alone: its arguments may be content."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 logging's own name
        try:
            line = {"level": "error", "event": "a log line could not be written", "logger": record.name}
            self.stream.write(json.dumps(line) + self.terminator)
            self.flush()
        except (OSError, ValueError):  # the stream is gone, and with it any place to say so
            pass


def configure_logs(level: Level, stream: TextIO | None = None) -> None:
    """Sets up the logs of this process; a second call replaces the first.

    Args:
        level: of our own lines.
        stream: standard error where None.
    """
    stream = stream or sys.stderr
    least = getattr(logging, level.upper())
    shared: list[Processor] = [
        merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    handler = Lines(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _error, scrub, *_rendering(stream)],
            foreign_pre_chain=[*shared, _first_line],
        )
    )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )
    _route(handler, least)


def for_request(request_id: str) -> AbstractContextManager[None]:
    """Within the block, and in the tasks and threads it starts, each line has the request's id."""
    return bound_contextvars(request_id=request_id)


def _route(handler: Lines, least: int) -> None:
    root = logging.getLogger()
    for old in root.handlers[:]:
        if type(old) in (Lines, logging.StreamHandler):
            root.removeHandler(old)
    root.addHandler(handler)
    levels = {OURS: least, **dict.fromkeys(SERVERS, max(least, logging.INFO))}
    for name in (None, *levels, ACCESS):
        logger = logging.getLogger(name)
        logger.setLevel(levels.get(name or "", max(least, logging.WARNING)))
        if name is not None:
            logger.handlers.clear()
            logger.propagate = True
    logging.captureWarnings(True)


def _rendering(stream: TextIO) -> list[Processor]:
    if not stream.isatty():
        return [_in_order, structlog.processors.JSONRenderer()]
    return [_printable, structlog.dev.ConsoleRenderer(colors="NO_COLOR" not in os.environ, timestamp_key="time")]


def _error(logger: object, method: str, event: EventDict) -> EventDict:
    """An exception that is being handled, without its message; a dump of the stack is left out."""
    for name in ("stack_info", "stack"):
        event.pop(name, None)
    given = event.pop("exc_info", None)
    found = given if isinstance(given, BaseException) else given[1] if isinstance(given, tuple) else None
    if given is True:
        found = sys.exc_info()[1]
    return {**event, "error": found} if found is not None else event


def _first_line(logger: object, method: str, event: EventDict) -> EventDict:
    """Of a library's message: what follows may be the representation of a task, with an exception's message in it."""
    return {**event, "event": str(event["event"]).strip().partition("\n")[0]}


def _in_order(logger: object, method: str, event: EventDict) -> EventDict:
    return {**{name: event[name] for name in FIRST if name in event}, **event}


def _printable(logger: object, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For a terminal, which would obey control characters."""
    return {_escaped(name): _escaped(value) if isinstance(value, str) else value for name, value in event.items()}


def _escaped(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
