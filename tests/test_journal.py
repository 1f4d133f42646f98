"""A journal after a kill, on a full disk, and under two hands."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from vlmguard.errors import ConfigError, VLMGuardError
from vlmguard.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lines.jsonl"


def test_what_is_written_is_read_back(path: Path) -> None:
    with Journal(path, "id") as journal:
        journal.append({"id": "a", "text": "ü\n\ud800"})
        journal.append({"id": "b"})
        journal.append({"id": "a", "text": "other"})
    with Journal(path, "id") as journal:
        assert len(journal) == 2
        assert [told["id"] for told in journal] == ["a", "b"]
        assert "a" in journal
        assert "c" not in journal
        assert journal.get("c") is None
        assert (journal.get("b") or {})["id"] == "b"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_torn_last_line_is_cut_off_and_said_again(path: Path, cut: int) -> None:
    with Journal(path, "id") as journal:
        journal.append({"id": "a"})
        journal.append({"id": "b"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with Journal(path, "id") as journal:
        assert [told["id"] for told in journal] == ["a"]
        journal.append({"id": "b"})
    assert path.read_bytes() == whole


def test_a_line_of_something_else_is_damage(path: Path) -> None:
    path.write_text('{"id": "a"}\nnonsense\n{"id": "b"}\n')
    with pytest.raises(ConfigError, match="its line 2 has no id"):
        Journal(path, "id")
    assert path.read_text().count("\n") == 3


def test_two_cannot_write_one_journal(path: Path) -> None:
    with Journal(path, "id"), pytest.raises(ConfigError, match="another process"):
        Journal(path, "id")
    Journal(path, "id").__exit__()


def test_a_full_disk_leaves_what_was_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite

    def full(file: int, data: bytes, at: int) -> int:
        if len(data) > 4:
            return real(file, data[:4], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path, "id") as journal:
        journal.append({"id": "a"})
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(VLMGuardError, match=r"No space left on device; 1 lines are in it.*--resume"):
            journal.append({"id": "b"})
        monkeypatch.undo()
        assert "b" not in journal
        journal.append({"id": "c"})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == ["a", "c"]


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        Journal(tmp_path / "none" / "lines.jsonl", "id")
