"""A file of requests to a file of verdicts, one line each, in the same order.

    rows --checked--> chats --work, several at a time--> records --in order--> lines

Every input line gives exactly one output line, so the number of whole lines says where to go on: after a kill, a power
cut or a full disk the same command drops a torn last line and continues. Blank input lines are skipped.
"""

import asyncio
import fcntl
import json
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from io import FileIO
from pathlib import Path
from typing import Any, Self, TypeAlias

from vlmguard.chat import Chat, parse_json
from vlmguard.errors import AuthenticationFailed, BadRequest, ConfigError, ModelError, VLMGuardError
from vlmguard.record import Models, error_fields, was_gated
from vlmguard.request import request

Record: TypeAlias = dict[str, Any]
Work: TypeAlias = Callable[[Chat], Awaitable[Record]]

FIELDS = ("id", "text", "image", "images", "system", "turns")
# Names that other files use. A row that has one in place of ours would be judged without it, so it is an error.
OTHER_NAMES = {
    "text": ("prompt", "question", "query", "instruction", "request", "content", "input", "message"),
    "image": ("image_path", "image_file", "image_url", "img", "picture", "pictures", "photo", "photos"),
    "turns": ("messages", "history", "conversation", "conversations"),
    "system": ("system_prompt",),
}
ENDS_THE_RUN = (ConfigError, ModelError, AuthenticationFailed)  # every other row would fail by it too
ROWS_AHEAD = 2  # rows begun, for each that may run at once, before the first of them is done


@dataclass(frozen=True)
class Row:
    """One line of the input. `error` says why it is none that can be guarded."""

    id: str | int
    fields: Mapping[str, Any]
    folder: Path
    error: VLMGuardError | None = None

    def chat(self) -> Chat:
        """Raises BadRequest, an ImageError among them, where the row cannot be read."""
        if self.error is not None:
            raise self.error
        _check(self.fields)
        images = self.fields.get("images") or ([self.fields["image"]] if self.fields.get("image") else [])
        text, system, turns = (self.fields.get(name) for name in ("text", "system", "turns"))
        return request(text, images, system=system, turns=turns or (), folder=self.folder)


@dataclass
class Summary:
    """How a run went; `actions` counts the lines that this run wrote, `notes` those with a note of the guard's."""

    out: Path
    total: int
    done_before: int
    actions: Counter[str] = field(default_factory=Counter)
    notes: int = 0
    seconds: float = 0.0

    @property
    def written(self) -> int:
        return self.actions.total()

    @property
    def done(self) -> int:
        return self.done_before + self.written

    @property
    def rows_per_second(self) -> float:
        return self.written / self.seconds if self.seconds else 0.0


def read_rows(source: Path) -> Generator[Row, None, None]:
    """The rows of a JSONL file, bad ones included; a row without an id of its own has its line number."""
    seen: set[str | int] = set()
    with source.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            row = _row(line, number, source.parent)
            if row.id in seen and row.error is None:
                twice = BadRequest(f"the id {row.id!r} is in an earlier row", "Make ids unique.")
                row = Row(row.id, {}, row.folder, twice)
            elif row.error is None:
                seen.add(row.id)
            yield row


@dataclass(frozen=True)
class Setting:
    """What all lines of one output have in common."""

    models: Models
    threshold: float | None = None
    gate_only: bool = False

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Self:
        return cls(Models(**record["models"]), record["threshold"], was_gated(record))

    def agrees(self, other: Self) -> bool:
        thresholds = {self.threshold, other.threshold} - {None}
        return self.models == other.models and self.gate_only == other.gate_only and len(thresholds) < 2


class Batch:
    """The two files of a run, checked before any model is loaded. A context: it locks and closes the output.

    Raises:
        ConfigError: a file is missing, in use, or the output is of another input.
    """

    def __init__(self, source: Path, out: Path) -> None:
        self.source = source
        self.out = out
        self.total = _count(source)
        self._is_new = not out.exists()
        self._file = _open(source, out)
        self._rows = read_rows(source)
        self._end = 0  # of the last whole line
        self._old: set[Setting] = set()
        try:
            self.summary = Summary(out, self.total, self._resume() if out.is_file() else 0)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()
        if self._is_new and self._end == 0 < self.total and self.out.is_file():
            self.out.unlink()
        self._file.close()

    async def run(
        self,
        work: Work,
        setting: Setting,
        *,
        at_once: int = 16,
        report: Callable[[Summary], None] = lambda summary: None,
    ) -> Summary:
        """Does the rows that are left.

        Args:
            work: gives the record of a chat.
            setting: how `work` does it; the lines of an earlier run must agree.
            at_once: rows that are worked on together.
            report: called after every line.

        Raises:
            ConfigError: the lines of the output were written with other models or options.
            VLMGuardError: the output cannot be written, or an error that every row would meet.
        """
        if not all(setting.agrees(old) for old in self._old):
            raise ConfigError(f"{self.out} was begun with other models or options", "Give the same, or another --out.")
        started = time.perf_counter()
        async with aclosing(_in_order(self._rows, work, at_once)) as records:
            async for row, record in records:
                self._write({"id": row.id, **record})
                self.summary.actions["error" if "error" in record else record["action"]] += 1
                self.summary.notes += "note" in record
                self.summary.seconds = time.perf_counter() - started
                report(self.summary)
        return self.summary

    def _write(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise VLMGuardError(
                f"{self.out} cannot be written: {error.strerror}; {self.summary.done} of {self.total} rows are in it",
                "Make room, then run the same command again: it goes on from there.",
            ) from error
        self._end += len(line)

    def _resume(self) -> int:
        """Reads what an earlier run left, passes over its rows, and cuts a torn last line off; gives their number."""
        done = 0
        with self.out.open("rb") as file:
            for line in file:
                record = _whole(line)
                if record is None:
                    if file.read(1):
                        raise self._foreign(f"its line {done + 1} is not of a batch")
                    break
                row = next(self._rows, None)
                if row is None:
                    raise self._foreign("it has more rows")
                if row.id != record["id"]:
                    raise self._foreign(f"its line {done + 1} has the id {record['id']!r}, not {row.id!r}")
                if "action" in record:
                    self._old.add(Setting.of(record))
                self._end += len(line)
                done += 1
        self._file.truncate(self._end)
        self._file.seek(self._end)
        return done

    def _foreign(self, why: str) -> ConfigError:
        return ConfigError(f"{self.out} is not the output for {self.source}: {why}", "Give another --out.")


async def _in_order(rows: Iterable[Row], work: Work, at_once: int) -> AsyncGenerator[tuple[Row, Record], None]:
    """The rows' records in the rows' order, as soon as each is first in line."""
    free = asyncio.Semaphore(at_once)
    begun: deque[tuple[Row, asyncio.Task[Record]]] = deque()

    async def one(row: Row) -> Record:
        async with free:
            return await _record(row, work)

    try:
        for row in rows:
            begun.append((row, asyncio.create_task(one(row))))
            await asyncio.sleep(0)
            while begun and (len(begun) >= ROWS_AHEAD * at_once or begun[0][1].done()):
                first, task = begun.popleft()
                yield first, await task
        while begun:
            first, task = begun.popleft()
            yield first, await task
    finally:
        for _, task in begun:
            task.cancel()
        await asyncio.gather(*(task for _, task in begun), return_exceptions=True)


async def _record(row: Row, work: Work) -> Record:
    try:
        chat = await asyncio.to_thread(row.chat)
        return await work(chat)
    except ENDS_THE_RUN:
        raise
    except Exception as error:  # noqa: BLE001 (like the evaluation row: whatever a row meets, the others go on)
        return {"error": error_fields(error)}


def _row(line: bytes, number: int, folder: Path) -> Row:
    try:
        fields = parse_json(line)
        if not isinstance(fields, dict):
            raise BadRequest(f"line {number} is not a JSON object", 'Write {"id": ..., "text": ..., "image": ...}.')
        own = fields.get("id")
        if isinstance(own, bool) or not isinstance(own, str | int) or own == "":
            raise BadRequest(f"line {number} has no id", "Give each row a string or a whole number that is unique.")
    except BadRequest as error:
        return Row(number, {}, folder, error)
    return Row(own, fields, folder)


def _check(fields: Mapping[str, Any]) -> None:
    """Refuses fields of a wrong type, and those that would carry content past the guard."""
    for ours, others in OTHER_NAMES.items():
        near = [name for name in fields if name not in FIELDS and get_close_matches(name, [ours], cutoff=0.8)]
        wrong = near or [name for name in others if fields.get(name) and not fields.get(ours)]
        if wrong and not (ours == "image" and fields.get("images")):
            raise BadRequest(f"the row has a field {wrong[0]!r}", f'Call it "{ours}".')
    texts = [("text", fields.get("text")), ("image", fields.get("image")), ("system", fields.get("system"))]
    images, turns = fields.get("images") or [], fields.get("turns") or []
    if not isinstance(images, list) or not isinstance(turns, list):
        raise BadRequest("images and turns: expected lists", 'A single picture is "image".')
    if images and fields.get("image"):
        raise BadRequest("the row has image and images", "Give one of them.")
    for name, value in (*texts, *(("images", image) for image in images)):
        if value is not None and not isinstance(value, str):
            raise BadRequest(f"{name}: expected a text, got {type(value).__name__}")


def _whole(line: bytes) -> Record | None:
    """The record in a line, or None where it was cut short or is of something else."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) and "id" in record and record.keys() & {"action", "error"} else None


def _count(source: Path) -> int:
    if source.exists() and not source.is_file():
        raise ConfigError(f"{source} is not a file", "Give a JSONL file; it is read twice, so a pipe does not do.")
    try:
        with source.open("rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise ConfigError(f"{source} cannot be read: {error.strerror}", "Check the path.") from None


def _open(source: Path, out: Path) -> FileIO:
    """The output, locked, at its beginning, unbuffered: what is written is there after a kill."""
    if out.exists() and source.samefile(out):
        raise ConfigError("the output is the input", "Give another --out.")
    try:
        mode = "r+" if out.is_file() else "w" if out.exists() else "x+"
        file = FileIO(out, mode)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}", "Check its folder and your rights.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"another process is writing {out}", "Wait for it, or give another --out.") from None
    except OSError:
        pass  # a file system or device without locks
    return file
