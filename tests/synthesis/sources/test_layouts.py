"""What is particular to a layout: which answers are which, which splits there are, and rows that are wrong."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.synthesis.sources.test_sources import good, held, lines, parquet, pictures
from tests.synthesis.standing_in import png
from vlmguard.errors import ConfigError
from vlmguard.pixels import Limits
from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources import opened
from vlmguard.synthesis.sources import pictures as finding


def array(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def reasons(spec: str) -> list[str | None]:
    return [one.reason if isinstance(one, Malformed) else None for one in opened(spec)]


def test_spa_vls_test_splits_have_no_answers(tmp_path: Path) -> None:
    for split in ("harm", "help"):
        row = {"image": held("red"), "question": f"{split}?", "class1": "x"}
        parquet(tmp_path / f"test/{split}-00000-of-00001.parquet", [row])
    with pytest.raises(ConfigError, match=r"no split 'train'\. Name one of harm, help"):
        opened(f"spa-vl:{tmp_path}")
    (one,) = good(opened(f"spa-vl:{tmp_path}", split="help"))
    assert (one.prompt, one.safe, one.unsafe, one.benign) == ("help?", None, None, False)


def test_other_files_beside_spa_vls_are_not_its_rows(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train-00000-of-00001.parquet", [{"image": held("red"), "question": "?"}])
    array(tmp_path / "meta_files/train.json", [{"question": "not this"}])
    (tmp_path / ".cache").mkdir()
    lines(tmp_path / ".cache/train.jsonl", [{"question": "nor this"}])
    assert [one.prompt for one in good(opened(f"spa-vl:{tmp_path}"))] == ["?"]


def test_a_row_of_a_table_that_is_wrong_leaves_the_others(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"image": held("red"), "question": None, "chosen": "a", "rejected": "b"},
        {"image": {"bytes": None, "path": None}, "question": "?", "chosen": "a", "rejected": "b"},
        {"image": {"bytes": b"GIF or so", "path": "x.gif"}, "question": "?", "chosen": "a", "rejected": "b"},
        {"image": {"bytes": b"", "path": "x.gif"}, "question": "?", "chosen": "a", "rejected": "b"},
        {"image": held("red"), "question": "?", "chosen": "", "rejected": None},
    ]
    parquet(tmp_path / "train.parquet", rows)
    assert reasons(f"spa-vl:{tmp_path}") == [
        "question: expected text, got nothing",
        "image: expected a picture, got nothing",
        "the image is of no format that is read here",
        "its picture is empty",
        None,
    ]
    assert [one.id for one in opened(f"spa-vl:{tmp_path}")] == [f"train-{number}" for number in range(5)]


def test_one_file_of_a_split_is_read_alone(tmp_path: Path) -> None:
    path = tmp_path / "train-00003-of-00008.parquet"
    parquet(path, [{"image": held("red"), "question": "?"}])
    with pytest.raises(ConfigError, match="1 of the 8 files"):
        opened(f"spa-vl:{tmp_path}")
    assert len(good(opened(f"spa-vl:{path}"))) == 1


def vlguard_row(**changed: Any) -> dict[str, Any]:
    told = [{"safe_instruction": "What?", "response": "A colour."}, {"unsafe_instruction": "Harm?", "response": "No."}]
    return {"id": "a", "image": "red.png", "safe": True, "instr-resp": told, **changed}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"id": None}, "id: expected text, got nothing"),
        ({"safe": "yes"}, "safe: expected true or false, got str"),
        ({"instr-resp": []}, "instr-resp: expected an array of one instruction or more, got list"),
        ({"instr-resp": {"instruction": "?"}}, "instr-resp: expected an array of one instruction or more, got dict"),
        ({"instr-resp": ["?"]}, "instr-resp: expected an object, got str"),
        ({"image": "blue/red.png"}, "its picture blue/red.png is missing"),
        ({"instr-resp": [{"instruction": "?", "response": "No."}]}, "a picture that is safe has a field instruction"),
        (
            {"safe": False, "instr-resp": [{"safe_instruction": "?", "response": "No."}]},
            "a picture that is unsafe has a field safe_instruction",
        ),
        ({"instr-resp": [{"safe_instruction": 5, "response": "No."}]}, "safe_instruction: expected text, got int"),
        ({"instr-resp": [{"response": "No."}]}, "got none"),
        (
            {"instr-resp": [{"safe_instruction": "?", "unsafe_instruction": "!", "response": "No."}]},
            "got safe_instruction and unsafe_instruction",
        ),
    ],
)
def test_a_row_of_vlguard_that_is_wrong(tmp_path: Path, changed: dict[str, Any], reason: str) -> None:
    pictures(tmp_path / "train")
    array(tmp_path / "train.json", [vlguard_row(**changed), vlguard_row(id="b")])
    wrong, *others = list(opened(f"vlguard:{tmp_path}"))
    assert isinstance(wrong, Malformed)
    assert reason in wrong.reason
    assert [one.id for one in others] == ["train-b-0", "train-b-1"]


def test_one_wrong_instruction_leaves_the_pictures_other(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    told = [{"safe_instruction": "", "response": "x"}, {"unsafe_instruction": "Harm?", "response": "No."}]
    array(tmp_path / "train.json", [vlguard_row(**{"instr-resp": told})])
    first, second = opened(f"vlguard:{tmp_path}")
    assert isinstance(first, Malformed)
    assert first.reason == "safe_instruction is empty"
    assert isinstance(second, Sample)
    assert (second.prompt, second.safe and second.safe.text, second.benign) == ("Harm?", "No.", False)


def test_vlguard_is_gated_and_its_rows_of_one_id_are_told_of(tmp_path: Path) -> None:
    pictures(tmp_path / "train")
    array(tmp_path / "train.json", [vlguard_row(), vlguard_row()])
    source = opened(f"vlguard:{tmp_path}")
    assert (source.gated, source.licence) == (True, "mit")
    assert [isinstance(one, Malformed) for one in source] == [False, False, True, True]
    assert len({one.id for one in source}) == 4


@pytest.mark.parametrize("inside", ["train/red.png", "red.png", "./red.png"])
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_picture_is_found_in_an_archive(tmp_path: Path, kind: str, inside: str) -> None:
    array(tmp_path / "train.json", [vlguard_row()])
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
            archive.writestr(inside.removeprefix("./"), png("red"))
    else:
        with tarfile.open(tmp_path / "train.tar", "w") as tar:
            member = tarfile.TarInfo(inside)
            member.size = len(png("red"))
            tar.addfile(member, io.BytesIO(png("red")))
    first, second = good(opened(f"vlguard:{tmp_path}"))
    assert first.pictures == second.pictures
    assert (first.pictures[0].read(), first.pictures[0].reference) == (png("red"), "red.png")


def test_an_archive_of_another_split_is_left_alone(tmp_path: Path) -> None:
    array(tmp_path / "train.json", [vlguard_row()])
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/other.png", png("red"))
    (tmp_path / "test.zip").write_bytes(b"not to be opened")
    assert reasons(f"vlguard:{tmp_path}") == ["its picture red.png is missing"]


def test_a_damaged_archive_is_one_error(tmp_path: Path) -> None:
    array(tmp_path / "train.json", [vlguard_row()])
    (tmp_path / "train.zip").write_bytes(b"PK and then nothing")
    with pytest.raises(ConfigError, match=r"train\.zip is not an archive, or a part of it is missing"):
        opened(f"vlguard:{tmp_path}")
    (tmp_path / "train.zip").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        opened(f"vlguard:{tmp_path}")


def test_a_damaged_member_is_one_row(tmp_path: Path) -> None:
    array(tmp_path / "train.json", [vlguard_row(), vlguard_row(id="b", image="blue.png")])
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("red.png", png("red"))
        archive.writestr("blue.png", png("blue"))
    data = (tmp_path / "train.zip").read_bytes()
    (tmp_path / "train.zip").write_bytes(data.replace(png("red"), png("red")[:-1] + b"?"))
    assert reasons(f"vlguard:{tmp_path}") == ["its picture red.png cannot be unpacked", None, None]


@pytest.mark.parametrize("packed", [False, True])
def test_a_picture_over_the_limit_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    array(tmp_path / "train.json", [vlguard_row()])
    data = png("red") + bytes(5000)
    if packed:
        with zipfile.ZipFile(tmp_path / "train.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("red.png", data)
    else:
        (tmp_path / "red.png").write_bytes(data)
    monkeypatch.setattr(finding, "LIMITS", Limits(bytes=4000))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    assert reasons(f"vlguard:{tmp_path}") == [f"the image has {len(data):,} bytes"]


def test_images_is_where_paths_are_seen_from(tmp_path: Path) -> None:
    pictures(tmp_path / "set/train")
    array(tmp_path / "set/train.json", [vlguard_row()])
    (tmp_path / "own").mkdir()
    (tmp_path / "own/red.png").write_bytes(png("blue"))
    found = good(opened(f"vlguard:{tmp_path}/set", images=tmp_path / "own"))
    assert found[0].pictures[0].read() == png("blue")
    with pytest.raises(ConfigError, match="there is no folder"):
        opened(f"vlguard:{tmp_path}/set", images=tmp_path / "none")


def test_vlsbench_has_its_own_ids_and_other_files_beside_it(tmp_path: Path) -> None:
    pictures(tmp_path / "imgs")
    rows = [{"instruction_id": 7, "instruction": "Do it", "image_path": "imgs/red.png", "safety_reason": "x"}]
    array(tmp_path / "data.json", [*rows, {**rows[0], "instruction_id": [7]}, {**rows[0], "instruction_id": True}])
    array(tmp_path / "results.json", [{"score": 1}])
    first, *wrong = opened(f"vlsbench:{tmp_path}")
    assert isinstance(first, Sample)
    assert (first.id, first.origin.row, first.origin.licence) == ("7", "7", "apache-2.0")
    assert (first.safe, first.unsafe, first.pictures[0].reference) == (None, None, "imgs/red.png")
    assert [isinstance(one, Malformed) for one in wrong] == [True, True]


def test_vlsbench_in_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "data/train.parquet", [{"instruction_id": 3, "instruction": "Do it", "image": held("red")}])
    (one,) = good(opened(f"vlsbench:{tmp_path}"))
    assert (one.id, one.pictures[0].read()) == ("3", png("red"))


def two(colour: str, first: str, second: str, safer: int | None) -> dict[str, Any]:
    return {
        "image": held(colour),
        "question": f"{colour}?",
        "response_1": "one",
        "response_2": "two",
        "is_response_1_safe": first,
        "is_response_2_safe": second,
        "safer_response_id": safer,
    }


@pytest.mark.parametrize(
    ("first", "second", "safer", "safe", "unsafe"),
    [
        ("yes", "no", 1, "one", "two"),
        ("No", " YES ", 2, "two", "one"),
        ("yes", "yes", 1, "one", None),
        ("yes", "yes", 2, "two", None),
        ("no", "no", 1, None, "two"),
        ("no", "no", 2, None, "one"),
    ],
)
def test_beavertails_two_answers_in_a_row(
    tmp_path: Path, first: str, second: str, safer: int, safe: str | None, unsafe: str | None
) -> None:
    for category in ("animal_abuse", "terrorism"):
        parquet(tmp_path / f"data/{category}/train.parquet", [two("red", first, second, safer)])
        parquet(tmp_path / f"data/{category}/evaluation.parquet", [two("blue", first, second, safer)])
    found = good(opened(f"beavertails-v:{tmp_path}"))
    assert [one.id for one in found] == ["train-0", "train-1"]
    for one in found:
        assert (one.safe and one.safe.text, one.unsafe and one.unsafe.text) == (safe, unsafe)


def test_beavertails_answers_to_another_picture_or_question_stay_apart(tmp_path: Path) -> None:
    def one(colour: str, question: str, label: str) -> dict[str, Any]:
        said = {"response": label, "is_response_safe": label}
        return {"image": {"bytes": png(colour), "path": "same.png"}, "question": question, **said}

    asked = [("red", "a", "yes"), ("blue", "a", "no"), ("blue", "b", "yes"), ("blue", "b", "no"), ("red", "a", "no")]
    parquet(tmp_path / "data/x/train.parquet", [one(*row) for row in asked])
    found = [
        (one.id, one.prompt, bool(one.safe), bool(one.unsafe)) for one in good(opened(f"beavertails-v:{tmp_path}"))
    ]
    assert found == [
        ("train-0", "a", True, False),
        ("train-1", "a", False, True),
        ("train-2", "b", True, True),
        ("train-4", "a", False, True),
    ]


def test_beavertails_an_answer_without_a_label_is_told_of(tmp_path: Path) -> None:
    rows = [two("red", "perhaps", "no", 1), {**two("blue", "perhaps", "no", 1), "response_1": ""}]
    parquet(tmp_path / "data/x/train.parquet", rows)
    assert reasons(f"beavertails-v:{tmp_path}") == ["its label is_response_1_safe is neither yes nor no", None]


def test_mis_as_its_authors_have_it(tmp_path: Path) -> None:
    pictures(tmp_path / "mis_train/images")
    told = [
        {"from": "human", "value": "Image-1: <image>\nImage-2: <image>\nWhat are these?"},
        {"from": "gpt", "value": "Two colours."},
        {"from": "human", "value": "And mixed?"},
        {"from": "gpt", "value": "Better not."},
    ]
    rows = [
        {"image": ["images/red.png", "images/blue.png"], "conversations": told},
        {"image": "images/red.png", "conversations": told[:1]},
        {"image": ["images/red.png"], "conversations": told[:1] * 2},
        {"image": ["images/red.png"], "conversations": [{"from": "tool", "value": "x"}]},
        {"image": ["images/red.png"], "conversations": [{"from": "human", "value": "<image>"}]},
        {"image": ["images/red.png"], "conversations": [{"from": "gpt", "value": "x"}]},
        {"image": [], "conversations": told},
        {"image": ["images/none.png"], "conversations": told},
        {"image": ["images/red.png"], "conversations": "x"},
    ]
    array(tmp_path / "mis_train/mis_train.json", rows)
    array(tmp_path / "mis_test/mis_hard.json", [{"question": "?", "image_path1": "a", "image_path2": "b"}])
    first, second, third, *wrong = opened(f"mis:{tmp_path}")
    assert isinstance(first, Sample)
    assert (first.id, first.prompt, first.safe and first.safe.text) == ("train-0", "And mixed?", "Better not.")
    assert first.history == (
        {"role": "user", "content": "What are these?"},
        {"role": "assistant", "content": "Two colours."},
    )
    assert [picture.reference for picture in first.pictures] == ["images/red.png", "images/blue.png"]
    assert len(first.chat().messages) == 3
    assert isinstance(second, Sample)
    assert (second.prompt, second.safe, len(second.pictures)) == ("What are these?", None, 1)
    assert isinstance(third, Sample)
    assert [one.reason for one in wrong if isinstance(one, Malformed)] == [
        "a turn of its conversation is from nobody known",
        "a turn of its conversation is empty",
        "its conversation has no question at its end",
        "it has no pictures",
        "its picture images/none.png is missing",
        "conversations: expected an array of turns, got str",
    ]


def test_mis_test_sets_have_numbered_paths(tmp_path: Path) -> None:
    pictures(tmp_path)
    array(tmp_path / "mis_hard.json", [{"question": "?", "image_path2": "blue.png", "image_path1": "red.png"}])
    (one,) = good(opened(f"mis:{tmp_path}", split="hard"))
    assert [picture.reference for picture in one.pictures] == ["red.png", "blue.png"]
    assert one.safe is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": True, "prompt": "a"}, "id: expected a text or a number, got bool"),
        ({"id": ["a"], "prompt": "a"}, "id: expected a text or a number, got list"),
        ({"id": "a\nb", "prompt": "a"}, "characters on one line"),
        ({"id": "a" * 201, "prompt": "a"}, "characters on one line"),
        ({"licence": 5, "prompt": "a"}, "licence: expected text, got int"),
        ({"source": " ", "prompt": "a"}, "source is empty"),
        ({"image": "red.png", "images": ["red.png"], "prompt": "a"}, "image and images"),
        ({"images": "red.png", "prompt": "a"}, "images: expected a list, got str"),
        ({"image": 5, "prompt": "a"}, "image: expected a picture, got int"),
        ({"image": "data:image/png;base64,?", "prompt": "a"}, "not base64"),
        ({"image": "/etc/hosts", "prompt": "a"}, "leads out of the folder"),
        ({"image": "x" * 5000, "prompt": "a"}, "is missing"),
        ({"image": "mine.jsonl", "prompt": "a"}, "of no format that is read here"),
    ],
)
def test_a_row_of_ones_own_that_is_wrong(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    pictures(tmp_path)
    lines(tmp_path / "mine.jsonl", [row, {"id": "after", "prompt": "b"}])
    wrong, after = opened(str(tmp_path / "mine.jsonl"))
    assert (wrong.id.strip() in ("1", "a"), after.id) == (True, "after")
    assert isinstance(wrong, Malformed)
    assert reason in wrong.reason
    assert len(wrong.reason) < 300


def test_a_picture_may_stand_in_the_line(tmp_path: Path) -> None:
    from vlmguard.images import to_data_uri

    lines(tmp_path / "mine.jsonl", [{"id": 7, "images": [to_data_uri(png("red"))], "prompt": ""}])
    (one,) = good(opened(f"jsonl:{tmp_path}/mine.jsonl"))
    assert (one.id, one.prompt, one.pictures[0].read(), one.pictures[0].reference) == ("7", "", png("red"), "7-0")
    with pytest.raises(ConfigError, match="has no splits"):
        opened(f"{tmp_path}/mine.jsonl", split="train")


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from vlmguard.synthesis.sources.jsonl import jsonl\n\ndef layout(wanted):\n    return jsonl(wanted)\n"
    )
    lines(tmp_path / "rows.jsonl", [{"prompt": "a"}])
    assert len(good(opened(f"{tmp_path}/mine.py:layout:{tmp_path}/rows.jsonl"))) == 1


def test_a_folder_without_its_layouts_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not say whose layout it has.*NAME:"):
        opened(str(tmp_path))
