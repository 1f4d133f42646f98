import random

import pytest

from tests.gateway.running import DONE, chunk, event
from vlmguard.gateway.events import Passing
from vlmguard.gateway.wire.responses import Responses

STREAM = [
    chunk("Grüße, 世界 "),
    b": a comment\n\n",
    b'event: x\r\ndata: {"a": 1}\r\n\r\n',
    'data: "😀"\n\n'.encode(),
    DONE,
]


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 50, 10_000])
def test_the_same_bytes_come_out_cut_between_events(largest: int) -> None:
    whole, dice, passing = b"".join(STREAM), random.Random(largest), Passing([b"[DONE]"])
    came, at = [], 0
    while at < len(whole):
        size = dice.randint(1, largest)
        came.append(passing.push(whole[at : at + size]))
        at += size
    came = [piece for piece in came if piece]
    assert b"".join(came) == whole
    assert all(piece.endswith((b"\n\n", b"\n\r\n")) or piece == b": a comment\n" for piece in came)
    assert passing.ended
    assert passing.rest() == b""


@pytest.mark.parametrize("piece", STREAM)
def test_a_whole_event_goes_on_at_once(piece: bytes) -> None:
    assert Passing([b"[DONE]"]).push(piece) == piece


def test_half_an_event_waits_for_its_other_half() -> None:
    passing = Passing([b"[DONE]"])
    assert passing.push(chunk("a") + b'data: {"b') == chunk("a")
    assert passing.held == 9
    assert passing.push(b'": 1}\n') == b""
    assert passing.push(b"\n") == b'data: {"b": 1}\n\n'
    assert passing.held == 0


def test_a_line_that_keeps_a_connection_alive_does_not_wait() -> None:
    passing = Passing([b"[DONE]"])
    assert passing.push(b": ping\n") == b": ping\n"
    assert passing.push(b": pi") == b""
    assert passing.push(b"ng\n") == b": ping\n"
    assert passing.push(b': ping\ndata: {"a') == b""


@pytest.mark.parametrize(
    ("events", "final"),
    [
        (b"data: [DONE]\n\n", b"[DONE]"),
        (b"data:[DONE]\r\n\r\n", b"[DONE]"),
        (b"data: {}\n\ndata: [DONE]\n\n", b"[DONE]"),
        (b"event: message_stop\ndata: {}\n\n", b"message_stop"),
        (b"event: response.completed\ndata: {}\n\n", b"response.completed"),
    ],
)
def test_the_end_is_known(events: bytes, final: bytes) -> None:
    passing = Passing([final])
    passing.push(events)
    assert passing.ended


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_an_answer_of_responses_ends_in_three_ways(status: str) -> None:
    passing = Passing(Responses.final)
    passing.push(b"event: response.output_text.delta\ndata: {}\n\n")
    assert not passing.ended
    passing.push(f"event: response.{status}\ndata: {{}}\n\n".encode())
    assert passing.ended


@pytest.mark.parametrize(
    ("text", "final"), [("[DONE]", b"[DONE]"), ("data: [DONE]", b"[DONE]"), ("event: message_stop", b"message_stop")]
)
def test_a_model_that_writes_of_the_end_is_not_at_it(text: str, final: bytes) -> None:
    passing = Passing([final])
    passing.push(chunk(text))
    passing.push(event({"text": f"\n{text}\n"}))
    assert not passing.ended


def test_what_is_left_is_given_at_the_end() -> None:
    passing = Passing([b"[DONE]"])
    passing.push(b"data: [DONE]")
    assert passing.held
    assert passing.rest() == b"data: [DONE]"
    assert passing.ended
    assert passing.rest() == b""
