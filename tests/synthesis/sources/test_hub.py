"""The hub's own client against a server that answers as the hub does: with a set, or where it is gated or missing."""

from __future__ import annotations

import errno
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.synthesis.sources.test_sources import spa_vl
from tests.synthesis.standing_in import png
from vlmguard.errors import ConfigError, MissingExtra
from vlmguard.synthesis.sample import Sample
from vlmguard.synthesis.sources import opened
from vlmguard.synthesis.sources.hub import on_hub

STATUS = {"GatedRepo": 403, "RepoNotFound": 401, "RevisionNotFound": 404}


class Hub(BaseHTTPRequestHandler):
    """Refuses everything with `code`."""

    code = "GatedRepo"

    def do_GET(self) -> None:
        body = json.dumps({"error": "no"}).encode()
        self.send_response(STATUS[self.code])
        self.send_header("X-Error-Code", self.code)
        self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the server's own name)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield address
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("GatedRepo", r"is gated.*Accept its terms on .*hf auth login.*vlguard:PATH"),
        ("RepoNotFound", r"shows no data set.*hf auth login.*vlguard:PATH"),
        ("RevisionNotFound", "no revision"),
    ],
)
def test_a_set_that_the_hub_does_not_give_says_how_to_get_it(
    hub: str, monkeypatch: pytest.MonkeyPatch, code: str, said: str
) -> None:
    monkeypatch.setattr(Hub, "code", code)
    with pytest.raises(ConfigError, match=said):
        opened("vlguard", revision="abc")


def test_no_connection_is_said(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"cannot be fetched.*local copy as vlguard:PATH"):
        opened("vlguard")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Giving(BaseHTTPRequestHandler):
    """Gives the data set sqrti/SPA-VL, whose files are `files`, and counts what it is asked for."""

    files: ClassVar[dict[str, bytes]] = {}
    told: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[str]] = []
    refused: ClassVar[bool] = False

    def do_GET(self) -> None:
        _, _, name = self.path.partition(f"/datasets/sqrti/SPA-VL/resolve/{COMMIT}/")
        if self.command == "GET":
            self.asked.append(name or self.path)
        status = 200
        if self.path.startswith("/api/datasets/sqrti/SPA-VL/auth-check"):
            body, status = b"{}", 403 if self.refused else 200
        elif self.path.startswith("/api/datasets/sqrti/SPA-VL"):
            siblings = [{"rfilename": file} for file in self.files]
            body = json.dumps({"id": "sqrti/SPA-VL", "sha": COMMIT, "siblings": siblings, **self.told}).encode()
        else:
            body = self.files[name]
        self.send_response(status)
        if status != 200:
            self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("ETag", f'"{hash(body):x}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 (the server's own name)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def giving(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Giving]]:
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Giving)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    spa_vl(tmp_path / "set")
    names = [f"data/train-0000{number}-of-00002.parquet" for number in (0, 1)]
    monkeypatch.setattr(Giving, "files", {name: (tmp_path / "set" / name).read_bytes() for name in names})
    monkeypatch.setattr(Giving, "told", {"gated": "auto", "cardData": {"license": ["cc0-1.0", "mit"]}})
    monkeypatch.setattr(Giving, "asked", [])
    yield Giving
    server.shutdown()
    server.server_close()


def test_a_set_on_the_hub_is_fetched_as_far_as_it_is_read(giving: type[Giving]) -> None:
    source = opened("spa-vl", revision="main")
    assert (source.revision, source.licence, source.gated) == (COMMIT, "cc0-1.0, mit", True)
    first, second = giving.files
    assert [name for name in giving.asked if name in giving.files] == [first]
    found = list(source)
    assert [one.id for one in found] == ["train-0", "train-1", "train-2"]
    assert [one.id for one in source] == ["train-0", "train-1", "train-2"]
    assert [name for name in giving.asked if name in giving.files] == [first, second]
    assert isinstance(found[0], Sample)
    assert (found[0].origin.revision, found[0].pictures[0].read()) == (COMMIT, png("red"))


def test_a_gated_sets_files_are_not_tried_without_access(giving: type[Giving], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Giving, "refused", True)
    with pytest.raises(ConfigError, match=r"sqrti/SPA-VL is gated"):
        opened("spa-vl")
    assert not [name for name in giving.asked if name in giving.files]
    monkeypatch.setattr(Giving, "told", {"gated": False})
    assert (opened("spa-vl").gated, opened("spa-vl").licence) == (False, "cc-by-4.0")


def test_a_file_that_the_set_lacks_is_not_asked_for(giving: type[Giving]) -> None:
    files = on_hub("sqrti/SPA-VL", "spa-vl")
    assert files.fetch("data/none.png") is None
    assert "data/none.png" not in giving.asked


def test_a_set_that_lost_a_file_says_so(giving: type[Giving], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Giving, "files", dict(list(giving.files.items())[:1]))
    with pytest.raises(ConfigError, match=r"sqrti/SPA-VL has 1 of the 2 files"):
        opened("spa-vl")


def test_a_full_disk_is_said(giving: type[Giving], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(ConfigError, match=r"cannot be kept in .*cache: No space left on device\. Make room there"):
        opened("spa-vl")


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE is set.*local copy as spa-vl:PATH"):
        opened("spa-vl")


def test_a_refusal_of_another_kind_is_said(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATUS, "Other", 403)
    monkeypatch.setattr(Hub, "code", "Other")
    with pytest.raises(ConfigError, match=r"refused ys-zong/VLGuard: HTTP 403.*hf auth login"):
        opened("vlguard")


def test_without_the_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r"vlmguard-r1\[synthesis\]"):
        opened("mis")
