"""docs/open_webui_filter.py, loaded and called as Open WebUI does it, against a real gateway."""

import ast
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.served import ROOT, serving
from vlmguard.images import to_data_uri

FILTER = ROOT / "docs" / "open_webui_filter.py"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """No target is asked here; what the scripted rewriter calls unreadable is refused."""
    settings = '[target]\nurl = "http://127.0.0.1:9/v1"\n[policy]\nunreadable = "refuse"\npictures = "withhold"\n'
    with serving(settings, tmp_path_factory.mktemp("gateway")) as address:
        yield address


def load_filter() -> Any:
    """As Open WebUI does it: the text is run in a module that is gone from sys.modules afterwards."""
    module = types.ModuleType("function_vlmguard")
    sys.modules[module.__name__] = module
    try:
        exec(FILTER.read_text(encoding="utf-8"), module.__dict__)
    finally:
        del sys.modules[module.__name__]
    return module


def open_webui_body(content: Any) -> dict[str, Any]:
    """What a filter is given, with fields of Open WebUI's own that no model gets."""
    turns = [
        {"role": "user", "content": "Hi", "id": "1", "files": [{"type": "image", "url": "0b1c"}]},
        {"role": "assistant", "content": "Hello", "usage": {"total_tokens": 3}},
        {"role": "user", "content": content},
    ]
    return {"model": "m", "messages": turns, "stream": True, "features": {}, "metadata": {"chat_id": "c"}}


@pytest.fixture
def open_webui(served: str) -> Any:
    made = load_filter().Filter()
    made.valves = made.Valves(url=f"{served}/", key="vg-of-a-test")
    return made


def test_the_filter_is_one_of_open_webuis() -> None:
    text = FILTER.read_text(encoding="utf-8")
    head = text.split('"""')[1]
    assert text.startswith('"""\n')
    assert re.search(r"^title: \S", head, re.MULTILINE)
    assert "requirements:" not in head
    imported = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imported if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in imported if isinstance(node, ast.ImportFrom)}
    assert names == {"json", "typing", "aiohttp", "pydantic"}  # nothing that Open WebUI does not have
    made = load_filter().Filter()
    assert not hasattr(made, "toggle")  # a user could switch it off
    assert made.valves == made.Valves()
    assert made.valves.unreachable == "block"


async def test_the_filter_leaves_a_harmless_request_alone(open_webui: Any, png: bytes) -> None:
    picture = {"type": "image_url", "image_url": {"url": to_data_uri(png)}}
    for content in ("What is this?", [{"type": "text", "text": "What is this?"}, picture]):
        assert await open_webui.inlet(open_webui_body(content)) == open_webui_body(content)


async def test_the_filter_puts_the_rewritten_words_in(open_webui: Any, png: bytes) -> None:
    changed = await open_webui.inlet(open_webui_body("a risky thing"))
    assert changed == open_webui_body("Safely: a risky thing")
    picture = {"type": "image_url", "image_url": {"url": to_data_uri(png)}}
    words = [{"type": "text", "text": "a risky"}, picture, {"type": "text", "text": "thing"}]
    changed = await open_webui.inlet(open_webui_body(words))
    assert changed == open_webui_body([{"type": "text", "text": "Safely: a risky\nthing"}])  # the picture is withheld


async def test_the_filter_stops_what_is_refused(open_webui: Any) -> None:
    with pytest.raises(Exception, match=r"^I can't help with this request"):
        await open_webui.inlet(open_webui_body("unreadable"))
    remote = [{"type": "image_url", "image_url": {"url": "http://example.com/a.png"}}]
    with pytest.raises(Exception, match="not sent: the image is a remote address"):
        await open_webui.inlet(open_webui_body(remote))


async def test_the_filter_blocks_while_no_gateway_can_be_asked(open_webui: Any) -> None:
    body = open_webui_body("a risky thing")
    open_webui.valves = open_webui.Valves(url="http://127.0.0.1:9")
    with pytest.raises(Exception, match="cannot be checked now"):
        await open_webui.inlet(body)
    open_webui.valves = open_webui.Valves(url="http://127.0.0.1:9", unreachable="allow")
    assert await open_webui.inlet(body) is body


async def test_a_filter_that_asks_the_wrong_place_never_lets_through(open_webui: Any, served: str) -> None:
    open_webui.valves = open_webui.Valves(url=f"{served}/v1", unreachable="allow")
    with pytest.raises(Exception, match="not sent: the path is not served"):
        await open_webui.inlet(open_webui_body("a risky thing"))
