"""The rows that a rewriter learns from: our own datasets, and the `messages + images` files of ms-swift and LLaMA-Factory.

    read(path) -> Rows          a dataset's folder, its dataset.jsonl, or a messages file
    write_messages(rows, path)  what other trainers read

A row that cannot be used is dropped with its reason, and the reasons are counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from vlmguard.chat import Chat
from vlmguard.errors import BadRequest, ConfigError, RewriteUnreadable
from vlmguard.rewriter.protocol import parse_output
from vlmguard.strict_json import parse_json
from vlmguard.synthesis.sample import Row

PICTURE_MARK: Final = "<image>"  # where a messages file has a picture in a text
HELD_PARTS: Final = 1000


@dataclass
class Rows:
    """
    Args:
        images: the folder that the rows' pictures are seen from.
        dropped: reasons, and how many rows each cost.
        sha256: of the file.
    """

    rows: list[Row]
    images: Path
    sha256: str
    dropped: Counter[str] = field(default_factory=Counter)

    def chat(self, row: Row) -> Chat:
        """The request that a row is about. Raises ImageUnreadable."""
        return Chat.of(row.prompt, [self.images / one["path"] for one in row.images], turns=row.history)

    def split(self, share: float) -> tuple[list[Row], list[Row]]:
        """(to learn from, held out), by a hash: the same for every run, whatever else is in the file.

        Rows with the same first picture fall on one side, else what is held out would be half known; a row without one
        goes by its id.
        """
        held = [_part(_family(row)) < share * HELD_PARTS for row in self.rows]
        learn = [row for row, out in zip(self.rows, held, strict=True) if not out]
        return learn, [row for row, out in zip(self.rows, held, strict=True) if out]


def _family(row: Row) -> str:
    first = row.images[0] if row.images else {}
    return first.get("sha256") or first.get("path") or row.id


def _part(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_PARTS


def read(data: Path, images: Path | None = None) -> Rows:
    """Reads a dataset.

    Args:
        images: in place of the dataset's own folder.

    Raises:
        ConfigError: it is missing, or holds no row that can be used.
    """
    path = data / "dataset.jsonl" if data.is_dir() else data
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}", "Give a dataset's folder or file.") from None
    found = Rows([], images or path.parent, hashlib.sha256(content).hexdigest())
    known: dict[tuple[str, str], str | None] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        row, problem = _row(line, number)
        problem = problem or (_picture_problem(row, found.images, known) if row else None)
        if problem is None and row is not None:
            found.rows.append(row)
        else:
            found.dropped[problem or "it is none"] += 1
    if not found.rows:
        why = ", ".join(f"{count} since {reason}" for reason, count in found.dropped.most_common(3))
        raise ConfigError(f"{path} has no row that can be used{': ' + why if why else ''}", "Check it, and --images.")
    return found


def _row(line: bytes, number: int) -> tuple[Row | None, str | None]:
    try:
        told = parse_json(line)
        if not isinstance(told, dict):
            return None, "it is no JSON object"
        row = _of_messages(told, number) if "messages" in told else Row.of(told)
        if problem := _shape_problem(row):
            return None, problem
        Chat.of(row.prompt, turns=row.history)
        parse_output(row.output)
    except BadRequest as error:
        return None, error.message
    except RewriteUnreadable:
        return None, "its output is not in the rewriter's format"
    except (KeyError, TypeError, AttributeError) as error:
        return None, f"it is no row: {type(error).__name__}"
    return row, None


def _shape_problem(row: Row) -> str | None:
    if not isinstance(row.id, str) or not row.id:
        return "its id is no text"
    if not isinstance(row.prompt, str) or not isinstance(row.output, str):
        return "prompt and output are no texts"
    for one in row.images:
        if not isinstance(one, Mapping) or not isinstance(one.get("path"), str) or not one["path"]:
            return "its images are not objects with a path"
        if not isinstance(one.get("sha256") or "", str):
            return "a picture's sha256 is no text"
    if not isinstance(row.origin, Mapping):
        return "its origin is no object"
    return None


def _picture_problem(row: Row, folder: Path, known: dict[tuple[str, str], str | None]) -> str | None:
    for one in row.images:
        path, expected = one["path"], one.get("sha256") or ""
        if (path, expected) not in known:
            known[path, expected] = _problem_of(folder / path, expected)
        if problem := known[path, expected]:
            return problem
    return None


def _problem_of(path: Path, expected: str) -> str | None:
    try:
        data = path.read_bytes()
    except OSError:
        return "a picture of it is missing"
    if expected and hashlib.sha256(data).hexdigest() != expected:
        return "a picture of it is another one than its hash says"
    return None


# messages + images


def to_messages(row: Row) -> dict[str, Any]:
    """A row as ms-swift and LLaMA-Factory take it: earlier turns, the request, the output; pictures by path.

    Our own fields stay beside it under "vlmguard"; those trainers pass them over.
    """
    marks = PICTURE_MARK * len(row.images)
    turns = [{"role": turn["role"], "content": _text(turn)} for turn in row.history]
    return {
        "messages": [
            *turns,
            {"role": "user", "content": marks + row.prompt},
            {"role": "assistant", "content": row.output},
        ],
        "images": [one["path"] for one in row.images],
        "vlmguard": {name: value for name, value in row.fields().items() if name not in ("prompt", "output")},
    }


def write_messages(rows: Iterable[Row], path: Path) -> None:
    path.write_text("".join(json.dumps(to_messages(row), ensure_ascii=False) + "\n" for row in rows), "utf-8")


def _of_messages(told: Mapping[str, Any], number: int) -> Row:
    own = told.get("vlmguard") or {}
    *turns, request, output = told["messages"]
    if (request["role"], output["role"]) != ("user", "assistant"):
        raise BadRequest("its last messages are not a request and an output")
    images = own.get("images") or [{"path": path} for path in told.get("images") or ()]
    history = own.get("history", turns)
    prompt = _text(request).replace(PICTURE_MARK, "")
    kind = own.get("kind") or ("helpfulness" if _text(output).strip() == "safe" else "safety")
    return Row(
        str(own.get("id", f"line-{number}")),
        tuple(images),
        prompt,
        _text(output),
        kind,
        own.get("origin", {}),
        tuple(history),
        own.get("made", {}),
    )


def _text(turn: Mapping[str, Any]) -> str:
    content = turn["content"]
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")
