"""The threshold of a trained gate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmguard.rewriter.rewriter import DEFAULT_THRESHOLD
from vlmguard.training.calibration import calibrated

RISKS = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(RISKS, st.floats(0.01, 0.5))
def test_at_most_the_stated_share_of_harmless_rows_is_flagged(risks: list[float], rate: float) -> None:
    found = calibrated(risks, [False] * len(risks), rate)
    flagged = sum(risk >= found.threshold for risk in risks)
    assert flagged <= rate * len(risks) + 1e-9 or found.threshold == 1.0
    assert found.auroc is None
    assert found.harmless == len(risks)


def test_no_lower_threshold_would_keep_the_rate() -> None:
    found = calibrated([number / 100 for number in range(100)], [False] * 100, 0.05)
    assert found.threshold == pytest.approx(0.94)
    assert found.threshold > 0.94


def test_a_gate_that_tells_apart_and_one_that_does_not() -> None:
    good = calibrated([0.9, 0.8, 0.7, 0.1, 0.2, 0.3], [True] * 3 + [False] * 3, 0.05)
    assert good.auroc == (1.0, 1.0, 1.0)
    assert good.recall == 1.0
    blind = calibrated([0.5] * 40, [True, False] * 20, 0.05)
    assert blind.auroc is not None
    assert blind.auroc[0] == 0.5
    assert blind.recall == 0.0


def test_what_cannot_be_read_is_in_neither_kind() -> None:
    found = calibrated([None, 0.9, None, 0.1], [True, True, False, False], 0.05)
    assert (found.risky, found.harmless, found.unreadable) == (1, 1, 2)


def test_without_harmless_rows_the_threshold_is_the_default() -> None:
    found = calibrated([0.9, 0.8], [True, True], 0.05)
    assert (found.threshold, found.harmless, found.auroc, found.recall) == (DEFAULT_THRESHOLD, 0, None, None)
