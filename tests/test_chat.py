import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmguard.chat import Chat, Image, Message, Response, Step, Text, Usage, parse_json
from vlmguard.errors import BadRequest, ImageUnreadable

PNG = b"\x89PNG\r\n\x1a\n"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def chat(*messages: dict[str, Any], **extra: Any) -> Chat:
    return Chat.parse({"messages": list(messages), **extra})


# Strategies: requests as they come, with unknown fields and parts anywhere.

names = st.sampled_from(["name", "cache_control", "tool_calls", "x-unknown", "", "größe"])
leaves = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    leaves | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
fields = st.dictionaries(names, json_values, max_size=2)
urls = st.sampled_from(["data:image/png;base64,AAAA", "https://example.org/a.png", "DATA:,x"])
parts = (
    st.text()
    | st.builds(lambda text, more: {"type": "text", "text": text, **more}, st.text(), fields)
    | st.builds(lambda text: {"text": text}, st.text())
    | st.builds(lambda url, more: {**more, "type": "image_url", "image_url": {"url": url, **more}}, urls, fields)
    | st.builds(lambda url: {"image_url": url}, urls)
    | st.builds(lambda more: {"type": "input_audio", **more}, fields)
)
contents = st.none() | st.text() | st.lists(parts, max_size=4)
roles = st.sampled_from(["system", "developer", "user", "assistant", "tool"])
messages = st.builds(
    lambda role, content, more: {**more, "role": role, **content},
    roles,
    contents.map(lambda it: {"content": it}) | st.just({}),
    fields,
)
requests = st.builds(
    lambda before, turns, after: {**before, "messages": turns, **after},
    st.dictionaries(st.sampled_from(["model", "temperature"]), json_values),
    st.lists(messages, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(["tools", "seed", "x"]), json_values),
)


@given(requests)
def test_an_untouched_chat_gives_back_the_same_json(wire: dict[str, Any]) -> None:
    before = json.dumps(wire)
    read = Chat.parse(wire)
    assert json.dumps(read.to_wire()) == before == json.dumps(wire)
    assert json.dumps(Chat.parse(parse_json(before.encode())).to_wire()) == before
    assert pickle.loads(pickle.dumps(read)) == read


@given(requests, st.text())
def test_with_text_changes_the_text_of_the_last_user_turn_alone(wire: dict[str, Any], text: str) -> None:
    old = Chat.parse(wire)
    new = old.with_text(text)
    assert new.text == text
    assert new.images == old.images
    assert new.extra == old.extra
    at = old.last_user
    if at is None:
        assert new.messages == (*old.messages, Message.of("user", text))
    else:
        assert (new.messages[:at], new.messages[at + 1 :]) == (old.messages[:at], old.messages[at + 1 :])
        others = [part for part in old.messages[at].parts if not isinstance(part, Text)]
        assert [part for part in new.messages[at].parts if not isinstance(part, Text)] == others
    assert Chat.parse(new.to_wire()) == new
    assert old.with_text(old.text).to_wire() == (wire if at is not None else old.with_message("user", "").to_wire())


@given(requests)
def test_images_can_be_taken_out_and_replaced(wire: dict[str, Any]) -> None:
    old = Chat.parse(wire)
    assert old.without_images().images == ()
    assert old.with_images(old.images) == old
    new = old.with_images(["data:,new"] * len(old.images))
    assert {image.url for image in new.images} <= {"data:,new"}
    assert len(new.images) == len(old.images)
    for changed in (old.without_images(), new, old.with_images([PNG] * (len(old.images) + 1))):
        assert Chat.parse(changed.to_wire()) == changed


def test_nobody_outside_can_change_a_chat() -> None:
    wire: dict[str, Any] = {"messages": [user([{"text": "hi"}, copy.deepcopy(PICTURE)])], "stop": ["a"]}
    read = Chat.parse(wire)
    before = copy.deepcopy(wire)
    wire["messages"][0]["content"][0]["text"] = "changed"
    wire["stop"].append("b")
    assert read.to_wire() == before
    out = read.to_wire()
    out["messages"][0]["content"][1]["image_url"]["url"] = "changed"
    out["stop"].clear()
    assert read.to_wire() == before
    read.with_text("new").to_wire()["messages"][0]["content"][1]["image_url"]["url"] = "changed"
    assert read.to_wire() == before


def test_text_and_images_of_every_spelling() -> None:
    source = {"type": "base64", "media_type": "image/gif", "data": "AAAA"}
    read = chat(
        user(
            [
                {"type": "text", "text": "one"},
                {"type": "input_text", "text": "two"},
                {"text": "three"},
                "four",
                {"type": "image_url", "image_url": {"url": "data:,1"}},
                {"type": "input_image", "image_url": "data:,2", "file_id": None},
                {"image_url": {"url": "data:,3"}},
                {"type": "image", "source": source},
                {"type": "image", "source": {"type": "url", "url": "https://example.org/4"}},
                {"type": "image", "data": "BBBB", "mimeType": "image/png"},
                {"type": "image", "image": "data:,5"},
                {"type": "image", "path": "/etc/hostname"},
                {"type": "input_image", "file_id": "file-7"},
                {"type": "text", "text": "five", "image_url": None},
            ]
        )
    )
    assert read.text == "one\ntwo\nthree\nfour\nfive"
    assert [image.url for image in read.images] == [
        "data:,1",
        "data:,2",
        "data:,3",
        "data:image/gif;base64,AAAA",
        "https://example.org/4",
        "data:image/png;base64,BBBB",
        "data:,5",
        "/etc/hostname",
        "file-id:file-7",
    ]


def test_a_replaced_image_keeps_the_rest_of_its_part() -> None:
    marked = {
        "type": "image",
        "source": {"type": "base64", "data": "AAAA"},
        "cache_control": {"type": "ephemeral"},
    }
    new = chat(user([PICTURE, marked, {"type": "input_image", "image_url": "data:,a"}])).with_images(
        ["data:,1", Image.of("data:,2"), "data:,3"]
    )
    assert new.to_wire()["messages"][0]["content"] == [
        {"type": "image_url", "image_url": {"url": "data:,1", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "data:,2"}},
        {"type": "input_image", "image_url": "data:,3"},
    ]
    kept = chat(user([marked])).with_images(["data:,4"]).to_wire()["messages"][0]["content"][0]
    assert kept == {
        "type": "image_url",
        "cache_control": {"type": "ephemeral"},
        "image_url": {"url": "data:,4"},
    }


def test_images_nested_in_a_tool_result_are_seen_and_replaced() -> None:
    result = {"type": "tool_result", "content": [PICTURE, {"type": "text", "text": "a chart"}]}
    read = chat(user([result, {"type": "text", "text": "explain"}]))
    assert len(read.images) == 1
    assert read.text == "explain"
    assert read.messages[0].full_text == "a chart\nexplain"
    assert read.without_images().to_wire()["messages"][0]["content"][0]["content"] == [
        {"type": "text", "text": "a chart"}
    ]
    assert read.with_images(["data:,new"]).images[0].url == "data:,new"


def test_more_images_go_before_the_text_of_the_last_user_turn() -> None:
    added = {"type": "image_url", "image_url": {"url": "data:,1"}}
    text = {"type": "text", "text": "hi"}
    assert chat(user("hi")).with_images(["data:,1"]).to_wire()["messages"] == [user([added, text])]
    assert chat(user(None)).with_images(["data:,1"]).to_wire()["messages"] == [user([added])]
    system = {"role": "system", "content": "s"}
    assert chat(system).with_images(["data:,1"]).to_wire()["messages"] == [system, user([added])]
    both = chat(user([PICTURE, text])).with_images([None, "data:,1"])
    assert both.to_wire()["messages"] == [user([added, text])]


def test_with_text_on_each_shape_of_content() -> None:
    def sent(content: Any) -> Any:
        return chat(user(content)).with_text("new").to_wire()["messages"][0]["content"]

    assert sent("old") == "new"
    assert sent(None) == "new"
    assert chat({"role": "user"}).with_text("new").to_wire()["messages"] == [user("new")]
    assert sent([]) == [{"type": "text", "text": "new"}]
    assert sent([PICTURE]) == [PICTURE, {"type": "text", "text": "new"}]
    assert sent(["a", PICTURE, "b"]) == ["new", PICTURE]
    assert sent([{"text": "a"}, PICTURE]) == [{"text": "new"}, PICTURE]
    assert sent([{"type": "text", "text": "a"}, PICTURE, {"type": "text", "text": "b", "cache_control": {}}]) == [
        {"type": "text", "text": "new", "cache_control": {}},
        PICTURE,
    ]


def test_with_system_adds_to_a_system_message_or_makes_one() -> None:
    assert chat(user("hi")).with_system("be kind").messages[0] == Message.of("system", "be kind")
    assert chat({"role": "developer", "content": "a"}, user("hi")).with_system("b").messages[0].text == "a\n\nb"
    listed = chat({"role": "system", "content": [{"type": "text", "text": "a"}]}).with_system("b")
    assert [part["text"] for part in listed.to_wire()["messages"][0]["content"]] == ["a", "b"]
    assert chat({"role": "system", "content": None}).with_system("b").messages[0].text == "b"


def test_extra_fields_keep_their_place() -> None:
    read = Chat.parse({"model": "a", "messages": [user("hi")], "seed": 1})
    assert list(read.with_extra(seed=2, user="u").to_wire().items()) == [
        ("model", "a"),
        ("messages", [user("hi")]),
        ("seed", 2),
        ("user", "u"),
    ]
    with pytest.raises(BadRequest, match="with_text"):
        read.with_extra(messages=[])


def test_without_images_never_leaves_an_empty_list() -> None:
    assert chat(user([PICTURE])).without_images().to_wire()["messages"] == [user("")]


def test_others_are_the_parts_a_guard_cannot_read() -> None:
    audio = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    assert [part.raw for part in chat(user([audio, "hi"])).others] == [audio]


def test_of_builds_a_chat_from_bytes_paths_and_urls(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(PNG)  # the bytes decide, not the name
    built = Chat.of("hi", [PNG, path, str(path), "data:,x"], system="s", turns=[user("before")], model="m", seed=1)
    assert [image.url for image in built.images] == ["data:image/png;base64,iVBORw0KGgo="] * 3 + ["data:,x"]
    assert [turn.role for turn in built.messages] == ["system", "user", "user"]
    assert built.text == "hi"
    assert built.extra == {"model": "m", "seed": 1}
    assert Chat.of("hi").to_wire() == {"messages": [user("hi")]}
    assert Chat.of(None, [PNG]).text == ""


def test_of_says_which_file_is_missing(tmp_path: Path) -> None:
    for wrong in (tmp_path / "none.png", str(tmp_path), "a\0b"):
        with pytest.raises(ImageUnreadable, match="cannot be read"):
            Chat.of("hi", [wrong])
    with pytest.raises(BadRequest, match="messages"):
        Chat.of(None)


def test_repr_shows_nothing_that_a_user_wrote() -> None:
    read = chat(user([PICTURE, {"type": "text", "text": "my secret"}], name="secret"), user="secret")
    for shown in (repr(read), repr(read.messages), str(read.images)):
        assert "secret" not in shown
        assert "AAAA" not in shown


def test_fingerprint_is_that_of_the_whole_request() -> None:
    one = Chat.parse({"model": "m", "messages": [user("hi")]})
    assert one.fingerprint == Chat.parse({"messages": [user("hi")], "model": "m"}).fingerprint
    assert len({one.fingerprint, one.with_text("ho").fingerprint, one.with_extra(seed=1).fingerprint}) == 3


@pytest.mark.parametrize(
    ("wire", "param"),
    [
        ([], "the request"),
        ("text", "the request"),
        ({}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": {"role": "user"}}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "hi"}]}, "messages[0].role"),
        ({"messages": [user(7)]}, "messages[0].content"),
        ({"messages": [user({"type": "text", "text": "hi"})]}, "messages[0].content"),
        ({"messages": [user([7])]}, "messages[0].content[0]"),
        ({"messages": [user([None])]}, "messages[0].content[0]"),
        ({"messages": [user([{"type": 7}])]}, "messages[0].content[0].type"),
        ({"messages": [user([{"type": "text", "text": ["hi"]}])]}, "messages[0].content[0].text"),
        ({"messages": [user([{"type": "text"}])]}, "messages[0].content[0].text"),
        ({"messages": [user([{"type": "image_url"}])]}, "messages[0].content[0]"),
        (
            {"messages": [user([{"type": "image_url", "image_url": {"url": 7}}])]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [user([{"image_url": "data:,a", "source": "data:,b"}])]}, "messages[0].content[0]"),
        (
            {"messages": [user([{"type": "text", "text": "hi", "image_url": "data:,"}])]},
            "messages[0].content[0]",
        ),
        ({"messages": [user("hi")], "x": {1: 2}}, "x"),
        ({"messages": [user("hi")], "x": [b"bytes"]}, "x[0]"),
        ({"messages": [user("hi")], "x": float("nan")}, "x"),
        ({"messages": [user("\ud800")]}, "messages[0].content"),
    ],
)
def test_malformed_requests_are_refused_and_the_place_is_named(wire: Any, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        Chat.parse(wire)
    assert caught.value.param == param


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(BadRequest, match="nested"):
        chat(user("hi"), x=loop)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": 99999999999999999999}',
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1, "a": 1}',
        b'{"b": [{"a": 1, "\\u0061": 2}]}',
        b'{"a": "\\ud800"}',
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b"[" * 65 + b"]" * 65,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_parse_json_refuses_what_readers_could_read_differently(body: bytes) -> None:
    with pytest.raises(BadRequest):
        parse_json(body)


def test_parse_json_takes_the_rest() -> None:
    assert parse_json('{"a": ["\\ud83d\\ude00", "ü", 1.5, null, true]}'.encode()) == {"a": ["😀", "ü", 1.5, None, True]}
    assert parse_json(b"[" * 64 + b"]" * 64)
    with pytest.raises(BadRequest, match="11 bytes"):
        parse_json(b'"123456789"', limit=10)


def test_a_response_grows_by_steps_and_usage() -> None:
    step = Step("ecso", "rewrote", risk=0.9, threshold=0.5)
    answer = Response("no", usage=Usage(1, 10, 2, 0.5)).with_step(step).plus(Usage(2, 20, 4, 0.25))
    assert answer.trace == (step,)
    assert answer.usage == Usage(3, 30, 6, 0.75)
    assert sum([Usage(1), Usage(2)], Usage()) == Usage(3)
