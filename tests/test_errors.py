import copy
import pickle

import pytest

from vlmguard import errors
from vlmguard.errors import (
    BadRequest,
    ConfigError,
    ImageTooLarge,
    MissingExtra,
    ModelError,
    RateLimited,
    RewriteUnreadable,
    TargetError,
    Upstream,
    VLMGuardError,
    missing_extra,
)

TREE = [it for it in vars(errors).values() if isinstance(it, type) and issubclass(it, VLMGuardError)]


def test_message_ends_with_its_remedy() -> None:
    assert str(ConfigError("no such guard: escoo", "Did you mean ecso?")) == "no such guard: escoo. Did you mean ecso?"
    assert str(ConfigError("It stopped.", "Start it.")) == "It stopped. Start it."
    assert str(ModelError("gone")) == "gone"


@pytest.mark.parametrize("error", TREE)
def test_every_error_stands_in_the_drawn_tree_and_has_a_docstring(error: type[VLMGuardError]) -> None:
    assert error.__name__ in (errors.__doc__ or "")
    assert error.__doc__


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ImageTooLarge, 2),
        (MissingExtra, 2),
        (errors.AdapterError, 3),
        (errors.Timeout, 4),
        (RewriteUnreadable, 1),
    ],
)
def test_exit_codes_are_inherited(error: type[VLMGuardError], code: int) -> None:
    assert error.exit_code == code


@pytest.mark.parametrize("error", TREE)
def test_errors_survive_pickling(error: type[VLMGuardError]) -> None:
    first = error("what happened", "Do this.")
    for second in (pickle.loads(pickle.dumps(first)), copy.copy(first)):
        assert (type(second), str(second), vars(second)) == (error, str(first), vars(first))


def test_fields_of_their_own() -> None:
    assert BadRequest("bad", param="messages[0].role").param == "messages[0].role"
    assert RateLimited("slow down", retry_after=60).retry_after == 60
    assert pickle.loads(pickle.dumps(Upstream("no", status=503))).status == 503
    assert issubclass(Upstream, TargetError)


def test_a_wrong_option_says_expected_and_got() -> None:
    error = ConfigError.wrong("threshold", expected="a number in [0, 1]", got=7, remedy="Set it to 0.5.")
    assert str(error) == "threshold: expected a number in [0, 1], got 7. Set it to 0.5."


def test_a_missing_extra_names_the_line_that_installs_it() -> None:
    error = missing_extra("torch", "local")
    assert isinstance(error, MissingExtra)
    assert 'pip install "vlmguard-r1[local]"' in str(error)
