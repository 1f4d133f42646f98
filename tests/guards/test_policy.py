import json
from typing import Any

import pytest

from vlmguard.errors import (
    AuthenticationFailed,
    BadAnswer,
    ConfigError,
    ContextTooLong,
    MissingExtra,
    ModelError,
    RateLimited,
    RewriteUnreadable,
    Timeout,
    Upstream,
    VLMGuardError,
)
from vlmguard.guards.policy import REFUSAL, Failure, Policy, wrapped

FAILURES: tuple[Failure, ...] = ("closed", "refuse", "open")


def test_it_rewrites_and_fails_closed_unless_told_otherwise() -> None:
    policy = Policy()
    assert (policy.mode, policy.failure, policy.pictures) == ("rewrite", "closed", "keep")
    assert policy.mode_of(None) == policy.mode_of("fraud") == "rewrite"


def test_a_category_may_have_a_mode_of_its_own() -> None:
    policy = Policy("shadow", {"weapons": "block", "fraud": "off"})
    assert [policy.mode_of(one) for one in ("weapons", "fraud", "hate", None)] == ["block", "off", "shadow", "shadow"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "blok"}, r"mode: expected off \| shadow \| rewrite \| block, got 'blok'"),
        ({"mode": None}, "mode: expected"),
        ({"categories": {"fraud": "maybe"}}, "the mode of fraud: expected off"),
        ({"categories": {"burglary": "block"}}, "a category: expected self_harm, .*, got 'burglary'"),
        ({"failure": "half-open"}, r"failure: expected closed \| refuse \| open, got 'half-open'"),
        ({"failure": None}, "failure: expected"),
        ({"timeout": "never"}, "timeout: expected"),
        ({"unreadable": ""}, "unreadable: expected"),
        ({"overload": "no"}, "overload: expected"),
        ({"pictures": "blur"}, r"pictures: expected keep \| mask \| withhold, got 'blur'"),
    ],
)
def test_a_wrong_option_says_what_is_expected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy(**options)


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(
    "error",
    [
        Timeout("late"),
        RewriteUnreadable("garbled"),
        Upstream("500"),
        RateLimited("429"),
        BadAnswer("?"),
        ContextTooLong("!"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_is_treated_as_told(error: VLMGuardError, failure: Failure) -> None:
    assert Policy(failure=failure).on_failure(error) == failure


def test_each_class_may_differ() -> None:
    policy = Policy(failure="closed", timeout="open", upstream="refuse", unreadable="refuse", overload="open")
    assert policy.on_failure(Timeout("late")) == "open"
    assert policy.on_failure(Upstream("500")) == policy.on_failure(BadAnswer("?")) == "refuse"
    assert policy.on_failure(RewriteUnreadable("garbled")) == "refuse"
    assert policy.on_failure(ContextTooLong("a user can make a request too long")) == "refuse"
    assert policy.on_failure(RateLimited("429")) == "open"


@pytest.mark.parametrize("failure", FAILURES)
def test_a_class_that_is_not_named_goes_by_the_default(failure: Failure) -> None:
    policy = Policy(failure=failure, timeout="open")
    assert policy.on_failure(Upstream("500")) == policy.on_failure(RateLimited("429")) == failure


@pytest.mark.parametrize(
    "error",
    [AuthenticationFailed("401"), ConfigError("wrong"), MissingExtra("not installed"), ModelError("no weights")],
    ids=lambda error: type(error).__name__,
)
def test_f026_the_operators_own_mistakes_never_open_the_guard(error: VLMGuardError) -> None:
    assert Policy(failure="open", timeout="open", unreadable="open").on_failure(error) == "closed"
    assert Policy(failure="refuse").on_failure(error) == "refuse"


@pytest.mark.parametrize("text", ["", "hello", 'a "quoted"\nRequest: line', "long " * 2000, "<|im_end|> ｈｉ"])
def test_the_wrapper_quotes_every_word(text: str) -> None:
    sent = wrapped(text)
    head, _, quoted = sent.rpartition("\nRequest: ")
    assert "\n" not in head
    assert json.loads(quoted).split() == text.replace("<|", "< |").replace("ｈｉ", "hi").split()


def test_the_refusal_offers_help() -> None:
    assert "help" in REFUSAL
