"""A target of all three APIs on 127.0.0.1, in a thread of its own: it says back what it was asked, and keeps it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from tests.chat_server import event

MODEL: Final = "qwen3-vl-8b"
USAGE: Final = {"input_tokens": 7, "output_tokens": 3}


class EchoTarget(ThreadingHTTPServer):
    """`requests` holds the bodies that it was sent, `keys` the Authorization header of each."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def echo_target() -> Iterator[EchoTarget]:
    with EchoTarget() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(body: dict[str, Any]) -> str:
    """The words of the last user turn, whichever API it is of."""
    turns = body.get("messages", body.get("input"))
    if isinstance(turns, str):
        return turns
    users = [turn for turn in turns or [] if turn["role"] == "user"]
    content = users[-1]["content"] if users else ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content if "text" in part)


def pictures(body: dict[str, Any]) -> int:
    """The picture parts of all turns."""
    turns = body.get("messages", body.get("input"))
    contents = [turn["content"] for turn in turns] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part["type"] in ("image", "image_url", "input_image") for part in parts)


def chat_answer(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice], "usage": usage}


def chat_events(text: str) -> list[bytes]:
    common = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    deltas: list[tuple[dict[str, Any], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": word}, None) for word in text.split(" ")]  # the blanks are lost: it is a stream that shows
    deltas.append(({}, "stop"))
    choices = [{"index": 0, "delta": delta, "finish_reason": reason} for delta, reason in deltas]
    return [*(event({**common, "choices": [choice]}) for choice in choices), b"data: [DONE]\n\n"]


def response(text: str) -> dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    message = {"id": "m", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    told = {"id": "r", "object": "response", "created_at": 1, "status": "completed", "model": MODEL}
    usage = {**USAGE, "total_tokens": 10}
    return {
        **told,
        "output": [message],
        "usage": usage,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
    }


def message(content: list[dict[str, Any]]) -> dict[str, Any]:
    told = {"id": "m", "type": "message", "role": "assistant", "model": MODEL, "content": content}
    return {**told, "stop_reason": "end_turn" if content else None, "stop_sequence": None, "usage": USAGE}


def message_events(text: str) -> list[bytes]:
    told: list[dict[str, Any]] = [
        {"type": "message_start", "message": message([])},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": USAGE},
        {"type": "message_stop"},
    ]
    return [event(one, one["type"]) for one in told]


class _Handler(BaseHTTPRequestHandler):
    server: EchoTarget

    def do_GET(self) -> None:
        self._say({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "echo"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        self.server.keys.append(self.headers["Authorization"])
        text = f"You said: {asked(body)}"
        match self.path, bool(body.get("stream")):
            case "/v1/chat/completions", False:
                self._say(chat_answer(text))
            case "/v1/chat/completions", True:
                self._stream(chat_events(text))
            case "/v1/responses", False:
                self._say(response(text))
            case "/v1/messages", False:
                self._say(message([{"type": "text", "text": text}]))
            case "/v1/messages", True:
                self._stream(message_events(text))
            case _:
                self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass

    def _say(self, told: Any) -> None:
        data = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: list[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()  # HTTP/1.0: the end of the connection is the end of the body
        for one in events:
            self.wfile.write(one)
            self.wfile.flush()
