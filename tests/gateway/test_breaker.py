import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.stand_ins import ANALYSIS
from tests.stand_ins import Rewriter as Scripted
from vlmguard.chat import Chat
from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    BadRequest,
    ConfigError,
    ContextTooLong,
    ImageUnreadable,
    ModelError,
    RateLimited,
    RewriteUnreadable,
    Timeout,
    Upstream,
    VLMGuardError,
)
from vlmguard.gateway.breaker import Breaker, GuardedRewriter, shared_seconds
from vlmguard.guards.policy import Policy
from vlmguard.guards.vlmguard_r1 import VLMGuardR1
from vlmguard.rewriter.protocol import Rewrite
from vlmguard.rewriter.rewriter import Rewriter

COUNTED = [
    Timeout("late"),
    TimeoutError(),
    Upstream("gone"),
    Upstream("broken", status=503),
    RateLimited("slow"),
    BadAnswer("?"),
]
UNCOUNTED = [
    *(BadRequest("bad"), ImageUnreadable("broken"), RewriteUnreadable("garbled"), ContextTooLong("long")),
    *(Upstream("bad request", status=400), AuthenticationFailed("401"), ConfigError("wrong"), ModelError("none")),
]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def outcome(it: Exception | str) -> Callable[[], Awaitable[str]]:
    async def call() -> str:
        if isinstance(it, Exception):
            raise it
        return it

    return call


def state(breaker: Breaker) -> str:
    return breaker.state  # behind a function, or mypy takes it to stay what it was


async def fail(breaker: Breaker, *errors: Exception) -> None:
    for error in errors:
        with pytest.raises(type(error)) as caught:
            await breaker(outcome(error))
        assert caught.value is error


async def opened(clock: Clock, *errors: Exception) -> Breaker:
    breaker = Breaker(len(errors), 30, clock)
    await fail(breaker, *errors)
    assert state(breaker) == "open"
    return breaker


async def refusal(breaker: Breaker) -> VLMGuardError:
    """What it raises without making the call."""
    called = False

    async def call() -> None:
        nonlocal called
        called = True

    with pytest.raises(VLMGuardError) as caught:
        await breaker(call)
    assert not called
    return caught.value


@pytest.mark.parametrize("error", COUNTED, ids=repr)
async def test_failures_of_the_service_open_it(error: Exception) -> None:
    breaker = Breaker(3, 30, Clock())
    await fail(breaker, error, error)
    assert state(breaker) == "closed"
    await fail(breaker, error)
    assert state(breaker) == "open"
    assert "again and again" in str(await refusal(breaker))


@pytest.mark.parametrize("error", UNCOUNTED, ids=repr)
async def test_failures_of_a_request_do_not(error: Exception) -> None:
    breaker = Breaker(1, 30, Clock())
    await fail(breaker, *[error] * 10)
    assert state(breaker) == "closed"
    assert await breaker(outcome("well")) == "well"


@pytest.mark.parametrize(
    "answer", ["well", RewriteUnreadable("garbled"), Upstream("bad request", status=400)], ids=repr
)
async def test_an_answer_in_between_starts_the_count_again(answer: Exception | str) -> None:
    breaker = Breaker(3, 30, Clock())
    await fail(breaker, Timeout("late"), Timeout("late"))
    if isinstance(answer, str):
        assert await breaker(outcome(answer)) == answer
    else:
        await fail(breaker, answer)
    await fail(breaker, Timeout("late"), Timeout("late"))
    assert state(breaker) == "closed"


async def test_a_bad_picture_says_nothing_about_the_service() -> None:
    breaker = Breaker(2, 30, Clock())
    await fail(breaker, Timeout("late"), ImageUnreadable("broken"), Timeout("late"))
    assert state(breaker) == "open"


async def test_half_open_lets_one_through_and_closes_on_its_answer() -> None:
    clock = Clock()
    breaker = await opened(clock, Timeout("late"))
    clock.now += 29.9
    await refusal(breaker)
    clock.now += 0.1
    assert state(breaker) == "half-open"
    answer = asyncio.Event()

    async def slow() -> str:
        await answer.wait()
        return "well"

    trial = asyncio.create_task(breaker(slow))
    await asyncio.sleep(0)
    await refusal(breaker)
    answer.set()
    assert await trial == "well"
    assert state(breaker) == "closed"
    assert await breaker(outcome("again")) == "again"


async def test_a_failed_trial_opens_it_for_as_long_again() -> None:
    clock = Clock()
    breaker = await opened(clock, *[Timeout("late")] * 5)
    clock.now += 30
    await fail(breaker, Upstream("gone"))
    assert state(breaker) == "open"
    clock.now += 29
    await refusal(breaker)
    clock.now += 1
    assert await breaker(outcome("well")) == "well"


@pytest.mark.parametrize("error", [BadRequest("bad"), AuthenticationFailed("401"), KeyError("a bug")], ids=repr)
async def test_a_trial_that_tells_nothing_leaves_the_next_to_try(error: Exception) -> None:
    clock = Clock()
    breaker = await opened(clock, Timeout("late"))
    clock.now += 30
    await fail(breaker, error)
    assert state(breaker) == "half-open"
    assert await breaker(outcome("well")) == "well"
    assert state(breaker) == "closed"


async def test_a_cancelled_trial_leaves_the_next_to_try() -> None:
    clock = Clock()
    breaker = await opened(clock, Timeout("late"))
    clock.now += 30
    trial = asyncio.create_task(breaker(asyncio.Event().wait))
    await asyncio.sleep(0)
    trial.cancel()
    with pytest.raises(asyncio.CancelledError):
        await trial
    assert await breaker(outcome("well")) == "well"


@pytest.mark.parametrize("late", ["well", Timeout("late")], ids=repr)
async def test_a_call_from_before_changes_nothing(late: Exception | str) -> None:
    clock = Clock()
    breaker = Breaker(1, 30, clock)
    go_on = asyncio.Event()

    async def old() -> str:
        await go_on.wait()
        return await outcome(late)()

    task = asyncio.create_task(breaker(old))
    await asyncio.sleep(0)
    await fail(breaker, Upstream("gone"))
    clock.now += 20
    go_on.set()
    await asyncio.wait([task])
    assert (task.exception() or task.result()) == late
    assert state(breaker) == "open"
    clock.now += 10  # and it stays open no longer for it
    assert state(breaker) == "half-open"


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (Timeout("late"), Timeout),
        (TimeoutError(), Timeout),
        (RateLimited("slow", retry_after=900), RateLimited),
        (BadAnswer("?"), Upstream),
        (Upstream("gone"), Upstream),
    ],
    ids=repr,
)
async def test_an_open_circuit_is_treated_as_what_opened_it(cause: Exception, kind: type[VLMGuardError]) -> None:
    clock = Clock()
    breaker = await opened(clock, cause)
    clock.now += 10
    error = await refusal(breaker)
    assert type(error) is kind
    assert "for 20 s" in str(error)
    if isinstance(error, RateLimited):
        assert error.retry_after == pytest.approx(20)
    if isinstance(error, Upstream):
        assert error.status == 503


async def test_the_error_repeats_nothing_that_a_server_said() -> None:
    breaker = await opened(Clock(), Upstream("cannot parse: my secret prompt", status=500))
    assert "secret" not in str(await refusal(breaker))


@pytest.mark.parametrize("error", [AuthenticationFailed("401"), ModelError("none"), ConfigError("wrong")], ids=repr)
async def test_f026_an_open_circuit_never_opens_a_guard_whose_key_was_refused(error: VLMGuardError) -> None:
    open_ = Policy(failure="open", timeout="open", upstream="open", overload="open", unreadable="open")
    breaker = Breaker(3, 30, Clock())
    await fail(breaker, Timeout("late"), error, Timeout("late"), Upstream("gone"))
    assert state(breaker) == "open"
    refused = await refusal(breaker)
    assert isinstance(refused, type(error))
    assert open_.on_failure(refused) == "closed"


async def test_f026_a_key_that_is_taken_again_is_forgiven() -> None:
    breaker = Breaker(1, 30, Clock())
    await fail(breaker, AuthenticationFailed("401"))
    assert await breaker(outcome("well")) == "well"
    await fail(breaker, Timeout("late"))
    assert type(await refusal(breaker)) is Timeout


def guarded(rewriter: Rewriter, seconds: float = 60, failures: int = 5) -> GuardedRewriter:
    return GuardedRewriter(rewriter, Breaker(failures, 30, Clock()), seconds)


async def test_a_guarded_rewriter_is_a_rewriter() -> None:
    inner = Scripted()
    made = guarded(inner)
    assert isinstance(made, Rewriter)
    assert (made.name, made.threshold) == (inner.name, inner.threshold)
    chat = Chat.of("risky")
    assert await made.judge(chat) == await inner.judge(chat)
    verdict = Rewrite(0.75, "fraud")
    written = await made(chat, verdict)
    assert (written.risk, written.prompt, written.analysis) == (0.75, "Safely: risky", ANALYSIS)


async def test_closing_it_closes_the_rewriter() -> None:
    class Closing(Scripted):
        closed = False

        async def aclose(self) -> None:
            self.closed = True

    inner = Closing()
    await guarded(inner).aclose()
    assert inner.closed


async def test_a_slow_rewriter_is_not_waited_for() -> None:
    inner = Scripted(slow_seconds=60)
    made = guarded(inner, seconds=0.02, failures=2)
    for _ in range(2):
        with pytest.raises(Timeout, match=r"did not answer in 0\.02 s"):
            await made.judge(Chat.of("slow"))
    assert inner._now == 0, "the call goes on"
    with pytest.raises(Timeout, match="left alone"):
        await made.judge(Chat.of("hello"))
    assert len(inner.judged) == 2


async def test_f027_a_timeout_that_the_rewriter_does_not_translate() -> None:
    class Raw(Scripted):
        async def judge(self, chat: Chat) -> Rewrite:
            raise TimeoutError

    with pytest.raises(Timeout, match="did not answer"):
        await guarded(Raw()).judge(Chat.of("hello"))


async def test_the_calls_of_one_request_share_their_seconds() -> None:
    inner = Scripted(slow_seconds=60)
    made = guarded(inner)
    with shared_seconds(0.02):
        await made.judge(Chat.of("hello"))
        with pytest.raises(Timeout):
            await made.judge(Chat.of("slow"))
        judged = len(inner.judged)
        with pytest.raises(Timeout):
            await made(Chat.of("risky"))
        assert len(inner.judged) == judged, "asked without any time left"
    await made.judge(Chat.of("hello"))


async def test_requests_do_not_share_seconds_with_each_other() -> None:
    made = guarded(Scripted())

    async def request(seconds: float) -> Rewrite:
        with shared_seconds(seconds):
            await asyncio.sleep(0)
            return await made.judge(Chat.of("hello"))

    late, in_time = await asyncio.gather(request(-1), request(60), return_exceptions=True)
    assert isinstance(late, Timeout)
    assert isinstance(in_time, Rewrite)


async def test_a_cancelled_request_is_no_failure_of_the_rewriter() -> None:
    made = guarded(Scripted(slow_seconds=60), failures=1)
    task = asyncio.create_task(made.judge(Chat.of("slow")))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert state(made.breaker) == "closed"


async def test_the_guard_does_with_an_open_circuit_what_the_policy_says() -> None:
    made = guarded(Scripted(slow_seconds=60), seconds=0.02, failures=1)
    for policy, action, sent in (
        (Policy(), "rewrote", True),
        (Policy(timeout="refuse"), "refused", False),
        (Policy(timeout="open", upstream="refuse"), "flagged", True),
    ):
        guard = VLMGuardR1(None, made, policy)
        screened = await guard.screen(Chat.of("slow"))
        assert (screened.step.action, screened.chat is not None) == (action, sent)
        assert "Timeout" in (screened.step.note or "")
    assert state(made.breaker) == "open"
