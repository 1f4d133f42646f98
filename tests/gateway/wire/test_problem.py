"""Which status each error has for the caller."""

from __future__ import annotations

import inspect

import pytest

from vlmguard import errors
from vlmguard.errors import ImageTooLarge, RateLimited, Upstream, VLMGuardError
from vlmguard.gateway.wire.problem import Problem, problem_of

STATUSES = {
    "BadRequest": 400,
    "ImageError": 400,
    "ImageTooLarge": 413,
    "ImageUnreadable": 400,
    "ImageNotAllowed": 400,
    "ConfigError": 500,
    "MissingExtra": 500,
    "CapabilityError": 500,
    "ModelError": 500,
    "AdapterError": 500,
    "TargetError": 502,
    "Timeout": 504,
    "RateLimited": 429,
    "AuthenticationFailed": 502,  # the operator's key, never the caller's 401 (F026)
    "Upstream": 502,
    "BadAnswer": 502,
    "ContextTooLong": 400,
    "RewriteUnreadable": 502,
    "AuditLogError": 503,
    "VLMGuardError": 503,
}
KINDS = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, VLMGuardError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_f026_f047_every_error_has_the_status_that_a_client_expects(kind: type[VLMGuardError]) -> None:
    problem = problem_of(kind("what\nhappened", "What to  do."))
    assert problem == Problem(STATUSES[kind.__name__], "what happened. What to do.")


def test_every_error_is_in_the_table() -> None:
    assert {kind.__name__ for kind in KINDS} == STATUSES.keys()


@pytest.mark.parametrize(
    ("of_target", "told"), [(400, 400), (422, 422), (401, 502), (404, 502), (409, 502), (500, 502), (None, 502)]
)
def test_a_target_that_blames_the_request_is_believed(of_target: int | None, told: int) -> None:
    assert problem_of(Upstream("answered", status=of_target)).status == told


def test_the_place_and_the_wait_are_passed_on() -> None:
    assert problem_of(ImageTooLarge("too large", param="messages[0]")).param == "messages[0]"
    assert problem_of(RateLimited("wait", retry_after=60.0)).retry_after == 60.0
