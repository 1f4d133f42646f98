"""The hub's own client against a server that answers as the hub does where a set is gated, missing or unreachable."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vlmguard.errors import ConfigError
from vlmguard.synthesis.sources import opened

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
