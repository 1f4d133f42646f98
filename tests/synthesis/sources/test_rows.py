"""The rows of parquet, JSON arrays and JSON lines: whole, broken, torn, and never all in memory."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.synthesis.sources.test_sources import held, lines, parquet
from vlmguard.errors import ConfigError, MissingExtra
from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources import opened
from vlmguard.synthesis.sources import rows as reading
from vlmguard.synthesis.sources.files import in_folder
from vlmguard.synthesis.sources.rows import Broken, rows


def read(path: Path) -> list[Any]:
    return [fields for _, fields in rows(in_folder(path), path.name)]


ROWS: list[Any] = [{"a": '[,]"\\'}, {}, {"b": [1, {"c": "}"}]}, {"d": "é𝄞" * 40}, {"e": None}]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 10_000])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_read_the_same_in_pieces_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, indent: int | None
) -> None:
    monkeypatch.setattr(reading, "READ_CHARACTERS", size)
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False) + "\n", "utf-8")
    assert read(path) == ROWS


def test_an_empty_array_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text("[ ]")
    assert read(tmp_path / "train.json") == []
    with pytest.raises(ConfigError, match="holds no samples"):
        opened(f"vlguard:{tmp_path}")


@pytest.mark.parametrize(
    "row", ["5", "123456", '"text"', "[]", "null", '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e999}']
)
def test_an_element_that_is_no_row_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str) -> None:
    monkeypatch.setattr(reading, "READ_CHARACTERS", 4)
    path = tmp_path / "a.json"
    path.write_text(f'[{{"a": 1}}, {row}, {{"b": 2}}]')
    first, wrong, last = read(path)
    assert (first, last) == ({"a": 1}, {"b": 2})
    assert isinstance(wrong, Broken)


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"b": ',
        '[{"a": 1}',
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1},]',
        '[{"a": 1}] [{"b": 2}]',
        '{"a": [1]}',
        '{"a": 1}]',
        '[{"a": ]',
        "[" * 100_000 + "]",
        "version https://git-lfs.github.com/spec/v1",
    ],
)
def test_an_array_that_is_none_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"JSON array|Git LFS pointer"):
        read(path)


def test_a_torn_array_is_told_of_before_its_first_row_is_used(tmp_path: Path) -> None:
    (tmp_path / "train.json").write_text(f"[{json.dumps({'id': 'a'})}, {json.dumps({'id': 'b'})}")
    with pytest.raises(ConfigError, match="not a JSON array, or a part of it is missing"):
        opened(f"vlguard:{tmp_path}")


def test_a_long_element_without_an_end_is_not_read_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_ROW", 1000)
    monkeypatch.setattr(reading, "READ_CHARACTERS", 100)
    path = tmp_path / "a.json"
    path.write_text('[{"a": "' + "x" * 100_000 + '"}]')
    with pytest.raises(ConfigError, match="JSON array"):
        read(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32"])
def test_other_encodings_are_one_error(tmp_path: Path, name: str, encoding: str) -> None:
    path = tmp_path / name
    path.write_bytes('[{"a": 1}]'.encode(encoding))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read(path)


def test_latin_1_is_one_error_in_an_array_and_one_row_in_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes('[{"a": "é"}]'.encode("latin-1"))
    with pytest.raises(ConfigError, match="is not UTF-8"):
        read(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n{"a": "é"}\n{"b": 2}'.encode("latin-1"))
    first, wrong, last = read(tmp_path / "a.jsonl")
    assert (first, last) == ({"a": 1}, {"b": 2})
    assert wrong == Broken("it is not UTF-8 at byte 7")


def test_lines_are_numbered_from_one_blank_ones_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\r\n  \n{"a": 2, "a": 3}\n{"b": 2}\n')
    found = list(rows(in_folder(path), path.name))
    assert [number for number, _ in found] == [2, 4, 5]
    assert found[1][1] == Broken("the key 'a' is twice in one object")


def test_a_line_that_is_too_long_leaves_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_ROW", 50)
    monkeypatch.setattr(reading, "READ_CHARACTERS", 16)
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "' + "x" * 500 + '"}\n{"b": 2}\n{"c": "' + "x" * 500)
    first, second, third = read(path)
    assert (first, second, third) == (Broken("it has over 50 bytes"), {"b": 2}, Broken("it has over 50 bytes"))


def test_a_parquet_file_without_a_column_says_what_it_has(tmp_path: Path) -> None:
    parquet(tmp_path / "train.parquet", [{"picture": b"", "question": "?"}])
    with pytest.raises(ConfigError, match=r"has no column image; it has picture, question"):
        opened(f"spa-vl:{tmp_path}")


def test_a_torn_parquet_file_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    parquet(path, [{"image": held("red"), "question": "?"}])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="not a parquet file, or a part of it is missing"):
        opened(f"spa-vl:{tmp_path}")


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "train.parquet", [{"image": held("red"), "question": "?"}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[synthesis\]"):
        opened(f"spa-vl:{tmp_path}")


def _heavy(count: int, size: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        noise = bytes((number * 7 + at * at) % 251 for at in range(97)) * (size // 97)
        yield {"image": {"bytes": b"\x89PNG\r\n\x1a\n" + noise, "path": f"{number}.png"}, "question": f"{number}?"}


def test_pictures_in_parquet_are_never_all_in_memory(tmp_path: Path) -> None:
    """One row group of 20 MB: what is at hand stays under a quarter of it."""
    table = pyarrow.Table.from_pylist(list(_heavy(200, 100_000)))
    options = {"row_group_size": 200, "compression": "none", "use_dictionary": False, "write_batch_size": 8}
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet", **options)
    del table
    before = pyarrow.total_allocated_bytes()
    most, count = 0, 0
    for one in opened(f"spa-vl:{tmp_path}"):
        assert isinstance(one, Sample)
        most, count = max(most, pyarrow.total_allocated_bytes() - before), count + 1
    assert count == 200
    assert most < 5_000_000


@pytest.mark.parametrize("name", ["train.json", "mine.jsonl"])
def test_texts_are_never_all_in_memory(tmp_path: Path, name: str) -> None:
    """16 MB of rows: what Python holds while reading stays under half of it, ids and all."""
    row = {"id": "", "image": "none.png", "prompt": "x" * 4000} if name == "mine.jsonl" else {"id": "", "x": "x" * 4000}
    found = [{**row, "id": str(number)} for number in range(4000)]
    lines(tmp_path / name, found)
    if name == "train.json":
        (tmp_path / name).write_text(json.dumps(found))
    source = opened(f"vlguard:{tmp_path}" if name == "train.json" else f"{tmp_path}/{name}")
    del found
    tracemalloc.start()
    try:
        assert sum(isinstance(one, Malformed) for one in source) == 4000
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
