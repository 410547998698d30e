"""How well scores rank true texts above false ones."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.calibration.fit import scored

Floats = NDArray[np.float64]


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The probability that a true text scores above a false one, ties counting one half.

    scores [T], labels [T] (true = the text belongs to its image). Rank-based (Mann-Whitney U), so exact. NaN
    without both classes.
    """
    score, label = scored(scores, labels)
    true, false = int(label.sum()), int((~label).sum())
    if not true or not false:
        return math.nan
    wins = float(average_ranks(score)[label].sum()) - true * (true + 1) / 2
    return wins / (true * false)


def average_ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs: float64 [T]."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = (last - (counts - 1) / 2)[inverse]
    return mean
