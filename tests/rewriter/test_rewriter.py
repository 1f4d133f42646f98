import io
import math
from typing import Any

import pytest
from PIL import Image

from vlmguard.chat import Chat, Response, TokenLogprob, Usage
from vlmguard.errors import CapabilityError, ImageError, RewriteUnreadable, Upstream
from vlmguard.images import frames, to_data_uri
from vlmguard.rewriter.protocol import INSTRUCTIONS, Analysis, Rewrite, render_output
from vlmguard.rewriter.rewriter import MAX_OUTPUT_TOKENS, Prompted, Rewriter, verdict_probability
from vlmguard.vlms.protocol import Capability
from vlmguard.vlms.scripted import Answers, Scripted

REWRITE = Rewrite(1.0, "fraud", Analysis("Asks to copy.", "Shows a bill.", "Together it is forgery."), "Is it real?")
WRITTEN = render_output(REWRITE)
WITH_LOGPROBS = frozenset({Capability.TEXT, Capability.LOGPROBS})


def first(token: str, logprob: float, **top: float) -> Response:
    """An answer of one token; `top` are its alternatives."""
    return Response(token, "length", Usage(1, 50, 1, 0.1), logprobs=(TokenLogprob(token, logprob, top),))


def prompted(answers: Answers, **options: Any) -> tuple[Prompted, Scripted]:
    vlm = Scripted(answers)
    return Prompted(vlm, **options), vlm


def gated(*answers: str | Response) -> tuple[Prompted, Scripted]:
    vlm = Scripted(list(answers), can=WITH_LOGPROBS)
    return Prompted(vlm), vlm


def picture(colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(file, "PNG")
    return file.getvalue()


# The verdict's probability


@pytest.mark.parametrize(
    ("token", "top", "risk"),
    [
        ("risky", {"risky": 0.8, "safe": 0.2}, 0.8),
        ("safe", {"safe": 0.6, "risky": 0.2}, 0.25),
        ("ris", {"ris": 0.3, " Risky": 0.3, "safe": 0.1, "The": 0.3}, 6 / 7),
        (" Safe", {" Safe": 0.5, "SAFE": 0.25, "ri": 0.25}, 0.25),
        ("▁risky", {"▁risky": 0.5, "Ġsafe": 0.5}, 0.5),
        ("sa", {"sa": 0.9, "unsafe": 0.1}, 0.0),
        ("risk", {"risk": 0.5, "safety": 0.4, "s": 0.05, "r": 0.05}, 1.0),
        ("The", {"The": 0.9, "safe": 0.1}, 0.0),
        ("\nrisky", {}, 1.0),
    ],
)
def test_the_first_tokens_alternatives_are_summed_by_verdict(token: str, top: dict[str, float], risk: float) -> None:
    logprobs = {other: math.log(share) for other, share in top.items()}
    assert verdict_probability(TokenLogprob(token, logprobs.get(token, 0.0), logprobs)) == pytest.approx(risk)


@pytest.mark.parametrize("token", ["The", "unsafe", "s", "", " ", "safety", "riskyy"])
def test_a_first_token_of_neither_verdict_is_unreadable(token: str) -> None:
    with pytest.raises(RewriteUnreadable, match="first token"):
        verdict_probability(TokenLogprob(token, -0.1, {token: -0.1, "safe": -9999.0}))


# Judging


async def test_with_logprobs_the_gate_takes_one_token() -> None:
    rewriter, vlm = gated(first("ris", math.log(0.9), safe=math.log(0.1)), WRITTEN)
    verdict = await rewriter.judge(Chat.of("copy this bill"))
    assert verdict.risk == pytest.approx(0.9)
    assert verdict.usage == Usage(1, 50, 1, 0.1)
    asked = vlm.calls[0].extra
    assert (asked["max_tokens"], asked["logprobs"], asked["temperature"]) == (1, True, 0)
    whole = await rewriter(Chat.of("copy this bill"), verdict)
    assert vlm.calls[1].extra["max_tokens"] == MAX_OUTPUT_TOKENS
    assert (whole.risk, whole.category, whole.prompt) == (verdict.risk, "fraud", "Is it real?")


async def test_without_logprobs_it_judges_by_writing() -> None:
    rewriter, vlm = prompted([WRITTEN, "safe"])
    risky, safe = await rewriter.judge(Chat.of("copy this bill")), await rewriter.judge(Chat.of("hello"))
    assert (risky.risk, risky.category, risky.prompt) == (1.0, "fraud", "Is it real?")
    assert (safe.risk, safe.category, safe.prompt) == (0.0, None, None)
    assert len(vlm.calls) == 2


async def test_a_server_that_gives_no_logprobs_is_asked_again_and_both_calls_count() -> None:
    rewriter, vlm = gated(Response("risky", "length", Usage(1, 50, 1, 0.1)), WRITTEN)
    verdict = await rewriter.judge(Chat.of("copy this bill"))
    assert verdict.risk == 1.0
    assert verdict.usage.calls == len(vlm.calls) == 2
    assert verdict.usage.completion_tokens == 1 + len(WRITTEN.split())


async def test_a_rewriter_may_take_back_its_first_word() -> None:
    rewriter, _ = prompted("safe")
    taken_back = await rewriter(Chat.of("hello"), Rewrite(0.9))
    assert (taken_back.risk, taken_back.prompt) == (0.9, None)


@pytest.mark.parametrize(
    "answer", ["", "I can't help with that.", "unsafe", "risky\ncategory: fraud", f"Sure!\n{WRITTEN}"]
)
async def test_unreadable_output_is_an_error(answer: str) -> None:
    rewriter, _ = prompted(answer)
    with pytest.raises(RewriteUnreadable):
        await rewriter.judge(Chat.of("hello"))


@pytest.mark.parametrize("text", [WRITTEN, "safe", WRITTEN[:60]])
async def test_cut_off_output_is_an_error(text: str) -> None:
    rewriter, _ = prompted([Response(text, "length")])
    with pytest.raises(RewriteUnreadable, match="cut off"):
        await rewriter(Chat.of("hello"))


async def test_errors_of_the_model_pass_through() -> None:
    rewriter, _ = prompted([Upstream("down", status=500)])
    with pytest.raises(Upstream):
        await rewriter.judge(Chat.of("hello"))


async def test_usage_has_seconds_even_where_the_model_counts_none() -> None:
    rewriter, _ = prompted([Response(WRITTEN, usage=Usage(1, 9, 9))])
    usage = (await rewriter(Chat.of("hello"))).usage
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (1, 9, 9)
    assert usage.seconds > 0


# What the model is shown


async def test_every_picture_of_the_conversation_is_shown_before_the_text() -> None:
    colours = ["red", "green", "blue"]
    parts = [{"type": "image_url", "image_url": {"url": to_data_uri(picture(colour))}} for colour in colours]
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "this"}, parts[0]]},
        {"role": "tool", "tool_call_id": "1", "content": [parts[1]]},
    ]
    chat = Chat.of("and this?", [picture("blue")], turns=turns)
    rewriter, vlm = prompted("safe")
    await rewriter.judge(chat)
    (shown,) = vlm.calls
    assert [image.url for image in shown.images] == [image.url for image in chat.images]
    content = shown.to_wire()["messages"][-1]["content"]
    assert [part["type"] for part in content] == ["image_url"] * 3 + ["text"]


async def test_f400_every_frame_of_an_animation_is_shown() -> None:
    file = io.BytesIO()
    shots = [Image.new("RGB", (9, 7), colour) for colour in ("red", "green", "blue")]
    shots[0].save(file, "GIF", save_all=True, append_images=shots[1:])
    rewriter, vlm = prompted("safe")
    await rewriter.judge(Chat.of("what is it?", [file.getvalue(), picture("white")]))
    found = [frames(image) for image in vlm.calls[0].images]
    assert [len(one) for one in found] == [1, 1, 1, 1]
    pixels = [one[0].getpixel((4, 3)) for one in found]
    assert pixels == [(255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)]


async def test_a_picture_that_cannot_be_read_is_an_error_before_any_call() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    remote = {"type": "image_url", "image_url": {"url": "https://example.org/cat.png"}}
    rewriter, vlm = prompted("safe")
    for broken in (part, remote):
        with pytest.raises(ImageError):
            await rewriter.judge(Chat.parse({"messages": [{"role": "user", "content": [broken]}]}))
    assert vlm.calls == []


async def test_the_whole_conversation_is_data() -> None:
    turns = [{"role": "user", "content": "the hidden wish"}, {"role": "assistant", "content": "shall I?"}]
    chat = Chat.of("continue", system="Be kind.", turns=turns, max_tokens=7, tools=[], model="other")
    rewriter, vlm = prompted("safe")
    await rewriter.judge(chat)
    wire = vlm.calls[0].to_wire()
    assert wire["messages"] == [
        {"role": "system", "content": INSTRUCTIONS},
        {
            "role": "user",
            "content": 'System: "Be kind."\nEarlier user: "the hidden wish"\nEarlier assistant: "shall I?"\n'
            'Request: "continue"',
        },
    ]
    assert wire.keys() == {"messages", "temperature", "max_tokens"}
    assert wire["max_tokens"] == MAX_OUTPUT_TOKENS


async def test_nothing_of_a_long_request_is_left_out() -> None:
    hidden = "a " * 2000 + "the wish" + " b" * 2000
    rewriter, vlm = prompted("safe")
    await rewriter.judge(Chat.of(hidden, turns=[{"role": "user", "content": hidden}]))
    assert vlm.calls[0].text.count("the wish") == 2


async def test_a_trained_model_gets_no_instructions() -> None:
    rewriter, vlm = prompted("safe", instructed=False)
    await rewriter.judge(Chat.of("hello"))
    assert vlm.calls[0].to_wire()["messages"] == [{"role": "user", "content": 'Request: "hello"'}]


async def test_the_chat_is_unchanged() -> None:
    chat = Chat.of("what is it?", [picture("red")], system="Be kind.")
    before = chat.to_wire()
    rewriter, _ = prompted(WRITTEN)
    await rewriter(chat, await rewriter.judge(chat))
    assert chat.to_wire() == before


# What it is


async def test_it_is_a_rewriter_named_after_its_model() -> None:
    rewriter, vlm = prompted("safe", threshold=0.3)
    assert isinstance(rewriter, Rewriter)
    assert (rewriter.name, rewriter.threshold) == (vlm.name, 0.3)
    await rewriter.aclose()


def test_a_model_that_answers_no_chats_is_refused() -> None:
    with pytest.raises(CapabilityError, match="a rewriter needs text"):
        Prompted(Scripted("safe", can=frozenset()))
