"""The intervals that the quality table reports: Wilson's for a share, the bootstrap over items for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

DRAWS = 1000
Z = 1.959964  # two-sided 95 %


def share(hits: int, count: int) -> tuple[float, float, float]:
    """(share, low, high) of a 95 % Wilson interval; (nan, 0, 1) of nothing."""
    if not count:
        return float("nan"), 0.0, 1.0
    p, z2 = hits / count, Z * Z
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * np.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return p, float(middle - half), float(middle + half)


def auroc(risky: Sequence[float], safe: Sequence[float]) -> float:
    """The chance that a risky item scores above a safe one; ties count half."""
    below = np.sort(np.asarray(safe))
    ranks = np.searchsorted(below, risky, "left") + np.searchsorted(below, risky, "right")
    return float(ranks.mean() / (2 * len(below)))


def auroc_interval(risky: Sequence[float], safe: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(AUROC, low, high): 95 % bootstrap over items, both sides resampled."""
    one, other = np.asarray(risky), np.asarray(safe)

    def draw(rng: np.random.Generator) -> float:
        return auroc(rng.choice(one, len(one)).tolist(), rng.choice(other, len(other)).tolist())

    return _interval(auroc(risky, safe), draw, seed)


def mean_interval(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """(mean, low, high): 95 % bootstrap over items."""
    array: NDArray[np.float64] = np.asarray(values, dtype=float)
    return _interval(float(array.mean()), lambda rng: float(rng.choice(array, len(array)).mean()), seed)


def _interval(value: float, draw: Callable[[np.random.Generator], float], seed: int) -> tuple[float, float, float]:
    rng = np.random.default_rng(seed)
    low, high = np.quantile([draw(rng) for _ in range(DRAWS)], [0.025, 0.975])
    return value, float(low), float(high)
