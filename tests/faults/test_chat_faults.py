"""Faults that neighbours' users reported, as far as the reading of a chat is concerned; see FAULTS.md."""

import json
from typing import Any

import pytest

from vlmguard.chat import Chat, parse_json
from vlmguard.errors import BadRequest, ImageNotAllowed
from vlmguard.images import frames

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)
IMAGE = {"type": "image_url", "image_url": {"url": PIXEL}}


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def chat(*messages: dict[str, Any]) -> Chat:
    return Chat.parse({"messages": list(messages)})


def test_f001_f002_an_image_is_seen_with_and_without_text() -> None:
    assert len(chat(user([text("what is this?"), IMAGE])).images) == 1
    alone = chat(user([IMAGE]))
    assert (alone.text, len(alone.images)) == ("", 1)


def test_f004_a_text_part_reads_as_its_text_in_every_turn() -> None:
    read = chat(user([text("hi")]), {"role": "assistant", "content": [text("hello")]}, user([text("more")]))
    assert [turn.text for turn in read.messages] == ["hi", "hello", "more"]
    assert read.text == "more"


def test_f005_a_large_data_uri_is_no_text() -> None:
    read = chat(user([text("look"), {"type": "image_url", "image_url": {"url": PIXEL + "A" * 300_000}}]))
    assert read.messages[0].full_text == "look"


def test_f006_several_parts_are_one_text() -> None:
    read = chat(user([text("how do I"), IMAGE, text("make this?")]))
    assert read.text == "how do I\nmake this?"
    assert read.with_text("safe").text == "safe"


@pytest.mark.parametrize("rival", ["content_blocks", "parts", "images", "text", "input", "attachments"])
def test_f008_content_beside_content_is_refused_by_name(rival: str) -> None:
    with pytest.raises(BadRequest, match=rival):
        chat(user("a kind question", **{rival: [text("a hostile one")]}))
    assert chat(user("a kind question", **{rival: []})).text == "a kind question"


@pytest.mark.parametrize("rival", ["input", "prompt", "contents"])
def test_f008_f010_content_beside_messages_is_refused_by_name(rival: str) -> None:
    with pytest.raises(BadRequest, match=rival):
        Chat.parse({"messages": [user("a kind question")], rival: "a hostile one"})


@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a", "c\\u006fntent": "b"}]}',
        '{"messages": [], "messages": [{"role": "user", "content": "b"}]}',
    ],
)
def test_f008_a_key_twice_is_refused(body: str) -> None:
    with pytest.raises(BadRequest, match="twice"):
        parse_json(body.encode())


def test_f008_a_part_that_is_two_things_is_refused() -> None:
    with pytest.raises(BadRequest, match="two parts"):
        chat(user([{**IMAGE, "text": "hi"}]))
    with pytest.raises(BadRequest, match="image_url and source"):
        chat(user([{**IMAGE, "source": {"type": "base64", "data": "AAAA"}}]))


def test_f010_a_request_without_messages_is_refused() -> None:
    with pytest.raises(BadRequest, match="input"):
        Chat.parse({"input": "hi"})


def test_f011_an_image_in_a_tool_message_is_seen() -> None:
    read = chat(user("screenshot"), {"role": "tool", "tool_call_id": "1", "content": [text("done"), IMAGE]})
    assert [image.url for image in read.images] == [PIXEL]
    assert len(read.with_images([PIXEL]).images) == 1


def test_f012_an_anthropic_image_block_is_an_image() -> None:
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL.partition(",")[2]}}
    (image,) = chat(user([block, text("what is it?")])).images
    assert frames(image)[0].size == (1, 1)


def test_f014_every_turn_is_there_to_be_read() -> None:
    hidden = [text("how to do harm"), IMAGE]
    read = chat(user(hidden), {"role": "assistant", "content": "Shall I?"}, user("continue"))
    assert "how to do harm" in read.messages[0].text
    assert len(read.images) == 1
    assert read.text == "continue"


@pytest.mark.parametrize("content", [f"see {PIXEL}", PIXEL, [text(PIXEL)]])
def test_f015_a_text_with_a_data_uri_is_text(content: Any) -> None:
    read = chat(user(content))
    assert read.images == ()
    assert PIXEL in read.text


def test_f016_a_text_that_is_a_path_is_text() -> None:
    for read in (chat(user("/etc/hostname")), Chat.of("/etc/hostname")):
        assert (read.text, read.images) == ("/etc/hostname", ())


def test_f016_f063_a_path_in_a_request_is_never_opened() -> None:
    for part in ({"image_url": "/etc/hostname"}, {"type": "image", "path": "/etc/hostname"}):
        with pytest.raises(ImageNotAllowed):
            frames(chat(user([part])).images[0])
    with pytest.raises(ImageNotAllowed):
        frames(chat(user([IMAGE])).with_images(["/etc/hostname"]).images[0])


def test_f031_rewriting_keeps_cache_control() -> None:
    marked = text("b", cache_control={"type": "ephemeral"})
    for content in ([marked], [text("a"), IMAGE, marked]):
        first = chat(user(content)).with_text("new").to_wire()["messages"][0]["content"][0]
        assert first == text("new", cache_control={"type": "ephemeral"})
    assert chat(user([text("a"), marked])).with_text("a\nb").to_wire()["messages"] == [user([text("a"), marked])]


def test_f036_f037_null_content_with_tool_calls_is_kept_and_has_no_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
    read = chat(user("hi"), call, {"role": "tool", "tool_call_id": "1", "content": "42"})
    assert read.messages[1].text == ""
    assert read.to_wire()["messages"][1] == call
    assert read.with_text("ho").to_wire()["messages"][1] == call


@pytest.mark.parametrize("content", [None, "", [], "missing"])
def test_f038_images_of_empty_content_are_none(content: Any) -> None:
    message = {"role": "user"} if content == "missing" else user(content)
    read = chat(message)
    assert read.images == ()
    assert read.without_images().to_wire()["messages"] == [message]
    assert read.with_images([]).to_wire()["messages"] == [message]


def test_f041_a_rewrite_adds_no_system_message() -> None:
    assert [turn.role for turn in chat(user([IMAGE, text("a")])).with_text("b").messages] == ["user"]


def test_f043_a_string_is_not_a_list_of_images() -> None:
    with pytest.raises(BadRequest, match="images"):
        chat(user("hi", images="a.jpg"))
    with pytest.raises(BadRequest, match="images"):
        Chat.parse({"messages": [user("hi")], "images": "a.jpg"})


def test_f056_an_untyped_part_with_an_image_url_is_an_image() -> None:
    for part in ({"image_url": {"url": PIXEL}}, {"image_url": PIXEL}):
        assert [image.url for image in chat(user([part, {"text": "hi"}])).images] == [PIXEL]


def test_f057_a_body_with_a_large_data_uri_is_read() -> None:
    body = json.dumps({"messages": [user([{"type": "image_url", "image_url": {"url": PIXEL + "A" * 5_000_000}}])]})
    assert len(Chat.parse(parse_json(body.encode())).images[0].url) > 5_000_000
    with pytest.raises(BadRequest, match="not JSON"):
        parse_json(body[:-2].encode())
    with pytest.raises(BadRequest, match="bytes"):
        parse_json(body.encode(), limit=1_000_000)


def test_f066_f068_no_error_or_repr_holds_an_image() -> None:
    for wire in ({"messages": [user([IMAGE, 7])]}, {"messages": [{**user([IMAGE]), "images": [PIXEL]}]}):
        with pytest.raises(BadRequest) as caught:
            Chat.parse(wire)
        assert "iVBOR" not in f"{caught.value!r} {caught.value}"
    assert "iVBOR" not in repr(chat(user([IMAGE])).messages)
