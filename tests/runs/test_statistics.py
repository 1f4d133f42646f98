"""The quality table's numbers, against values worked out by hand."""

import pytest

from runs.packaged.bars import Bar, gate_bars
from runs.packaged.items import Item
from runs.packaged.statistics import auroc, auroc_interval, share


def test_auroc_counts_pairs_and_half_of_the_ties() -> None:
    assert auroc([3, 4], [1, 2]) == 1.0
    assert auroc([1, 2], [3, 4]) == 0.0
    assert auroc([2, 2], [2, 2]) == 0.5
    assert auroc([1, 3], [2]) == 0.5


def test_wilson_interval_of_eight_in_ten() -> None:
    assert share(8, 10) == pytest.approx((0.8, 0.490, 0.943), abs=1e-3)


def test_a_share_of_nothing_is_no_number() -> None:
    value, low, high = share(0, 0)
    assert value != value
    assert (low, high) == (0.0, 1.0)


def test_the_interval_holds_the_value_and_is_the_same_again() -> None:
    value, low, high = auroc_interval([0.9, 0.8, 0.4, 0.7], [0.1, 0.5, 0.3, 0.2])
    assert low <= value <= high
    assert auroc_interval([0.9, 0.8, 0.4, 0.7], [0.1, 0.5, 0.3, 0.2]) == (value, low, high)


def test_a_bar_may_be_a_ceiling() -> None:
    assert Bar("false alarms", "10", 0.01, 0, 0.1, 0.02, at_most=True).met
    assert not Bar("recall", "10", 0.01, 0, 0.1, 0.02).met


def test_the_same_words_must_score_higher_over_the_risky_photo() -> None:
    names = ["figstep", "typeset_benign", "mm_safetybench", "hades", "jailguard_benign", "xstest_safe", "xstest_unsafe"]
    items = [Item(name, "1", "x", None, name in ("figstep", "hades")) for name in [*names, "strongreject"]]
    for name in ("mossbench_benign", "mossbench_harmful", "combination_safe_text"):
        items.append(Item(name, "1", "x", None, False, "pair"))
    for number in range(4):
        items.append(Item("combination_risky", f"r{number}", "x", None, True, f"p{number}"))
        items.append(Item("combination_safe_image", f"s{number}", "x", None, False, f"p{number}"))
    risk = {(item.set, item.id): 0.5 for item in items}
    for number, (one, other) in enumerate([(0.9, 0.1), (0.9, 0.1), (0.1, 0.9), (0.5, 0.5)]):
        risk["combination_risky", f"r{number}"], risk["combination_safe_image", f"s{number}"] = one, other
    bar = next(bar for bar in gate_bars(items, risk, 0.5) if "same words" in bar.what)
    assert bar.value == pytest.approx(0.625)
    assert bar.n == "4 pairs"
