"""The gate of a trained rewriter: from which probability of "risky" on a request counts as risky.

Set on rows that nothing was trained on, at a stated rate of false alarms among the harmless ones.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from vlmguard.errors import ImageError, RewriteUnreadable, TargetError
from vlmguard.rewriter.rewriter import DEFAULT_THRESHOLD, Rewriter
from vlmguard.synthesis.sample import Row
from vlmguard.training.rows import Rows

RESAMPLES: Final = 1000
FEW: Final = 20  # harmless rows: from fewer a threshold is a guess, which the card says


@dataclass(frozen=True)
class Calibration:
    """
    Args:
        threshold: see above; DEFAULT_THRESHOLD where no harmless row was held out.
        risky, harmless: how many rows it rests on.
        unreadable: rows whose first token was no verdict; they are in neither.
        auroc: with its bootstrap interval of 95 %; None where a kind lacks.
        recall: of risky rows at the threshold.
    """

    threshold: float
    false_positive_rate: float
    risky: int = 0
    harmless: int = 0
    unreadable: int = 0
    auroc: tuple[float, float, float] | None = None
    recall: float | None = None


async def judged(rewriter: Rewriter, rows: Rows, chosen: Sequence[Row], at_once: int = 8) -> list[float | None]:
    """Each row's probability of risk; None where the rewriter says nothing that can be read."""
    free = asyncio.Semaphore(at_once)

    async def one(row: Row) -> float | None:
        async with free:
            try:
                return (await rewriter.judge(rows.chat(row))).risk
            except (RewriteUnreadable, TargetError, ImageError):
                return None

    return await asyncio.gather(*(one(row) for row in chosen))


def calibrated(risks: Sequence[float | None], labels: Sequence[bool], false_positive_rate: float) -> Calibration:
    """
    Args:
        labels: whether each is risky.
        false_positive_rate: in (0, 1), of harmless rows at or above the threshold, at most.
    """
    known = [(risk, label) for risk, label in zip(risks, labels, strict=True) if risk is not None]
    risky = np.array([risk for risk, label in known if label])
    harmless = np.array([risk for risk, label in known if not label])
    unreadable = len(labels) - len(known)
    if not len(harmless):
        return Calibration(DEFAULT_THRESHOLD, false_positive_rate, len(risky), 0, unreadable)
    threshold = _threshold(harmless, false_positive_rate)
    recall = float((risky >= threshold).mean()) if len(risky) else None
    area = _area(risky, harmless) if len(risky) else None
    return Calibration(threshold, false_positive_rate, len(risky), len(harmless), unreadable, area, recall)


def _threshold(harmless: Any, rate: float) -> float:
    """The least probability that at most `rate` of the harmless rows reach; in (0, 1]."""
    allowed = int(rate * len(harmless) + 1e-9)
    ranked = np.sort(harmless)[::-1]
    highest = ranked[allowed] if allowed < len(ranked) else 0.0
    return float(min(1.0, np.nextafter(highest, 2.0)))


def _area(risky: Any, harmless: Any, seed: int = 0) -> tuple[float, float, float]:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [len(risky), len(harmless)])

    def area(high: Any, low: Any) -> float:
        return float(roc_auc_score(labels, np.concatenate((high, low))))

    drawn = [area(rng.choice(risky, len(risky)), rng.choice(harmless, len(harmless))) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return area(risky, harmless), float(low), float(high)
