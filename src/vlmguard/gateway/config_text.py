"""Settings as text: TOML with its secrets hidden, and sentences about what is wrong with a file."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

SHOWN_CHARACTERS: Final = 60
HASH_CHARACTERS: Final = 8  # of a key's hash: enough to tell two apart
PASSWORD: Final = re.compile(r"^([\w+.-]+://[^:/@]*):.*@", re.DOTALL)
QUERY: Final = re.compile(r"([?&][^=&#]*)=[^&#]*")  # drivers take passwords there too
EXPECTED: Final = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "int_type": "a whole number",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "mapping_type": "a table",
    "missing": "a value",
    "model_type": "a table",
    "string_type": "text",
    "string_unicode": "text in Unicode",
    "tuple_type": "a list",
}
# Where a key itself belongs, for those who look for a place for it in the file.
KEYS: Final = ("api_key", "apikey", "key", "token", "secret", "password")
BELONGS: Final = {
    "target": 'set an environment variable to it, and name that here: api_key_env = "NAME"',
    "guard": "set VLMGUARD_API_KEY to it",
    "keys": "put its SHA-256 here as sha256; `vlmguard key` makes a key and its hash",
}


def toml(value: Any) -> str:
    """A value on one line of TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, float) and value.is_integer():
        return f"{value:.0f}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name(key)} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value)


def name(key: str) -> str:
    """A key of TOML, in quotes where it needs them."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else toml(key)


def table(header: str, section: BaseModel) -> str:
    """A section as TOML, its secrets hidden; what is not set is a comment."""
    lines = [header]
    for key, value in section:
        if isinstance(value, str):
            value = f"{value[:HASH_CHARACTERS]}..." if key == "sha256" else hidden(value)
        lines.append(f"# {key} is not set" if value is None else f"{key} = {toml(value)}")
    return "\n".join(lines) + "\n"


def hidden(text: str) -> str:
    """An address without its password and the values of its query; any other text as it is."""
    if "://" not in text:
        return text
    return QUERY.sub(r"\1=***", PASSWORD.sub(r"\1:***@", text))


def got(value: Any) -> str:
    """A wrong value for a message; not an address that may hold a password."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, str) and set(value) & set("@?\n"):
        return f"a text of {len(value)} characters"
    shown = toml(value)
    return shown if len(shown) <= SHOWN_CHARACTERS else shown[:SHOWN_CHARACTERS] + "..."


def explained(error: ValidationError, sections: Mapping[str, type[BaseModel]]) -> str:
    """What is wrong, a line each: "[section] key: expected X, got Y"."""
    return "\n".join(dict.fromkeys(_sentence(detail, sections) for detail in error.errors(include_url=False)))


def _sentence(detail: ErrorDetails, sections: Mapping[str, type[BaseModel]]) -> str:
    where, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return _unknown(where, detail["input"], sections)
    if kind == "value_error":
        problem = str(context["error"])
        return f"{_place(where)}: {problem}" if where else problem
    expected = EXPECTED[kind].format(**context) if kind in EXPECTED else detail["msg"]
    if where == ("keys",):
        expected = "[[keys]], a table for each key"
    value = "nothing" if kind == "missing" else got(detail["input"])
    return f"{_place(where)}: expected {expected}, got {value}"


def _place(where: Sequence[int | str]) -> str:
    section, *rest = where
    if section == "keys" and rest and isinstance(rest[0], int):
        place, rest = f"[[keys]] number {rest[0] + 1}", rest[1:]
    else:
        place = f"[{section}]"
    if not rest:
        return place
    inner = "".join(f"[{step}]" if isinstance(step, int) else f".{name(step)}" for step in rest[1:])
    return f"{place} {rest[0]}{inner}"


def _unknown(where: Sequence[int | str], value: object, sections: Mapping[str, type[BaseModel]]) -> str:
    section, key = str(where[0]), str(where[-1])
    if len(where) == 1 and isinstance(value, Mapping | list):
        near = difflib.get_close_matches(key, sections, n=1)
        rest = f"did you mean {_header(near[0])}?" if near else f"known are {', '.join(sections)}"
        return f"[{key}]: unknown section; {rest}"
    if len(where) > 1 and key.lower() in KEYS and section in BELONGS:
        return f"{_place(where)}: a key or password does not stand in the file; {BELONGS[section]}"
    place = _place(where) if len(where) > 1 else key
    near = list(_near(section if len(where) > 1 else None, key, sections))
    known = list(sections[section].model_fields) if len(where) > 1 else list(map(_header, sections))
    return f"{place}: unknown key; " + (f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}")


def _near(section: str | None, key: str, sections: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """The known keys that `key` may stand for: those of its own section first."""
    if section is not None:
        yield from difflib.get_close_matches(key, sections[section].model_fields, n=1)
    places = {field: other for other, model in sections.items() for field in model.model_fields}
    for field in difflib.get_close_matches(key, places, n=1):
        yield f"{_header(places[field])} {field}"


def _header(section: str) -> str:
    return "[[keys]]" if section == "keys" else f"[{section}]"
