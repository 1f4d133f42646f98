"""A plain JSONL file of your own.

    {"id": "a", "image": "photos/a.jpg", "prompt": "Which pose looks best here?", "safe": "...", "unsafe": "..."}

`id` (else the line's number), `images` in place of `image` (a path seen from the file, or from --images; or a data URI), `history`
(earlier turns: {"role", "content"}), `benign` (a harmless request, kept as it is), `source` and `licence` (of this row) and
`sha256` (of its one picture, which is then held against it) may be there; `safe` and `unsafe` may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from vlmguard.chat import Message
from vlmguard.errors import BadRequest, ConfigError
from vlmguard.strict_json import unexpected
from vlmguard.synthesis.sample import Malformed, Origin, Picture, Sample
from vlmguard.synthesis.sources.files import in_folder
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, Fields, rows
from vlmguard.synthesis.sources.source import Read, Source, Wanted, answer, text

FIELDS: Final = frozenset(
    (
        *("id", "image", "images", "prompt", "safe", "unsafe", "history", "benign", "source", "licence", "sha256"),
        *("language", "category"),  # which others may keep beside, and which are not read
    )
)
LONGEST_ID: Final = 200  # characters


def jsonl(wanted: Wanted) -> Source:
    """Raises ConfigError where the file is missing, empty, or no text in UTF-8."""
    if wanted.path is None or not wanted.path.is_file():
        raise ConfigError(f"{wanted.path or 'jsonl'} is no file", "Give a file of JSON lines: FILE.jsonl.")
    if wanted.split is not None:
        raise ConfigError(f"{wanted.path} has no splits", "Leave the split out.")
    files = in_folder(wanted.path, wanted.revision)
    origin = Origin(wanted.path.name, files.licence or "unknown", files.revision)

    def read() -> Read:
        with Pictures(files, files.names[0], "", wanted.images) as pictures:
            for number, fields in rows(files, files.names[0]):
                name = str(number)
                try:
                    if isinstance(fields, Broken):
                        raise BadRequest(fields.reason)
                    name = _name(fields, name)
                    yield _sample(name, fields, pictures, origin)
                except BadRequest as error:
                    yield Malformed(name, error.message)

    return Source(origin, False, read)


def _name(fields: Fields, number: str) -> str:
    """The row's own id, else its line's number. Raises BadRequest."""
    own = fields.get("id")
    if own is None:
        return number
    if isinstance(own, bool) or not isinstance(own, str | int):
        raise unexpected("a text or a number", own, "id")
    if not str(own).strip() or not str(own).isprintable() or len(str(own)) > LONGEST_ID:
        raise BadRequest(f"id: expected 1 to {LONGEST_ID} characters on one line")
    return str(own)


def _sample(name: str, fields: Fields, pictures: Pictures, origin: Origin) -> Sample:
    if wrong := sorted(set(fields) - FIELDS):
        raise BadRequest(f"it has a field {wrong[0][:40]!r}, which is none of a sample's")
    prompt = fields.get("prompt", "")
    if not isinstance(prompt, str):
        raise unexpected("text", prompt, "prompt")
    found = _pictures(name, fields, pictures)
    if not prompt.strip() and not found:
        raise BadRequest("it has neither a prompt nor a picture")
    benign = fields.get("benign", False)
    if not isinstance(benign, bool):
        raise unexpected("true or false", benign, "benign")
    own = Origin(_own(fields, "source", origin.name), _own(fields, "licence", origin.licence), origin.revision, name)
    safe, unsafe = answer(fields, "safe"), answer(fields, "unsafe")
    return Sample(name, found, prompt, own, safe, unsafe, _history(fields), benign)


def _own(fields: Fields, key: str, other: str) -> str:
    return other if fields.get(key) is None else text(fields, key)


def _pictures(name: str, fields: Fields, pictures: Pictures) -> tuple[Picture, ...]:
    one, several = fields.get("image"), fields.get("images")
    if one is not None and several is not None:
        raise BadRequest("it has image and images")
    values = [one] if one is not None else several or []
    if not isinstance(values, list):
        raise unexpected("a list", values, "images")
    found = tuple(pictures.of(value, f"{name}-{number}") for number, value in enumerate(values))
    expected = fields.get("sha256")
    if expected is not None and [picture.sha256 for picture in found] != [expected]:
        raise BadRequest("its picture is another one than its sha256 says")
    return found


def _history(fields: Fields) -> tuple[Mapping[str, Any], ...]:
    turns = fields.get("history") or []
    if not isinstance(turns, list):
        raise unexpected("a list", turns, "history")
    for number, turn in enumerate(turns):
        Message.parse(turn, f"history[{number}]")
    return tuple(turns)
