"""Long runs of base64 are set aside while a body is read: what comes out is what a plain reader makes of it."""

from __future__ import annotations

import base64
import json
import random
import string
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlmguard.errors import BadRequest
from vlmguard.strict_json import LONG_BYTES, MOST_QUOTES, parse_json

RUN = base64.b64encode(random.Random(0).randbytes(LONG_BYTES)).decode()
OTHER = base64.b64encode(random.Random(1).randbytes(LONG_BYTES)).decode()
LONG = st.sampled_from(
    [RUN, f"data:image/png;base64,{RUN}", f"{RUN},{OTHER}", f'"{RUN}"', f"\\{RUN}", f"{RUN}é", "1" * LONG_BYTES]
)
VALUES = st.recursive(
    LONG | st.text(max_size=5) | st.integers(-(2**63), 2**64 - 1) | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | LONG, inner, max_size=3),
    max_leaves=6,
)


@given(VALUES, st.booleans())
@example({RUN: 1, OTHER: RUN}, True)
def test_a_body_with_long_runs_is_read_as_it_stands(value: object, ascii_only: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


def test_two_pictures_go_back_to_their_own_places() -> None:
    assert parse_json(json.dumps([RUN, {"url": f"data:,{OTHER}"}, RUN]).encode()) == [
        RUN,
        {"url": f"data:,{OTHER}"},
        RUN,
    ]


@pytest.mark.parametrize(
    "body",
    [
        '{"%s": 1, "%s": 2}',  # F008: one key, twice
        '{"a": "%s", "a": "%s"}',
        '["%s" "%s"]',
        '["a"%s"b", "%s"]',  # outside a string
        '["%s\\x", "%s"]',
        '["\\u00%s", "%s"]'.replace("00", "zz"),
        '["%s", "%s',
    ],
)
def test_what_is_wrong_around_a_long_run_is_refused(body: str) -> None:
    with pytest.raises(BadRequest):
        parse_json((body % (RUN, RUN)).encode())


def test_a_line_break_inside_a_long_run_is_refused() -> None:
    with pytest.raises(BadRequest):
        parse_json(f'["{RUN[:100]}\n{RUN[100:]}"]'.encode())


def test_many_quotes_before_a_long_run_change_nothing() -> None:
    value = [*string.ascii_letters * (MOST_QUOTES // 20), RUN]
    assert parse_json(json.dumps(value).encode()) == value


def test_reading_a_picture_takes_a_few_times_its_size() -> None:
    body = json.dumps({"url": f"data:image/png;base64,{RUN * 16}"}).encode()
    tracemalloc.start()
    parse_json(body)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3.5 * len(body)
