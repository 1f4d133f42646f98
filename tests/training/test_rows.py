"""What is read of a dataset, and what is dropped of it with which reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.training.datasets import OUTPUT, dataset, rows
from vlmguard.errors import ConfigError
from vlmguard.rewriter.protocol import INSTRUCTIONS
from vlmguard.rewriter.rewriter import question
from vlmguard.training.rows import Rows, read, to_messages, write_messages


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
        ('{"id": 5, "prompt": "Hi", "output": "safe"}', "its id is no text"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "images": ["red.png"]}', "not objects with a path"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "images": 5}', "it is no row: TypeError"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "history": ["Hi"]}', "expected an object"),
        ('{"id": "a", "prompt": "Hi", "output": "safe", "origin": "me"}', "its origin is no object"),
        ('{"messages": []}', "it is no row: ValueError"),
        ('{"messages": 5}', "it is no row: TypeError"),
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


@pytest.mark.parametrize("instructed", [False, True])
def test_messages_and_images_survive_a_round_trip(tmp_path: Path, instructed: bool) -> None:
    dataset(tmp_path)
    before = read(tmp_path).rows
    before.append(replace(before[4], id="odd", prompt='Copy "<image>" \\ \u200bthis \n twice', made={"features": [1]}))
    write_messages(before, tmp_path / "messages.jsonl", instructed=instructed)
    assert read(tmp_path / "messages.jsonl").rows == before


@pytest.mark.parametrize("instructed", [False, True])
def test_other_trainers_get_what_the_guard_asks(tmp_path: Path, instructed: bool) -> None:
    dataset(tmp_path)
    found = read(tmp_path)
    for row in (*found.rows, replace(found.rows[1], prompt="What is <image> in HTML?")):
        told = to_messages(row, instructed=instructed)
        asked = question(found.chat(row), instructed=instructed)
        *system, user, assistant = told["messages"]
        assert system == ([{"role": "system", "content": INSTRUCTIONS}] if instructed else [])
        assert user["content"].count("<image>") == len(told["images"]) == len(asked.images)
        assert user["content"].replace("<image>", "") == asked.text
        assert assistant["content"] == row.output


def test_rows_for_other_trainers_that_lost_their_row_are_not_taken_for_conversations(tmp_path: Path) -> None:
    dataset(tmp_path)
    told = [to_messages(row) for row in read(tmp_path).rows]
    for one in told[1:]:
        del one["vlmguard"]
    (tmp_path / "messages.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told))
    found = read(tmp_path / "messages.jsonl")
    assert (len(found.rows), found.dropped.total()) == (1, 11)
    assert "vlmguard field is missing" in next(iter(found.dropped))


@pytest.mark.parametrize(
    ("images", "text", "problem"),
    [
        ([{"path": "red.png"}], "<image>Hi", None),
        (["red.png", "green.png"], "<image>Hi", "another number of pictures"),
        (["red.png"], "Hi", None),
        ([5], "<image>Hi", "not objects with a path"),
        (["data:image/png;base64,AAAA"], "<image>Hi", "is missing"),
    ],
)
def test_pictures_of_other_tools(tmp_path: Path, images: list[Any], text: str, problem: str | None) -> None:
    path = dataset(tmp_path)
    turns = [
        {"role": "system", "content": INSTRUCTIONS},
        {"role": "user", "content": text},
        {"role": "assistant", "content": "safe"},
    ]
    path.write_text(path.read_text() + json.dumps({"messages": turns, "images": images}))
    found = read(path)
    if problem is None:
        assert (found.rows[-1].images, found.rows[-1].prompt) == (({"path": "red.png"},), "Hi")
        assert found.rows[-1].history == ()
    else:
        assert problem in next(iter(found.dropped))


def test_rows_about_one_picture_are_held_out_together(tmp_path: Path) -> None:
    made = rows(tmp_path, 3)
    many = [
        replace(made[1], id=f"{picture}-{at}", images=({"path": "red.png", "sha256": f"{picture}"},))
        for picture in range(100)
        for at in range(3)
    ]
    found = Rows(many, tmp_path, "")
    learn, held = found.split(0.3)
    assert 50 < len(held) < 140
    assert not {row.images[0]["sha256"] for row in learn} & {row.images[0]["sha256"] for row in held}


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


def test_what_is_held_out_depends_on_the_ids(tmp_path: Path) -> None:
    dataset(tmp_path, 400)
    found = read(tmp_path)
    learn, held = found.split(0.2)
    assert len(learn) + len(held) == 400
    assert 50 < len(held) < 110
    found.rows = found.rows[::-1][:300]
    assert {row.id for row in found.split(0.2)[1]} <= {row.id for row in held}
    assert found.split(0.0)[1] == []
