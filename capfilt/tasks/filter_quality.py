"""How good a filter is where the truth of the texts is known: ROC-AUC, what a threshold keeps and drops, agreement with
people's ratings (Kendall tau-c, Spearman).

Not here: how scores become probabilities (`capfilt.calibration`), scoring (`capfilt.inference`), choosing texts (`select`).

Undefined figures (one class only, constant scores) are NaN, as a small or one-sided sample is the data's
fault and not the caller's. A score that is NaN, or arrays of unequal length, raise ValueError: a text that
could not be scored is a counted row with a failure, and belongs in no average.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.calibration.fit import THRESHOLD, check_prior, scored
from capfilt.calibration.ranking import average_ranks, roc_auc
from capfilt.tasks.intervals import (
    LEVEL,
    RESAMPLES,
    Interval,
    group_index,
    percentile_interval,
    resample_counts,
)

Floats = NDArray[np.float64]
Groups = Sequence[Hashable] | NDArray[np.generic] | None


# Separation of true from false texts.


def roc_auc_interval(
    scores: ArrayLike,
    labels: ArrayLike,
    groups: Groups = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """`roc_auc` with a bootstrap interval over `groups` (each text's image; each text by itself when None)."""
    score, label = scored(scores, labels)
    counter = PairCounter(score, label.astype(np.float64))
    index = group_index(groups, len(score))
    replicates = []
    for counts in resample_counts(int(index.max(initial=-1)) + 1, resamples, seed, width=len(score)):
        weights = counts[:, index]
        true = weights @ label.astype(np.float64)
        pairs = true * (weights.sum(axis=1) - true)
        balance = np.full(len(counts), np.nan)
        np.divide(counter.concordance(weights), pairs, out=balance, where=pairs > 0)
        replicates.append(0.5 * (1.0 + balance))
    return percentile_interval(roc_auc(score, label), np.concatenate(replicates), level)


@dataclass(frozen=True)
class AtThreshold:
    """What keeping the texts that score at least `threshold` does; every share in [0, 1], NaN where it has no base.

    `kept_true`: share of the true texts kept (recall). `dropped_false`: share of the false texts dropped.
    `precision`: share of the kept texts that are true. `balanced_accuracy`: mean of the first two. `kept`:
    share of all texts kept.
    """

    threshold: float
    kept: float
    kept_true: float
    dropped_false: float
    precision: float
    balanced_accuracy: float

    @property
    def recall(self) -> float:
        """`kept_true` under its other name."""
        return self.kept_true

    def as_dict(self) -> dict[str, float | None]:
        """The fields, with `recall`, by name, as JSON knows them: NaN becomes null."""
        names = (
            "threshold",
            "kept",
            "kept_true",
            "dropped_false",
            "precision",
            "recall",
            "balanced_accuracy",
        )
        values = {name: float(getattr(self, name)) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


def at_threshold(scores: ArrayLike, labels: ArrayLike, threshold: float = THRESHOLD) -> AtThreshold:
    """Counts at one threshold; a score equal to it is kept."""
    score, label = scored(scores, labels)
    kept = score >= threshold
    true, kept_true = int(label.sum()), int((kept & label).sum())
    false, kept_false = int((~label).sum()), int((kept & ~label).sum())
    recall, rejection = _share(kept_true, true), _share(false - kept_false, false)
    return AtThreshold(
        threshold=float(threshold),
        kept=_share(kept_true + kept_false, len(score)),
        kept_true=recall,
        dropped_false=rejection,
        precision=_share(kept_true, kept_true + kept_false),
        balanced_accuracy=(recall + rejection) / 2,
    )


def balanced_accuracy(scores: ArrayLike, labels: ArrayLike, threshold: float = THRESHOLD) -> float:
    """Mean of the shares of true texts kept and of false texts dropped; 0.5 for a constant filter."""
    return at_threshold(scores, labels, threshold).balanced_accuracy


def operating_curve(
    scores: ArrayLike, labels: ArrayLike, prior: float | None = None, points: int = 101
) -> list[AtThreshold]:
    """What each of up to `points` thresholds would keep and drop, from keeping all to keeping the best only.

    The thresholds are quantiles of the scores, so the curve is dense where the texts are. With `prior`, the
    share of true texts in the corpus the threshold is meant for, `precision` and `kept` are those of that
    corpus, not of this sample.
    """
    score, label = scored(scores, labels)
    if not len(score):
        return []
    if prior is not None:
        check_prior(prior)
    thresholds = np.unique(np.quantile(score, np.linspace(0.0, 1.0, points), method="inverted_cdf"))
    curve = []
    for threshold in thresholds:
        here = at_threshold(score, label, float(threshold))
        if prior is not None:
            right, wrong = prior * here.kept_true, (1 - prior) * (1 - here.dropped_false)
            kept = right + wrong
            here = AtThreshold(
                here.threshold,
                kept,
                here.kept_true,
                here.dropped_false,
                right / kept if kept > 0 else math.nan,
                here.balanced_accuracy,
            )
        curve.append(here)
    return curve


# Agreement with graded human judgement.


def kendall_tau_c(ratings: ArrayLike, scores: ArrayLike) -> float:
    """Stuart's tau-c between ratings [T] and scores [T]: 2 (P - Q) m / (n^2 (m - 1)), in [-1, 1].

    P and Q count the concordant and discordant pairs, m is the smaller number of distinct values. tau-c,
    unlike tau-b, is made for two variables of different granularity: a few ratings against continuous scores
    (Stuart, Biometrika 40, 1953). O(n log n). NaN where either side is constant.
    """
    rating, score = _pair(ratings, scores)
    counter = PairCounter(score, rating)
    return float(counter.tau_c(np.ones((1, len(rating))))[0])


def kendall_tau_c_interval(
    ratings: ArrayLike,
    scores: ArrayLike,
    groups: Groups = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """`kendall_tau_c` with a bootstrap interval over `groups` (each text's image): whole images are resampled."""
    rating, score = _pair(ratings, scores)
    counter = PairCounter(score, rating)
    index = group_index(groups, len(rating))
    draws = resample_counts(int(index.max(initial=-1)) + 1, resamples, seed, width=len(rating))
    replicates = np.concatenate([counter.tau_c(counts[:, index]) for counts in draws])
    return percentile_interval(float(counter.tau_c(np.ones((1, len(rating))))[0]), replicates, level)


def spearman(ratings: ArrayLike, scores: ArrayLike) -> float:
    """Spearman's rho of ratings [T] and scores [T]: Pearson's r of average ranks. NaN where one is constant."""
    rating, score = _pair(ratings, scores)
    if len(rating) < 2:
        return math.nan
    x, y = average_ranks(rating), average_ranks(score)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm > 0 else math.nan


# Shared parts.


class PairCounter:
    """Concordant minus discordant pairs of two variables, for many weightings of the same points.

    A pair counts where both variables differ. Ranks are compared bit by bit from the top: x_j < x_i exactly
    when, at the highest bit where they differ, x_j has 0 and x_i has 1. So for each bit the points are
    grouped by their higher bits, in order of y, and within a group each 1 meets the zeros before it:
    cumulative sums, O(n log distinct(x)) per weighting.
    """

    def __init__(self, y: Floats, x: Floats) -> None:
        self._x = np.unique(x, return_inverse=True)[1]
        self._y = np.unique(y, return_inverse=True)[1]
        self._up = self._levels(ties_ascending=False)
        self._down = self._levels(ties_ascending=True)

    def _levels(self, ties_ascending: bool) -> list[tuple[NDArray[np.int64], Floats, NDArray[np.int64]]]:
        # Points with equal y must not count: among them x runs the way in which no pair is counted.
        x = self._x if ties_ascending else -self._x
        by_y = np.lexsort((x, self._y))
        ranks = self._x[by_y]
        if ties_ascending:
            # Discordant pairs are the concordant ones of the reversed ranks.
            ranks = int(ranks.max(initial=0)) - ranks
        levels = []
        for bit in range(int(ranks.max(initial=0)).bit_length()):
            group = ranks >> (bit + 1)
            order = np.argsort(group, kind="stable")
            ones = ((ranks[order] >> bit) & 1).astype(np.float64)
            first = np.searchsorted(group[order], group[order], side="left")
            levels.append((by_y[order], ones, first))
        return levels

    def concordance(self, weights: Floats) -> Floats:
        """P - Q for each row of weights [R, n]: float64 [R]."""
        return self._count(weights, self._up) - self._count(weights, self._down)

    @staticmethod
    def _count(
        weights: Floats, levels: Sequence[tuple[NDArray[np.int64], Floats, NDArray[np.int64]]]
    ) -> Floats:
        total = np.zeros(len(weights))
        for order, ones, first in levels:
            here = weights[:, order]
            zeros = np.zeros((len(weights), len(order) + 1))
            np.cumsum(here * (1.0 - ones), axis=1, out=zeros[:, 1:])
            total += np.einsum("rn,rn->r", here * ones, zeros[:, 1:] - zeros[:, first])
        return total

    def tau_c(self, weights: Floats) -> Floats:
        """Kendall's tau-c for each row of weights [R, n]: float64 [R], NaN where either variable is constant."""
        n = weights.sum(axis=1)
        m = np.minimum(_distinct(self._x, weights), _distinct(self._y, weights)).astype(np.float64)
        tau = np.full(len(weights), np.nan)
        np.divide(2.0 * m * self.concordance(weights), n**2 * (m - 1), out=tau, where=m > 1)
        return tau


def _distinct(ranks: NDArray[np.int64], weights: Floats) -> NDArray[np.int64]:
    """How many different values have weight, in each row of weights [R, n]."""
    if not len(ranks):
        return np.zeros(len(weights), dtype=np.int64)
    order = np.argsort(ranks, kind="stable")
    starts = np.flatnonzero(np.diff(ranks[order], prepend=-1))
    present = np.add.reduceat(weights[:, order], starts, axis=1) > 0
    return np.asarray(present.sum(axis=1), dtype=np.int64)


def _pair(ratings: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    rating, score = np.asarray(ratings, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if rating.shape != score.shape or rating.ndim != 1:
        raise ValueError(f"{rating.shape} ratings for {score.shape} scores")
    if np.isnan(rating).any() or np.isnan(score).any():
        raise ValueError("a rating or a score is NaN; count it as a failure, do not correlate it")
    return rating, score


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
