"""BeaverTails-V (arXiv 2503.17682): questions about pictures in 20 classes of harm; answers that are labelled safe or not.

Layout: parquet, the pictures inside: data/CLASS/train.parquet and data/CLASS/evaluation.parquet. On
saferlhf-v/BeaverTails-V a row has two answers: question, image, response_1, response_2, is_response_1_safe,
is_response_2_safe, safer_response_id and more. On PKU-Alignment/BeaverTails-V it has one: response, is_response_safe (a
text). Both are read; the first is the one on the hub here, since its answers need not be put together. The columns are
known from the sets' cards and other people's code, the paths from such code alone. Not known: how the labels are spelled,
and whether the answers to one request follow each other, as is taken here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any, Final

from vlmguard.errors import BadRequest
from vlmguard.synthesis.sample import Answer, Origin, Sample
from vlmguard.synthesis.sources.pictures import Pictures
from vlmguard.synthesis.sources.rows import Broken, Fields, Rows
from vlmguard.synthesis.sources.source import Read, Source, Wanted, answer, text
from vlmguard.synthesis.sources.tables import Table

HUB: Final = "saferlhf-v/BeaverTails-V"
LICENCE: Final = "cc-by-nc-4.0"  # of the card of either
NEEDED: Final = ("question", "image")
ONE: Final = (("response", "is_response_safe"),)
TWO: Final = (("response_1", "is_response_1_safe"), ("response_2", "is_response_2_safe"))
OPTIONAL: Final = (*(column for pair in (*ONE, *TWO) for column in pair), "safer_response_id")
LABELS: Final = {
    **dict.fromkeys(("yes", "true", "safe", "1"), True),
    **dict.fromkeys(("no", "false", "unsafe", "0"), False),
}


def beavertails_v(wanted: Wanted) -> Source:
    """A safe and an unsafe answer to one question about one picture: the first of each, the safer and the less safe one
    where the set tells. None where there is none of a kind."""
    table = Table.of(wanted, HUB, ".parquet", ".jsonl")

    def read(origin: Origin) -> Read:
        def made(row: str, fields: Fields, pictures: Pictures) -> Read:
            safe, unsafe = _pair(fields["rows"])
            picture = pictures.of(fields.get("image"), f"{row}.image")
            yield Sample(row, (picture,), text(fields, "question"), replace(origin, row=row), safe, unsafe)

        return table.read(made, NEEDED, OPTIONAL, grouped=_requests)

    return table.source(LICENCE, read)


def _requests(found: Rows) -> Rows:
    """The rows that follow each other with one question and picture as one, which holds them all as "rows"."""

    def request(numbered: tuple[int, Fields | Broken]) -> Any:
        number, fields = numbered
        if isinstance(fields, Broken) or "response" not in fields:
            return number
        return fields.get("question"), fields.get("image")

    for _, group in groupby(found, request):
        (number, first), *others = group
        if isinstance(first, Broken):
            yield number, first
        else:
            yield number, {**first, "rows": [first, *(fields for _, fields in others)]}


def _pair(group: list[Fields]) -> tuple[Answer | None, Answer | None]:
    """The first safe and the first unsafe answer of all. Raises BadRequest."""
    safer = [one for fields in group for one in _answers(fields)]
    less_safe = [one for fields in group for one in reversed(list(_answers(fields)))]
    safe = next((given for given, is_safe in safer if is_safe), None)
    unsafe = next((given for given, is_safe in less_safe if not is_safe), None)
    return safe, unsafe


def _answers(fields: Fields) -> Iterator[tuple[Answer, bool]]:
    """A row's answers and whether each is safe, the safer one first. Raises BadRequest."""
    columns = ONE if "response" in fields else TWO
    if str(fields.get("safer_response_id")) == "2":
        columns = columns[::-1]
    for column, label in columns:
        given = answer(fields, column)
        if given is not None:
            safe = LABELS.get(str(fields.get(label)).strip().lower())
            if safe is None:
                raise BadRequest(f"its label {label} is neither yes nor no")
            yield given, safe
