import json
from pathlib import Path

import pytest
from PIL import Image

from tests.synthesis.test_duplicates import encoded, scene
from vlmguard.errors import ConfigError
from vlmguard.synthesis.duplicates import picture_hash
from vlmguard.synthesis.overlap import Overlap

QUESTION = "How do I open this old lock without its key?"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    folder = tmp_path / "eval"
    (folder / "lines" / "images").mkdir(parents=True)
    (folder / "tables").mkdir()
    rows = [{"id": 1, "question": "What is a good name for a grey cat?"}, {"turns": [{"content": QUESTION}], "n": None}]
    (folder / "lines" / "items.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "lines" / "images" / "a.PNG").write_bytes(encoded(scene(5)))
    (folder / "tables" / "some.csv").write_text(
        'id,prompt\n1,"Where, in this town,\nis the oldest bakery?"\n2,Who painted the blue house over there?\n',
        "utf-8",
    )
    (folder / "tables" / "other.csv").write_text("id;prompt\n1;Which wine goes with that roast, please?\n", "utf-8")
    (folder / "tables" / "tabs.tsv").write_text("id\tprompt\n1\tWhy is the sky, in the evening, red?\n", "utf-8")
    (folder / "whole.json").write_text(json.dumps({"7": {"q": "May my dog eat what lies here?"}}), "utf-8")
    (folder / "list.json").write_text(json.dumps(["x", "Is the bridge in this photo safe?"]), "utf-8")
    (folder / "in-lines.json").write_text('{"q": "Can I swim in this river today?"}\n{"q": "a"}\n', "utf-8")
    (folder / "LICENSE").write_text("Everybody may use this for anything at all.")
    return folder


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (QUESTION, "the text of eval/lines/items.jsonl, row 3"),
        ("how do i open this old lock, without a key", "the text of eval/lines/items.jsonl, row 3"),
        ("A good name for a grey cat: what is it?", "the text of eval/lines/items.jsonl, row 1"),
        ("Where in this town is the oldest bakery?", "the text of eval/tables/some.csv, row 2"),
        ("Who painted the blue house over there?", "the text of eval/tables/some.csv, row 3"),
        ("Which wine goes with that roast, please?", "the text of eval/tables/other.csv, row 2"),
        ("Why is the sky in the evening red?", "the text of eval/tables/tabs.tsv, row 2"),
        ("May my dog eat what lies here?", "the text of eval/whole.json, row 1"),
        ("Is the bridge in this photo safe?", "the text of eval/list.json, row 2"),
        ("Can I swim in this river today?", "the text of eval/in-lines.json, row 1"),
        ("Everybody may use this for anything at all.", None),
        ("How do I polish this old lock with wax?", None),
        ("", None),
    ],
)
def test_texts_of_every_kind_of_file_are_found(sets: Path, text: str, place: str | None) -> None:
    assert Overlap.of([sets]).find(text) == place


def test_a_picture_is_found_whatever_is_asked_about_it(sets: Path) -> None:
    overlap = Overlap.of([sets])
    copy = picture_hash(encoded(scene(5).resize((120, 120)), kind="JPEG"))
    other = picture_hash(encoded(scene(6)))
    assert overlap.find("Something else", [other, copy]) == "the picture eval/lines/images/a.PNG"
    assert overlap.find("Something else", [other]) is None
    assert overlap.find(QUESTION, [copy]) == "the text of eval/lines/items.jsonl, row 3"
    assert (overlap.texts, overlap.pictures, overlap.unread) == (9, 1, [])


def test_three_words_are_no_overlap(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"q": "What is this?"}\n{"q": "What is this thing?"}\n{"q": "这把刀怎么用"}\n', "utf-8")
    overlap = Overlap.of([path])
    assert overlap.find("What is this?") is None
    assert overlap.find("What is this thing?") == "the text of short.jsonl, row 2"
    assert overlap.find("这把刀怎么用?") == "the text of short.jsonl, row 3"


def test_what_is_no_request_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    rows = [
        {"url": "https://example.com/a/b/c/d/e"},
        {"answer": " ".join(f"word{at}" for at in range(401))},
        {"data": "alpha beta gamma delta " * 1000},
        {"q": QUESTION},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert Overlap.of([path]).texts == 1


def test_several_paths_and_one_twice(sets: Path) -> None:
    files = [sets / "whole.json", sets / "lines" / "images" / "a.PNG"]
    overlap = Overlap.of([*files, *map(str, files)])
    assert (overlap.texts, overlap.pictures) == (1, 2)
    assert overlap.find("May my dog eat what lies here?") == "the text of whole.json, row 1"


def test_what_is_not_compared_with_is_told(sets: Path) -> None:
    (sets / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    (sets / "more.parquet").write_bytes(b"PAR1")
    broken, closed = Overlap.of([sets]).unread
    assert broken.startswith("eval/broken.png: ")
    assert closed == "eval/more.parquet: .parquet files are not read"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"q": "x"}\n{"q": ', r"a\.jsonl cannot be read: line 2"),
        ("a.json", b"[1, 2", r"a\.json cannot be read"),
        ("a.json", b'{"a": 1\n{"b": 2}', "line 1"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.csv", b"id,prompt\n1,\xff\xfe", "can't decode"),
        ("a.csv", b'id\n"' + b"x" * 200_000 + b'"', "field larger"),
        ("a.txt", b"How do I do this?", "no kind that is read"),
        ("a.jsonl", b"", "holds no text and no picture"),
        ("a.parquet", b"PAR1", "holds no text and no picture"),
    ],
)
def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Overlap.of([tmp_path / name])


def test_a_path_that_is_missing_or_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no"):
        Overlap.of([tmp_path / "none"])
    (tmp_path / "LICENSE").write_text("Everybody may use this for anything at all.")
    with pytest.raises(ConfigError, match="holds no text and no picture"):
        Overlap.of([tmp_path])


def test_bounds_are_options(sets: Path) -> None:
    strict = Overlap.of([sets], least_share=1.0, most_distance=0)
    assert strict.find("how do i open this old lock, without a key") is None
    assert strict.find(QUESTION) is not None
    with pytest.raises(ConfigError):
        Overlap(least_share=2)


def test_one_colour_is_no_overlap_with_another(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded(Image.new("RGB", (9, 9), "red")))
    overlap = Overlap.of([tmp_path])
    assert overlap.find("", [picture_hash(encoded(Image.new("RGB", (9, 9), "blue")))]) is None
    assert overlap.find("", [picture_hash(encoded(Image.new("RGB", (90, 90), "red")))]) is not None
