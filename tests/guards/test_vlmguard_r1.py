import asyncio
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from vlmguard.chat import Chat, Response, Step, Usage
from vlmguard.errors import (
    AuthenticationFailed,
    CapabilityError,
    ConfigError,
    ContextTooLong,
    ImageUnreadable,
    MissingExtra,
    RateLimited,
    RewriteUnreadable,
    Timeout,
    Upstream,
    VLMGuardError,
)
from vlmguard.guards.policy import REFUSAL, Failure, Mode, Policy, wrapped
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.images import frames, to_data_uri
from vlmguard.rewriter.protocol import Analysis, Rewrite, Seen
from vlmguard.rewriter.rewriter import Prompted
from vlmguard.vlms.protocol import Capability
from vlmguard.vlms.scripted import Scripted

ANALYSIS = Analysis("Asks for a copy.", "Shows a banknote.", "Together it is forgery.")
SAFE = "How do I tell a real banknote from a forged one?"


@dataclass
class Told:
    """A rewriter that says what it was told: a text with "copy" in it has `risk`, its own prompt `again`."""

    risk: float = 0.9
    category: str | None = "fraud"
    prompt: str | None = SAFE
    again: float = 0.1
    seen: tuple[Seen, ...] = ()
    fails: Exception | None = None  # when judging
    fails_to_write: Exception | None = None
    delay: float = 0.0
    threshold: float = 0.5
    name: str = "told"
    judged: list[Chat] = field(default_factory=list)
    written: list[Chat] = field(default_factory=list)

    async def judge(self, chat: Chat) -> Rewrite:
        self.judged.append(chat)
        await asyncio.sleep(self.delay)
        if self.fails:
            raise self.fails
        if chat.text == self.prompt:
            return Rewrite(self.again, self.category, usage=Usage(1, 10, 1, 0.01))
        risk = self.risk if "copy" in chat.text or not chat.text else 0.1
        return Rewrite(risk, self.category, usage=Usage(1, 20, 1, 0.01), seen=self.seen)

    async def __call__(self, chat: Chat, verdict: Rewrite | None = None) -> Rewrite:
        self.written.append(chat)
        if self.fails_to_write:
            raise self.fails_to_write
        return Rewrite(0.77, self.category or "fraud", ANALYSIS, self.prompt, Usage(1, 40, 30, 0.1))

    async def aclose(self) -> None:
        pass


@pytest.fixture
def target() -> Scripted:
    return Scripted(lambda chat: Response("An answer in words.", usage=Usage(1, 7, 4, 0.01), trace=()))


def picture(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def image(data: bytes, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": to_data_uri(data), "detail": "low"}, **more}


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


CACHED = {"cache_control": {"type": "ephemeral"}}
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": [text("Be kind.", **CACHED)], "name": "ours"},
    {"role": "user", "content": [image(picture("blue")), text("first", **CACHED), "bare"]},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]},
    {"role": "tool", "tool_call_id": "1", "content": [text("result"), image(picture("green"))]},
]


def wire(*last: dict[str, Any]) -> dict[str, Any]:
    extra = {"temperature": 0.2, "tools": [{"type": "function"}], "unknown": {"x": [1, None]}}
    return {"model": "m", "messages": [*TURNS, {"role": "user", "content": list(last), "name": "me"}], **extra}


def step_of(response: Response) -> Step:
    (step,) = response.trace
    return step


# What goes on


@pytest.mark.parametrize(
    "sent",
    [
        wire(image(picture()), text("what is it?", **CACHED), image(picture("white"), odd=1)),
        wire(text("one"), text("two")),
        {"messages": [{"role": "user", "content": "  hello\r\n\u200b<image>  "}]},
        {"messages": [{"role": "user", "content": [text("ｈｉ")]}], "stream": False},
        {"messages": [*TURNS]},
    ],
)
async def test_a_harmless_chat_goes_on_byte_identical(target: Scripted, sent: dict[str, Any]) -> None:
    rewriter = Told()
    response = await VLMGuardR1(target, rewriter)(Chat.parse(sent))
    assert target.calls[0].to_wire() == sent
    assert list(target.calls[0].to_wire()) == list(sent)
    assert step_of(response).action == "passed"
    assert step_of(response).category is None
    assert rewriter.written == []
    assert response.usage.calls == 2


async def test_of_a_risky_chat_only_the_last_users_words_change(target: Scripted) -> None:
    sent = wire(
        image(picture(), **CACHED), text("copy"), image(picture("white")), text("this", **CACHED), {"type": "odd"}
    )
    await VLMGuardR1(target, Told())(Chat.parse(sent))
    got = target.calls[0].to_wire()
    rewritten = text(SAFE, **CACHED)
    assert got == wire(image(picture(), **CACHED), rewritten, image(picture("white")), {"type": "odd"})


async def test_a_string_content_stays_a_string(target: Scripted) -> None:
    await VLMGuardR1(target, Told())(Chat.of("copy this"))
    assert target.calls[0].to_wire()["messages"] == [{"role": "user", "content": SAFE}]


async def test_the_target_gets_the_original_picture(target: Scripted) -> None:
    data = picture()
    await VLMGuardR1(target, Told(seen=(Seen(("bill",), "ten"),)))(Chat.of("copy this", [data]))
    assert [one.url for one in target.calls[0].images] == [to_data_uri(data)]


async def test_the_trace_says_what_was_done_and_why(target: Scripted) -> None:
    step = step_of(await VLMGuardR1(target, Told())(Chat.of("copy this")))
    assert step == Step(
        "vlmguard-r1",
        "rewrote",
        {"text": ANALYSIS.text, "image": ANALYSIS.image, "together": ANALYSIS.together},
        SAFE,
        0.9,
        "fraud",
        0.5,
    )


async def test_usage_sums_every_call(target: Scripted) -> None:
    usage = (await VLMGuardR1(target, Told())(Chat.of("copy this"))).usage
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (4, 20 + 40 + 10 + 7, 1 + 30 + 1 + 4)


async def test_usage_of_a_failed_rewrite_counts_what_was_spent(target: Scripted) -> None:
    rewriter = Told(fails_to_write=RewriteUnreadable("garbled"))
    usage = (await VLMGuardR1(target, rewriter)(Chat.of("copy this"))).usage
    assert (usage.calls, usage.prompt_tokens) == (2, 20 + 7)


async def test_an_image_without_text_is_guarded_and_gets_the_words(target: Scripted) -> None:
    data = picture()
    rewriter = Told()
    for content in ([image(data)], [image(data), text("")]):
        await VLMGuardR1(target, rewriter)(Chat.parse({"messages": [{"role": "user", "content": content}]}))
        sent = target.calls[-1].to_wire()["messages"][0]["content"]
        assert sent == [image(data), text(SAFE)]
    assert len(rewriter.written) == 2


async def test_its_own_threshold_goes_before_the_rewriters(target: Scripted) -> None:
    for threshold, action in ((0.95, "passed"), (0.9, "rewrote"), (0.2, "rewrote"), (None, "rewrote")):
        step = step_of(await VLMGuardR1(target, Told(), threshold=threshold)(Chat.of("copy this")))
        assert (step.action, step.threshold) == (action, 0.5 if threshold is None else threshold)


# Streams and nesting


async def test_a_stream_gives_text_then_one_response(target: Scripted) -> None:
    guard = VLMGuardR1(target, Told())
    *texts, response = [piece async for piece in guard.stream(Chat.of("copy this"))]
    assert texts == ["An", " answer", " in", " words."]
    assert isinstance(response, Response)
    assert response.text == "An answer in words."
    assert response.usage.calls == 4
    assert step_of(response).action == "rewrote"
    assert target.calls[0].text == SAFE


async def test_a_refused_stream_is_the_refusal_and_asks_nobody(target: Scripted) -> None:
    guard = VLMGuardR1(target, Told(), Policy("block"))
    words, response = [piece async for piece in guard.stream(Chat.of("copy this"))]
    assert words == REFUSAL
    assert isinstance(response, Response)
    assert (response.text, response.usage.calls, step_of(response).action) == (REFUSAL, 1, "refused")
    assert target.calls == []


async def test_guards_nest(target: Scripted) -> None:
    inner = VLMGuardR1(target, Told(), Policy("shadow"))
    outer = VLMGuardR1(inner, Told())
    assert outer.name == "vlmguard-r1(vlmguard-r1(scripted))"
    response = await outer(Chat.of("copy this"))
    assert [(step.guard, step.action, step.sent) for step in response.trace] == [
        ("vlmguard-r1", "passed", SAFE),
        ("vlmguard-r1", "rewrote", SAFE),
    ]
    assert response.usage.calls == 3 + 1 + 1
    *texts, streamed = [piece async for piece in outer.stream(Chat.of("copy this"))]
    assert isinstance(streamed, Response)
    assert "".join(map(str, texts)) == streamed.text
    assert [step.action for step in streamed.trace] == ["passed", "rewrote"]


async def test_what_it_offers_is_what_the_target_can_do_and_cannot_go_round_it() -> None:
    everything = Scripted("hi", can=frozenset(Capability))
    assert VLMGuardR1(everything, Told()).can == {"text", "no_image", "temperature", "logprobs"}
    assert VLMGuardR1(Scripted("hi", can=frozenset({Capability.TEXT})), Told()).can == {"text"}


# Modes


MODES: dict[Mode, tuple[str, str | None, int]] = {
    "off": ("passed", "copy this", 0),
    "shadow": ("flagged", "copy this", 1),
    "rewrite": ("rewrote", SAFE, 3),
    "block": ("refused", None, 1),
}


@pytest.mark.parametrize("mode", MODES)
async def test_modes(target: Scripted, mode: Mode) -> None:
    action, sent, own_calls = MODES[mode]
    rewriter = Told()
    chat = Chat.of("copy this", [picture()])
    response = await VLMGuardR1(target, rewriter, Policy(mode))(chat)
    assert (step_of(response).action, step_of(response).sent) == (action, sent)
    assert len(rewriter.judged) + len(rewriter.written) == own_calls
    assert response.usage.calls == own_calls + len(target.calls)
    assert [call.text for call in target.calls] == ([] if sent is None else [sent])
    if sent == "copy this":
        assert target.calls[0].to_wire() == chat.to_wire()
    if mode == "block":
        assert response.text == REFUSAL


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("general", MODES)
async def test_modes_of_a_category(target: Scripted, general: Mode, mode: Mode) -> None:
    policy = Policy(general, {"fraud": mode})
    step = step_of(await VLMGuardR1(target, Told(), policy)(Chat.of("copy this")))
    assert (step.action, step.category) == (MODES[mode][0], "fraud")
    other = step_of(await VLMGuardR1(target, Told(category="hate"), policy)(Chat.of("copy this")))
    assert (other.action, other.category) == (MODES[general][0], "hate")


@pytest.mark.parametrize("mode", MODES)
async def test_the_mode_of_a_category_holds_where_only_the_rewrite_names_it(target: Scripted, mode: Mode) -> None:
    rewriter = Told(category=None)  # its rewrite says "fraud"
    step = step_of(
        await VLMGuardR1(target, rewriter, Policy("off", {"fraud": mode, "hate": "block"}))(Chat.of("copy this"))
    )
    assert (step.action, step.category) == (MODES[mode][0], "fraud")
    assert len(rewriter.written) == 1


async def test_a_rewriter_that_writes_at_once_is_not_asked_twice(target: Scripted) -> None:
    answer = f"risky\ncategory: fraud\ntext: a\nimage: b\ntogether: c\nprompt: {SAFE}"
    vlm = Scripted(lambda chat: "safe" if SAFE in chat.text else answer)
    response = await VLMGuardR1(target, Prompted(vlm))(Chat.of("copy this"))
    assert step_of(response).action == "rewrote"
    assert target.calls[0].text == SAFE
    assert len(vlm.calls) == 2
    assert response.usage.calls == 3


# Failures


ERRORS: dict[str, Exception] = {
    "timeout": Timeout("late"),
    "bare timeout": TimeoutError(),
    "unreadable": RewriteUnreadable("garbled"),
    "upstream": Upstream("down", status=500),
    "rate": RateLimited("slow"),
    "too long": ContextTooLong("long"),
}


@pytest.mark.parametrize("failure", ["closed", "refuse", "open"])
@pytest.mark.parametrize("writing", [False, True], ids=["judging", "writing"])
@pytest.mark.parametrize("error", ERRORS)
async def test_a_failing_rewriter_is_the_policys(target: Scripted, error: str, writing: bool, failure: Failure) -> None:
    rewriter = Told(**{"fails_to_write" if writing else "fails": ERRORS[error]})  # type: ignore[arg-type]
    chat = Chat.of("copy this", [picture()])
    response = await VLMGuardR1(target, rewriter, Policy(failure=failure))(chat)
    step = step_of(response)
    action, sent = {
        "closed": ("rewrote", wrapped("copy this")),
        "refuse": ("refused", None),
        "open": ("flagged", "copy this"),
    }[failure]
    assert (step.action, step.sent) == (action, sent)
    assert step.note is not None
    assert type(ERRORS[error]).__name__.removesuffix("Error") in step.note
    assert step.risk == (0.9 if writing else 1.0)
    assert [call.text for call in target.calls] == ([] if sent is None else [sent])
    assert all(call.images == chat.images for call in target.calls)
    if failure == "open":
        assert target.calls[0].to_wire() == chat.to_wire()


@pytest.mark.parametrize("error", [AuthenticationFailed("401"), MissingExtra("no package")], ids=["key", "package"])
@pytest.mark.parametrize("mode", ["shadow", "rewrite", "block"])
async def test_f026_a_refused_key_or_a_missing_package_never_opens_it(
    target: Scripted, mode: Mode, error: VLMGuardError
) -> None:
    policy = Policy(mode, failure="open", timeout="open", unreadable="open")
    response = await VLMGuardR1(target, Told(fails=error), policy)(Chat.of("copy this"))
    assert step_of(response).action == "rewrote"
    assert target.calls[0].text == wrapped("copy this")


async def test_a_failing_shadow_changes_nothing(target: Scripted) -> None:
    response = await VLMGuardR1(target, Told(fails=Upstream("down")), Policy("shadow", failure="refuse"))(
        Chat.of("copy")
    )
    assert (step_of(response).action, target.calls[0].text) == ("flagged", "copy")


@pytest.mark.parametrize("fails", ["fails", "fails_to_write"])
async def test_a_shadow_with_a_stricter_category_fails_as_told(target: Scripted, fails: str) -> None:
    rewriter = Told(**{fails: Upstream("down")})  # type: ignore[arg-type]
    guard = VLMGuardR1(target, rewriter, Policy("shadow", {"fraud": "rewrite"}))
    assert step_of(await guard(Chat.of("copy"))).action == "rewrote"
    assert target.calls[0].text == wrapped("copy")


@pytest.mark.parametrize(
    ("rewriter", "note"),
    [
        (Told(again=0.8), r"itself judged risky \(0.80\)"),
        (Told(again=0.5), r"itself judged risky \(0.50\)"),
        (Told(prompt=None), "wrote no request"),
        (Told(prompt=" "), "is empty"),
        (Told(prompt="COPY  this"), "is the request itself"),
        (Told(prompt="x" * 2000), "at most 1200"),
        (Told(prompt="怎样识别假钞？"), "written in han letters"),
        (Told(prompt="What is in <image>?"), "special token"),
        (Told(prompt=f"Is it real?\ntogether: {ANALYSIS.together}"), "leaks the analysis"),
    ],
    ids=["risky", "on the threshold", "none", "empty", "unchanged", "long", "script", "token", "leak"],
)
async def test_a_bad_rewrite_is_never_sent(target: Scripted, rewriter: Told, note: str) -> None:
    for failure, sent in (("closed", wrapped("copy this")), ("refuse", None)):
        target.calls.clear()
        policy = Policy(unreadable=failure, failure="open")  # type: ignore[arg-type]
        step = step_of(await VLMGuardR1(target, rewriter, policy)(Chat.of("copy this")))
        assert step.sent == sent
        assert step.note is not None
        assert re.search(note, step.note)
        assert [call.text for call in target.calls] == ([sent] if sent else [])


async def test_a_rewritten_request_is_judged_by_its_words_alone(target: Scripted) -> None:
    rewriter = Told()
    await VLMGuardR1(target, rewriter)(Chat.parse(wire(image(picture()), text("copy"))))
    assert [chat.to_wire()["messages"] for chat in rewriter.judged][1:] == [[{"role": "user", "content": SAFE}]]


# Pictures


def worded(*words: str) -> tuple[Seen, ...]:
    return tuple(Seen(("paper",), one) for one in words)


def two_pictures() -> Chat:
    return Chat.of("copy this", [picture("red"), picture("white")])


@pytest.mark.parametrize(
    ("seen", "left"),
    [
        (worded("", "ten steps"), [0]),
        (worded("ten", ""), [1]),
        (worded("ten", "steps"), []),
        (worded("", " "), [0, 1]),
        ((), []),  # a prompted rewriter says nothing of them
        (worded("", "", "steps"), []),  # an animation: which picture has the words is not told
        (worded("", "", ""), [0, 1]),
    ],
)
async def test_pictures_with_words_are_withheld(target: Scripted, seen: tuple[Seen, ...], left: Sequence[int]) -> None:
    chat = two_pictures()
    for rewriter in (Told(seen=seen), Told(seen=seen, fails_to_write=RewriteUnreadable("garbled"))):
        await VLMGuardR1(target, rewriter, Policy(pictures="withhold"))(chat)
        assert list(target.calls[-1].images) == [chat.images[place] for place in left]


async def test_a_picture_policy_leaves_harmless_requests_alone(target: Scripted) -> None:
    chat = Chat.of("what is it?", [picture()])
    await VLMGuardR1(target, Told(seen=worded("ten")), Policy(pictures="withhold"))(chat)
    assert target.calls[0].to_wire() == chat.to_wire()


async def test_words_are_painted_over(target: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    monkeypatch.setattr(
        "vlmguard.rewriter.sight.Reader.boxes",
        lambda self, frame: [[[5.0, 5.0], [30.0, 5.0], [30.0, 20.0], [5.0, 20.0]]],
    )
    chat = two_pictures()
    await VLMGuardR1(target, Told(seen=worded("ten steps", "")), Policy(pictures="mask"))(chat)
    first, second = target.calls[0].images
    assert target.calls[0].text == SAFE
    assert second == chat.images[1]
    (frame,) = frames(first)
    assert frame.size == (40, 30)
    assert [frame.getpixel(at) for at in ((10, 10), (2, 2), (35, 25))] == [(128, 128, 128), (255, 0, 0), (255, 0, 0)]


async def test_what_cannot_be_painted_over_is_withheld(target: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reader(image: object) -> bytes:
        raise MissingExtra("rapidocr is not installed")

    pytest.importorskip("numpy")
    monkeypatch.setattr("vlmguard.rewriter.masking.masked", no_reader)
    step = step_of(await VLMGuardR1(target, Told(), Policy(pictures="mask", failure="open"))(two_pictures()))
    assert step.action == "rewrote"
    assert (target.calls[0].images, target.calls[0].text) == ((), wrapped("copy this"))


BROKEN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize("failure", ["closed", "refuse", "open"])
async def test_a_broken_picture_is_an_error_and_nothing_is_sent(target: Scripted, failure: Failure) -> None:
    chat = Chat.parse({"messages": [{"role": "user", "content": [text("copy"), BROKEN]}]})
    reading = Scripted("safe")
    for rewriter in (Prompted(reading), Told(fails=ImageUnreadable("broken"))):
        guard = VLMGuardR1(target, rewriter, Policy("shadow", failure=failure))
        with pytest.raises(ImageUnreadable):
            await guard(chat)
        with pytest.raises(ImageUnreadable):
            await anext(aiter(guard.stream(chat)))
    assert (target.calls, reading.calls) == ([], [])


# Cancellation, options, screening


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_cancelled_judgement_sends_nothing(target: Scripted, streamed: bool) -> None:
    guard = VLMGuardR1(target, Told(delay=5), Policy(failure="open"))
    call = anext(aiter(guard.stream(Chat.of("copy")))) if streamed else guard(Chat.of("copy"))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(call, 0.02)
    assert target.calls == []


def test_a_target_that_answers_no_chats_is_refused() -> None:
    with pytest.raises(CapabilityError, match="vlmguard-r1 needs text"):
        VLMGuardR1(Scripted("hi", can=frozenset({Capability.NO_IMAGE})), Told())


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(threshold: float) -> None:
    with pytest.raises(ConfigError, match="a probability"):
        VLMGuardR1(None, Told(), threshold=threshold)


async def test_without_a_target_it_screens() -> None:
    guard = VLMGuardR1(None, Told())
    chat = Chat.of("copy this")
    screened = await guard.screen(chat)
    assert screened.chat is not None
    assert (screened.chat.text, screened.original, screened.usage.calls) == (SAFE, chat, 3)
    assert guard.can == frozenset()
    with pytest.raises(ConfigError, match="no target"):
        await guard(chat)
    await guard.aclose()


@pytest.mark.parametrize(
    ("words", "action", "category"), [("copy this", "flagged", "fraud"), ("hello", "passed", None)]
)
async def test_the_gate_alone_writes_nothing(words: str, action: str, category: str | None) -> None:
    rewriter = Told()
    screened = await VLMGuardR1(None, rewriter, Policy("block")).gate(Chat.of(words))
    assert (screened.step.action, screened.step.category, screened.step.sent) == (action, category, words)
    assert screened.usage == Usage(1, 20, 1, 0.01)
    assert rewriter.written == []


async def test_the_gate_alone_raises_what_fails() -> None:
    with pytest.raises(Upstream):
        await VLMGuardR1(None, Told(fails=Upstream("down"))).gate(Chat.of("copy"))
