"""The gate's calibration on the held-out share of the situations: its two judges' weights and, for each kind of request, an offset.

The offsets put one threshold, 0.5, where each kind has its stated rate of false positives among held-out harmless requests, most of
which were written to look dangerous: on plain ones the rate is far lower.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression

from runs.packaged.rows import Case
from vlmguard.rewriter.gate import is_foreign

SEEDS, RANK, EPOCHS = 2, 16, 2.5
FALSE_POSITIVE_RATES = {"text": 0.125, "foreign": 0.20, "photo": 0.05, "words": 0.38}
THRESHOLD = 0.5
DOUBT = -3.5  # of the networks' logit: no flagged risky held-out case lies below


@dataclass(frozen=True)
class Calibration:
    weights: tuple[float, ...]
    offsets: dict[str, float]
    expected: tuple[float, float]
    recall: dict[str, float]
    plain_false_positives: float


def kind(case: Case) -> str:
    if not case.pictures:
        return "foreign" if is_foreign(case.text) else "text"
    return "words" if any(key.startswith("drawn") for key in case.pictures) else "photo"


def fit(judged: Sequence[Sequence[float]], cases: Sequence[Case]) -> Calibration:
    """Logistic regression gives the weights; the offsets come from the quantiles of the harmless.

    Args:
        judged: (N, judges) logits.
    """
    every = np.asarray(judged, dtype=float)
    kinds = np.array([kind(case) for case in cases])
    risky = np.array([case.risk for case in cases])
    plain = np.array([not case.risk and "natural" in case.tags for case in cases])
    model = LogisticRegression(C=10.0, class_weight="balanced", max_iter=1000).fit(every, risky)
    raw = every @ model.coef_[0]
    limits = {
        name: float(np.quantile(raw[(kinds == name) & ~risky], 1 - rate)) for name, rate in FALSE_POSITIVE_RATES.items()
    }
    flagged = raw >= np.array([limits[name] for name in kinds])
    return Calibration(
        tuple(model.coef_[0].tolist()),
        {name: -limit for name, limit in limits.items()},
        tuple(np.polyfit(every[:, 0], every[:, 1], 1).tolist()),
        {name: round(float(flagged[(kinds == name) & risky].mean()), 3) for name in limits},
        round(float(flagged[plain].mean()), 4),
    )
