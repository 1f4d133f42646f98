"""Where a set's files lie, and what a local copy tells of its provenance."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.synthesis.sources.test_sources import spa_vl
from vlmguard.errors import ConfigError
from vlmguard.synthesis.sample import Sample
from vlmguard.synthesis.sources import opened
from vlmguard.synthesis.sources.files import in_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_the_clients_own_cache_names_the_commit(tmp_path: Path) -> None:
    spec = spa_vl(tmp_path / "snapshots" / COMMIT)
    source = opened(spec)
    assert source.revision == COMMIT
    (first, *_) = source
    assert isinstance(first, Sample)
    assert first.origin.revision == COMMIT


def test_a_name_like_a_commit_alone_is_none(tmp_path: Path) -> None:
    assert opened(spa_vl(tmp_path / "mine" / COMMIT)).revision is None


def test_files_are_in_the_order_of_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spa_vl(tmp_path)
    walked = [(folder, inner[::-1], sorted(files)[::-1]) for folder, inner, files in os.walk(tmp_path)]
    monkeypatch.setattr("os.walk", lambda *_, **__: iter(walked))
    names = ("data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet")
    assert in_folder(tmp_path).names == names


def test_a_download_names_the_commit_in_its_notes(tmp_path: Path) -> None:
    spec = spa_vl(tmp_path)
    assert opened(spec).revision is None
    notes = tmp_path / ".cache/huggingface/download"
    notes.mkdir(parents=True)
    for name in ("README.md", "a.parquet"):
        (notes / f"{name}.metadata").write_text(f"{COMMIT}\netag\n1.0\n")
    assert opened(spec).revision == COMMIT
    assert opened(spec, revision="mine").revision == "mine"
    (notes / "b.metadata").write_text(f"{COMMIT[::-1]}\netag\n1.0\n")
    assert opened(spec).revision is None


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlanguage: en\nlicense: cc0-1.0\n---\n# A set\n", "cc0-1.0"),
        ('---\n{\n  "license": "cc-by-nc-4.0",\n  "size": []\n}\n---\n', "cc-by-nc-4.0"),
        ("# A set\n\nlicense: mit\n", "cc-by-4.0"),
        ("---\nlanguage: en\n---\nlicense: mit\n", "cc-by-4.0"),
    ],
)
def test_the_licence_is_the_cards_in_yaml_or_json(tmp_path: Path, card: str, licence: str) -> None:
    spec = spa_vl(tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert opened(spec).licence == licence


def test_a_folder_that_cannot_be_read_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        in_folder(tmp_path)
