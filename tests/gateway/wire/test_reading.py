"""Whatever comes is read or refused with its place; nothing falls over it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gateway.wire.wires import NEW, OLD, REWRITTEN, same
from vlmguard.errors import BadRequest
from vlmguard.gateway.wire import WIRES, Conversation, Wire
from vlmguard.gateway.wire.reading import BESIDE_CONTENT, IN_A_TEXT

TYPES = (
    *("text", "input_text", "output_text", "image", "image_url", "input_image", "tool_result", "tool_use", "thinking"),
    *(
        "refusal",
        "function_call",
        "function_call_output",
        "computer_call_output",
        "reasoning",
        "message",
        "input_audio",
    ),
)
KEYS = ("type", "text", "image_url", "source", "content", "role", "output", "input", "thinking", "url", "data", "audio")
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-1, 2)
    | st.text(max_size=3)
    | st.sampled_from([*TYPES, OLD, "user", "assistant"])
)
odd = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
turns = st.lists(
    st.dictionaries(st.sampled_from(KEYS), odd, max_size=4).map(lambda it: {"role": "user", **it}) | odd, max_size=3
)
bodies = st.builds(
    lambda turns, given, rest: {"messages": turns, "input": given, **rest},
    st.none() | turns,
    st.none() | turns | st.text(max_size=3),
    st.dictionaries(
        st.sampled_from(["system", "instructions", "model", "stream", "n", "stop_sequences", "x"]), odd, max_size=3
    ),
)


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.path)
@settings(max_examples=400)
@given(body=bodies)
def test_whatever_comes_is_read_or_refused(wire: Wire, body: dict[str, Any]) -> None:
    body = {key: value for key, value in body.items() if value is not None}
    before = copy.deepcopy(body)
    asked = _read(wire, body)
    assert same(body, before)
    if isinstance(asked, BadRequest):
        assert asked.param is not None
        return
    assert same(wire.write(asked, asked.chat), before)
    wire.write(asked, asked.chat.with_text(REWRITTEN).with_images([NEW] * len(asked.chat.images)))
    assert same(body, before)


def _read(wire: Wire, body: dict[str, Any]) -> Conversation | BadRequest:
    try:
        return wire.read(body)
    except BadRequest as refused:
        return refused


@pytest.mark.parametrize("wire", WIRES, ids=lambda wire: wire.path)
@pytest.mark.parametrize("key", sorted({*BESIDE_CONTENT, *IN_A_TEXT} - {"text", "content", "type"}))
def test_f008_no_key_carries_content_beside_a_text(wire: Wire, key: str) -> None:
    """In a part, and in the message beside its content; with nothing in it the key is harmless."""
    name = "input" if wire.path == "/v1/responses" else "messages"
    in_part: dict[str, Any] = {"role": "user", "content": [{"type": "text", "text": "kind", key: "hostile"}]}
    beside: dict[str, Any] = {"role": "user", "content": "kind", key: "hostile"}
    for message, carries in ((in_part, key in IN_A_TEXT), (beside, key in BESIDE_CONTENT)):
        if carries:
            with pytest.raises(BadRequest):
                wire.read({name: [message]})
    for message in ({**in_part, "content": [{"type": "text", "text": "kind", key: None}]}, {**beside, key: []}):
        assert wire.read({name: [message]}).chat.text == "kind"
