"""The gate's calibration on the held-out share of the situations: one scale, an offset a kind of request, and the threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from runs.packaged.rows import Case

SEEDS, RANK, EPOCHS = 1, 16, 1.6
KINDS = ("text", "photo", "words")
FALSE_POSITIVE_RATE = 0.02  # of plain harmless questions about photos, held out: what the threshold is set for


@dataclass(frozen=True)
class Calibration:
    scale: float
    offsets: dict[str, float]
    threshold: float
    recall: float
    false_positive_rate: float


def kind(case: Case) -> str:
    if not case.pictures:
        return "text"
    return "words" if any(key.startswith("drawn") for key in case.pictures) else "photo"


def fit(logits: Sequence[float], cases: Sequence[Case]) -> Calibration:
    """Logistic regression of the risk on the mean logit and the kind; the threshold at the stated rate of false positives."""
    raw = np.asarray(logits, dtype=float)
    kinds = np.array([kind(case) for case in cases])
    risky = np.array([case.risk for case in cases])
    design = np.column_stack([raw, *[(kinds == name).astype(float) for name in KINDS]])
    model = LogisticRegression(C=10.0, fit_intercept=False, class_weight="balanced", max_iter=1000).fit(design, risky)
    scale, *offsets = (float(value) for value in model.coef_[0])
    risk = 1 / (1 + np.exp(-(design @ model.coef_[0])))
    plain = np.array([not case.risk and "natural" in case.tags for case in cases])
    threshold = float(np.quantile(risk[plain], 1 - FALSE_POSITIVE_RATE))
    return Calibration(
        scale,
        dict(zip(KINDS, offsets, strict=True)),
        threshold,
        _share(risk[risky] >= threshold),
        _share(risk[~risky] >= threshold),
    )


def _share(hits: NDArray[np.bool_]) -> float:
    return float(hits.mean())
