"""Every layout gives the same kind of samples; a contract for all, and each one's own ways."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.synthesis.standing_in import png
from vlmguard.errors import ConfigError
from vlmguard.images import decode
from vlmguard.synthesis.sample import Malformed, Sample
from vlmguard.synthesis.sources import SOURCES, Source, opened
from vlmguard.synthesis.sources import files as files_of

COLOURS = ("red", "green", "blue")


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def held(colour: str) -> dict[str, Any]:
    return {"bytes": png(colour), "path": f"{colour}.png"}


def lines(path: Path, rows: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pictures(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        (folder / f"{colour}.png").write_bytes(png(colour))


def spa_vl(folder: Path) -> str:
    rows = [{"image": held(colour), "question": f"{colour}?", "chosen": "no", "rejected": "yes"} for colour in COLOURS]
    for number, part in enumerate((rows[:2], rows[2:])):
        parquet(folder / f"data/train-0000{number}-of-00002.parquet", part)
    return f"spa-vl:{folder}"


def vlguard(folder: Path) -> str:
    pictures(folder / "train")
    safe = [
        {"safe_instruction": "What is it?", "response": "A colour."},
        {"unsafe_instruction": "Harm?", "response": "No."},
    ]
    unsafe = [{"instruction": "How?", "response": "No."}]
    rows = [
        {"id": "a", "image": "red.png", "safe": True, "instr-resp": safe},
        {"id": "b", "image": "green.png", "safe": False, "instr-resp": unsafe},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return f"vlguard:{folder}"


def vlsbench(folder: Path) -> str:
    pictures(folder / "imgs")
    rows = [
        {"instruction_id": n, "instruction": f"Do {n}", "image_path": f"imgs/{c}.png"} for n, c in enumerate(COLOURS)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return f"vlsbench:{folder}"


def beavertails_v(folder: Path) -> str:
    rows = [
        {"image": held(colour), "question": f"{colour}?", "response": said, "is_response_safe": label, "category": "x"}
        for colour in COLOURS
        for said, label in (("Yes!", "no"), ("Rather not.", "yes"), ("Sure!", "no"))
    ]
    parquet(folder / "data/x/train-00000-of-00001.parquet", rows)
    return f"beavertails-v:{folder}"


def mis(folder: Path) -> str:
    pictures(folder)
    turns = [{"from": "human", "value": "<image>\n<image>\nBoth?"}, {"from": "gpt", "value": "Keep them apart."}]
    rows = [
        {"images": ["red.png", "blue.png"], "conversations": turns},
        {"images": ["green.png"], "conversations": turns},
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    return f"mis:{folder}"


def jsonl(folder: Path) -> str:
    pictures(folder)
    rows = [
        {"id": "a", "image": "red.png", "prompt": "Hm?", "safe": "No.", "unsafe": "Yes."},
        {"images": ["red.png", "blue.png"], "prompt": "And?", "benign": True, "licence": "CC0", "source": "mine"},
        {"prompt": "Words alone", "history": [{"role": "user", "content": "Hi"}]},
    ]
    lines(folder / "mine.jsonl", rows)
    return str(folder / "mine.jsonl")


LAYOUTS: dict[str, Callable[[Path], str]] = {
    "beavertails-v": beavertails_v,
    "jsonl": jsonl,
    "mis": mis,
    "spa-vl": spa_vl,
    "vlguard": vlguard,
    "vlsbench": vlsbench,
}


def good(source: Source) -> list[Sample]:
    found = list(source)
    assert not [one for one in found if isinstance(one, Malformed)], found
    return [one for one in found if isinstance(one, Sample)]


def test_every_source_has_a_layout_here() -> None:
    assert LAYOUTS.keys() == SOURCES.keys()


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_keeps_the_contract(tmp_path: Path, name: str) -> None:
    source = opened(LAYOUTS[name](tmp_path))
    found = good(source)
    assert len(found) >= 2
    assert len({one.id for one in found}) == len(found)
    assert [one.id for one in source] == [one.id for one in found]
    for one in found:
        assert one.origin.name
        assert one.origin.licence
        assert one.origin.row == one.id
        assert one.prompt
        for picture in one.pictures:
            assert decode(picture.read())
            assert picture.reference
    assert source.name
    assert source.licence


def test_only_what_is_read_is_opened(tmp_path: Path) -> None:
    """A set of a hundred thousand rows is not read to its end for its first."""
    source = opened(spa_vl(tmp_path))
    (tmp_path / "data/train-00001-of-00002.parquet").write_bytes(b"not parquet at all")
    reading = iter(source)
    assert [next(reading).id, next(reading).id] == ["train-0", "train-1"]
    with pytest.raises(ConfigError, match="not a parquet file"):
        next(reading)


def test_spa_vl_takes_the_preferred_answer_as_the_safe_one(tmp_path: Path) -> None:
    one = good(opened(spa_vl(tmp_path)))[0]
    assert one.safe is not None
    assert one.unsafe is not None
    assert (one.safe.text, one.unsafe.text, one.benign) == ("no", "yes", False)


def test_vlguard_has_two_instructions_for_a_safe_picture(tmp_path: Path) -> None:
    found = good(opened(vlguard(tmp_path)))
    assert [(one.prompt, one.benign, one.unsafe) for one in found] == [
        ("What is it?", True, None),
        ("Harm?", False, None),
        ("How?", False, None),
    ]


def test_vlguards_pictures_may_be_in_its_archive(tmp_path: Path) -> None:
    spec = vlguard(tmp_path)
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        for colour in COLOURS:
            archive.write(tmp_path / f"train/{colour}.png", f"train/{colour}.png")
            (tmp_path / f"train/{colour}.png").unlink()
    assert good(opened(spec))[0].pictures[0].read() == png("red")


def test_beavertails_pairs_a_safe_and_an_unsafe_answer(tmp_path: Path) -> None:
    found = good(opened(beavertails_v(tmp_path)))
    assert len(found) == 3
    for one in found:
        assert one.safe is not None
        assert one.unsafe is not None
        assert (one.safe.text, one.unsafe.text) == ("Rather not.", "Yes!")


def test_mis_has_several_pictures_and_no_marks(tmp_path: Path) -> None:
    one = good(opened(mis(tmp_path)))[0]
    assert (one.prompt, len(one.pictures)) == ("Both?", 2)


def test_a_plain_file_tells_where_its_rows_are_from(tmp_path: Path) -> None:
    first, second, third = good(opened(jsonl(tmp_path)))
    assert (first.origin.name, first.origin.licence) == ("mine.jsonl", "unknown")
    assert (second.origin.name, second.origin.licence, second.benign, second.id) == ("mine", "CC0", True, "2")
    assert third.history == ({"role": "user", "content": "Hi"},)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": 7}, "expected text, got int"),
        ({"prompt": " "}, "neither a prompt nor a picture"),
        ({"prompt": "a", "image": "none.png"}, "none.png is missing"),
        ({"prompt": "a", "image": "../red.png"}, "leads out of the folder"),
        ({"prompt": "a", "image": "http://x/red.png"}, "an address"),
        ({"prompt": "a", "image": "red.png", "sha256": "0"}, "another one than its sha256"),
        ({"prompt": "a", "text": "b"}, "a field 'text'"),
        ({"prompt": "a", "benign": "yes"}, "true or false"),
        ({"prompt": "a", "history": [{"content": "b"}]}, "expected a role"),
        ({"prompt": "a", "safe": 1}, "safe: expected text"),
        ([1], "not a JSON object"),
    ],
)
def test_a_row_that_is_no_sample_is_told_of(tmp_path: Path, row: Any, reason: str) -> None:
    pictures(tmp_path)
    lines(tmp_path / "mine.jsonl", [{"id": "good", "prompt": "a"}, row, {"id": "after", "prompt": "b"}])
    first, second, third = opened(str(tmp_path / "mine.jsonl"))
    assert (first.id, third.id) == ("good", "after")
    assert isinstance(second, Malformed)
    assert reason in second.reason


def test_a_repeated_id_a_torn_line_and_a_bom(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "prompt": "x"}\n\n{"id": "a", "prompt": "y"}\n{"id": "b", "prom')
    first, second, third = opened(str(path))
    assert isinstance(first, Sample)
    assert isinstance(second, Malformed)
    assert second.reason == "another row has its id"
    assert second.id != first.id
    assert isinstance(third, Malformed)
    assert "ends in the middle" in third.reason


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ("spavl", "did you mean spa-vl"),
        ("none.jsonl", "is no file"),
        ("vlguard:{folder}/none", "there is no file or folder"),
        ("vlguard:{folder}/nothing", "holds no .json"),
        ("{folder}/empty.jsonl", "is empty"),
        ("{folder}/wide.jsonl", "is not UTF-8"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_error(tmp_path: Path, spec: str, problem: str) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "wide.jsonl").write_bytes('{"prompt": "a"}'.encode("utf-16"))
    with pytest.raises(ConfigError, match=problem):
        opened(spec.format(folder=tmp_path))


def test_a_split_that_is_not_there_and_one_that_is_incomplete(tmp_path: Path) -> None:
    spec = spa_vl(tmp_path)
    with pytest.raises(ConfigError, match="train"):
        opened(spec, split="tests")
    (tmp_path / "data/train-00001-of-00002.parquet").unlink()
    with pytest.raises(ConfigError, match="1 of the 2 files"):
        opened(spec)


def test_a_local_copys_card_names_its_licence(tmp_path: Path) -> None:
    spec = spa_vl(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# A set\n")
    assert opened(spec).licence == "cc0-1.0"
    assert files_of.in_folder(tmp_path).licence == "cc0-1.0"
