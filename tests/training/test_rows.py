"""What is read of a dataset, and what is dropped of it with which reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.datasets import OUTPUT, dataset, rows
from vlmguard.errors import ConfigError
from vlmguard.training.rows import read, to_messages, write_messages


def test_a_datasets_folder_or_file_is_read_and_its_rows_give_chats(tmp_path: Path) -> None:
    path = dataset(tmp_path)
    for found in (read(tmp_path), read(path)):
        assert [row.id for row in found.rows] == [f"r{number}" for number in range(12)]
        assert not found.dropped
        assert [len(found.chat(row).images) for row in found.rows[:3]] == [0, 1, 2]
        assert len(found.chat(found.rows[4]).messages) == 3


def test_pictures_may_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row.fields()) + "\n" for row in rows(tmp_path / "pictures")))
    assert len(read(path, tmp_path / "pictures").rows) == 12
    assert read(path).dropped == {"a picture of it is missing": 8}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[1]", "it is no JSON object"),
        ('{"id": "a"}', "it is no row: KeyError"),
        ('{"id": "a", "prompt": 1, "output": "safe"}', "prompt and output are no texts"),
        ('{"id": "a", "prompt": "Hi", "output": "perhaps"}', "its output is not in the rewriter's format"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "output": "safe"}', "twice in one object"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "images": [{"path": "none.png"}]}', "is missing"),
        (
            '{"id": "a", "prompt": "Hi", "output": "safe", "images": [{"path": "red.png", "sha256": "0"}]}',
            "another one",
        ),
        ('{"id": "a", "prom', "is not JSON"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_with_a_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = dataset(tmp_path)
    path.write_text(path.read_text() + line + "\n")
    found = read(path)
    assert len(found.rows) == 12
    assert found.dropped.total() == 1
    assert reason in next(iter(found.dropped))


def test_a_file_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dataset.jsonl").write_text("{}\n\n{}\n")
    with pytest.raises(ConfigError, match=r"no row that can be used: 2 since it is no row"):
        read(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none")


def test_messages_and_images_survive_a_round_trip(tmp_path: Path) -> None:
    dataset(tmp_path)
    before = read(tmp_path)
    write_messages(before.rows, tmp_path / "messages.jsonl")
    assert read(tmp_path / "messages.jsonl").rows == before.rows


def test_messages_of_other_tools_are_read(tmp_path: Path) -> None:
    rows(tmp_path)
    told: dict[str, Any] = {
        "messages": [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": [{"type": "text", "text": "<image>And this?"}]},
            {"role": "assistant", "content": OUTPUT},
        ],
        "images": ["red.png"],
    }
    wrong = {"messages": told["messages"][:3]}
    path = tmp_path / "swift.jsonl"
    path.write_text(json.dumps(told) + "\n" + json.dumps(wrong) + "\n")
    found = read(path)
    row = found.rows[0]
    assert (row.prompt, row.output, row.images, len(row.history)) == ("And this?", OUTPUT, ({"path": "red.png"},), 2)
    assert found.dropped == {"its last messages are not a request and an output": 1}
    assert to_messages(row)["messages"][2]["content"] == "<image>And this?"


def test_what_is_held_out_depends_on_the_ids_alone(tmp_path: Path) -> None:
    dataset(tmp_path, 400)
    found = read(tmp_path)
    learn, held = found.split(0.2)
    assert len(learn) + len(held) == 400
    assert 50 < len(held) < 110
    found.rows = found.rows[::-1][:300]
    assert {row.id for row in found.split(0.2)[1]} <= {row.id for row in held}
    assert found.split(0.0)[1] == []
