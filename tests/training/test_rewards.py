import asyncio
import doctest
import threading
from collections.abc import Callable
from typing import Any

import pytest

from vlmguard.chat import Chat, Response, Usage
from vlmguard.errors import AuthenticationFailed, BadAnswer, CapabilityError, ImageUnreadable, Timeout, VLMGuardError
from vlmguard.evaluation.judges.protocol import Judgement
from vlmguard.rewriter.protocol import Analysis, Rewrite, render_output
from vlmguard.training import rewards
from vlmguard.training.rewards import Answered, answer_reward, intent_kept, right_verdict, short_enough, well_formed
from vlmguard.vlms.scripted import Answer, Scripted

REQUEST = "Which pose looks best up there?"
PROMPT = "Which pose looks best well back from the edge of the cliff?"


def output(prompt: str = PROMPT) -> str:
    return render_output(Rewrite(1.0, "ethics", Analysis("A pose.", "A cliff.", "A fall."), prompt))


class Judge:
    """Scores an answer by its words, or raises."""

    name = "judge"

    def __init__(self, score: Callable[[Chat, str], Judgement | Exception] | None = None) -> None:
        self.asked: list[tuple[str, str]] = []
        self.closed = False
        self._score = score or (lambda _, answer: Judgement(10.0 if "back" in answer else 0.0, 10.0))

    async def __call__(self, chat: Chat, answer: str) -> Judgement:
        self.asked.append((chat.text, answer))
        scored = self._score(chat, answer)
        if isinstance(scored, Exception):
            raise scored
        return scored

    async def aclose(self) -> None:
        self.closed = True


def target(**given: Any) -> Scripted:
    return Scripted(lambda chat: f"Said: {chat.text}", **given)


def chat_of(png: bytes) -> Callable[[str], Chat]:
    return lambda row: Chat.of(f"{REQUEST} ({row})", [png])


def answered(told: Answered, *texts: str, rows: list[str] | None = None, **more: Any) -> list[float | None]:
    return told(list(texts), row=rows or ["a"] * len(texts), request=[REQUEST] * len(texts), **more)


def test_the_examples_hold() -> None:
    found = doctest.testmod(rewards)
    assert (found.failed, found.attempted >= 9) == (0, True)


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("safe", 1.0),
        (output(), 1.0),
        (output(REQUEST), 0.5),  # the request itself
        (output(PROMPT + " <|im_end|>"), 0.5),
        (output().replace("category: ethics", "category: fun"), 0.0),
        (output().replace("\ntogether: A fall.", ""), 0.0),
        ("safe, I think", 0.0),
        ("", 0.0),
    ],
)
def test_the_format_is_the_guards_own(text: str, worth: float) -> None:
    assert well_formed([text], [REQUEST]) == [worth]


def test_what_ran_out_of_tokens_is_in_no_format_and_is_not_sent(png: bytes) -> None:
    """Cut off in its last line it still parses, and the guard refuses it all the same."""
    given: dict[str, Any] = {"completions": [output(), output()], "request": [REQUEST] * 2, "cut": [True, False]}
    assert well_formed(**given) == [0.0, 1.0]
    lost, kept = intent_kept(**given, wanted=[REQUEST] * 2)
    assert lost == 0.0
    assert kept
    assert right_verdict(**given, risky=[True, True]) == [1.0, 1.0]  # the gate reads the first word alone
    model = target()
    with Answered(model, Judge(), chat_of(png)) as told:
        assert told(**given, row=["a", "b"]) == [0.0, 1.0]
    assert len(model.calls) == 1


def test_the_verdict_is_held_against_the_label_whatever_follows() -> None:
    texts = ["safe", "risky", output(), "Risky\nand then nothing", "", "unsafe", "riskyfraud"]
    assert right_verdict(texts, [True] * 7) == [0, 1, 1, 1, 0, 0, 0]
    assert right_verdict(texts, [False] * 7) == [1, 0, 0, 0, 0, 0, 0]


def test_a_prompt_about_something_else_keeps_no_intent() -> None:
    other = "Which wine goes with a mushroom risotto for six guests?"
    near, far, japanese, unread, safe = intent_kept(
        [output(), output(other), output("崖から離れて撮るなら、どんなポーズがいいですか。"), "nothing", "safe"],
        [f"Asks for a pose near a cliff. {REQUEST}"] * 5,
    )
    assert near is not None
    assert near > 0.6
    assert (far, japanese, unread, safe) == (0.0, None, 0.0, None)


def test_copying_the_request_is_worth_no_more_than_being_near_it() -> None:
    wanted = f"A pose near a cliff. {REQUEST}"
    assert intent_kept([output(wanted), output(wanted + " Please.")], [wanted] * 2) == [1.0, 1.0]


def test_length_costs_from_where_no_rewrite_needs_it() -> None:
    assert short_enough([output(), "x" * 700, "x" * 1400]) == [1.0, 1.0, 0.0]
    worth = short_enough(["x" * length for length in range(700, 1500, 100)])
    assert worth == [1.0, *[pytest.approx(1 - step / 7) for step in range(1, 8)]]


def test_harm_is_never_bought_off_with_help() -> None:
    helpful_harm, refusal, both = (answer_reward(Judgement(*scores)) for scores in ((1, 10), (10, 0), (9, 9)))
    assert helpful_harm is not None
    assert refusal is not None
    assert both is not None
    assert helpful_harm < refusal < both


def test_the_target_gets_the_rewritten_words_and_the_pictures_and_the_judge_the_request(png: bytes) -> None:
    model, judge = target(), Judge()
    with Answered(model, judge, chat_of(png)) as told:
        assert answered(told, output(), "safe", "broken", output(REQUEST)) == [1.0, 0.0, 0.0, 0.0]
    assert {chat.text for chat in model.calls} == {PROMPT, f"{REQUEST} (a)"}  # what cannot be used is not sent
    assert all(len(chat.images) == 1 for chat in model.calls)
    assert all(chat.extra["temperature"] == 0 for chat in model.calls)
    assert sorted(judge.asked) == sorted((f"{REQUEST} (a)", f"Said: {chat.text}") for chat in model.calls)
    assert told.counts["asked"] == 2


def test_the_same_prompt_of_one_row_is_asked_once(png: bytes) -> None:
    model = target()
    with Answered(model, Judge(), chat_of(png)) as told:
        answered(told, output(), output(), output(), rows=["a", "a", "b"])
        assert answered(told, output()) == [1.0]
    assert len(model.calls) == 2


def test_calls_run_together_up_to_a_bound_on_one_loop_of_their_own(png: bytes) -> None:
    loops, now, most = set(), 0, 0

    class Busy(Scripted):
        async def __call__(self, chat: Chat) -> Response:
            nonlocal now, most
            loops.add((threading.current_thread().name, id(asyncio.get_running_loop())))
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.01)
            now -= 1
            return await super().__call__(chat)

    with Answered(Busy("back"), Judge(), chat_of(png), concurrency=3) as told:
        rows = [str(at) for at in range(10)]
        answered(told, *["safe"] * 10, rows=rows)
        answered(told, *[output()] * 10, rows=rows)
    assert most == 3
    assert len(loops) == 1
    assert {name for name, _ in loops} == {"answers"}


async def test_it_can_be_asked_where_a_loop_already_runs(png: bytes) -> None:
    with Answered(target(), Judge(), chat_of(png)) as told:
        assert answered(told, output()) == [1.0]


def test_what_could_not_be_judged_is_none_and_counted_apart(png: bytes) -> None:
    def score(chat: Chat, _: str) -> Judgement | Exception:
        scores: dict[str, Judgement | Exception] = {"u": Judgement(None, 5.0), "f": BadAnswer("no")}
        return scores.get(chat.text[-2], Judgement(10.0, 10.0))

    metrics: dict[str, float] = {}
    model, judge = target(), Judge(score)
    with Answered(model, judge, chat_of(png)) as told:
        texts = [output()] * 5
        found = answered(told, *texts[:4], rows=["u", "f", "f", "x"], log_metric=metrics.__setitem__)
        assert found == [None, None, None, 1.0]
        assert metrics == {"rewards/answered/unreadable": 0.25, "rewards/answered/failed": 0.5}
        assert told.counts == {"asked": 3, "unreadable": 1, "failed": 1}
        answered(told, output(), rows=["f"])  # a failure is not remembered
    assert told.counts["failed"] == 2
    assert judge.closed


def test_a_picture_that_is_gone_costs_its_row_alone(png: bytes) -> None:
    def chat(row: str) -> Chat:
        if row == "gone":
            raise ImageUnreadable("gone.png cannot be read")
        return Chat.of(REQUEST, [png])

    with Answered(target(), Judge(), chat) as told:
        assert answered(told, output(), output(), rows=["gone", "here"]) == [None, 1.0]


@pytest.mark.parametrize("error", [AuthenticationFailed("the key is refused"), CapabilityError("it sees nothing")])
def test_what_fails_for_good_ends_the_run(png: bytes, error: VLMGuardError) -> None:
    with Answered(Scripted(lambda _: error), Judge(), chat_of(png)) as told, pytest.raises(type(error)):
        answered(told, output())


def test_a_target_that_never_answers_ends_the_run(png: bytes) -> None:
    """No reward would be left of what it is trained for, and nobody would look."""
    with Answered(Scripted(lambda _: Timeout("no answer in 60 s")), Judge(), chat_of(png)) as told:
        assert [answered(told, output()) for _ in range(2)] == [[None], [None]]
        with pytest.raises(VLMGuardError, match="3 batches in a row: no answer in 60 s"):
            answered(told, output())


def test_a_target_that_comes_back_is_waited_for(png: bytes) -> None:
    script: list[Answer] = [Timeout("a"), Timeout("b"), "stay back", Timeout("c"), Timeout("d")]
    with Answered(Scripted(script), Judge(), chat_of(png)) as told:
        assert [answered(told, output(), rows=[str(at)]) for at in range(5)] == [[None], [None], [1.0], [None], [None]]


def test_leaving_ends_calls_that_hang(png: bytes) -> None:
    begun = threading.Event()

    class Hung(Scripted):
        async def __call__(self, chat: Chat) -> Response:
            begun.set()
            await asyncio.sleep(60)
            return Response("late", usage=Usage())

    before = threading.active_count()
    with Answered(Hung("x"), Judge(), chat_of(png)) as told:
        asked = asyncio.run_coroutine_threadsafe(told._scores([("a", None)]), told._loop)
        assert begun.wait(5)
    assert asked.cancelled()
    assert threading.active_count() <= before + 1  # a worker of to_thread may be left
