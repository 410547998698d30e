"""How good a filter is where the truth of the texts is known, and how its scores become probabilities.

What lives here: ROC-AUC, what a threshold keeps and drops, agreement with human ratings (Kendall tau-c,
Spearman), and calibration on held-out human pairs. What does not: scoring (`capfilt.inference`) and choosing
texts (the `select` stage).

Undefined figures (one class only, constant scores) are NaN, as a small or one-sided sample is the data's
fault and not the caller's. A score that is NaN, or arrays of unequal length, raise ValueError: a text that
could not be scored is a counted row with a failure, and belongs in no average.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import UserError
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

THRESHOLD = 0.5  # BLIP's author: a text is dropped where the ITM head says unmatched, softmax(match) < 0.5
_CLIP = 1e-7  # float32 probabilities saturate at 0 and 1, where the logit is not finite


# Separation of true from false texts.


def roc_auc(scores: ArrayLike, labels: ArrayLike) -> float:
    """The probability that a true text scores above a false one, ties counting one half.

    scores [T], labels [T] (true = the text belongs to its image). Rank-based (Mann-Whitney U), so exact. NaN
    without both classes.
    """
    score, label = _scored(scores, labels)
    true, false = int(label.sum()), int((~label).sum())
    if not true or not false:
        return math.nan
    wins = float(average_ranks(score)[label].sum()) - true * (true + 1) / 2
    return wins / (true * false)


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
    score, label = _scored(scores, labels)
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
    score, label = _scored(scores, labels)
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
    score, label = _scored(scores, labels)
    if not len(score):
        return []
    if prior is not None:
        _check_prior(prior)
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


def average_ranks(values: ArrayLike) -> Floats:
    """Ranks from 1, equal values sharing the mean of theirs: float64 [T]."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: Floats = (last - (counts - 1) / 2)[inverse]
    return mean


# Probabilities from scores.


@dataclass(frozen=True)
class Bin:
    """One point of a reliability curve: texts whose calibrated probability lies in [low, high).

    `predicted` is their mean probability, `observed` the share of true texts among them at the stated prior,
    `count` how many held-out texts they are. A calibrated filter has predicted = observed in every bin.
    """

    low: float
    high: float
    predicted: float
    observed: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """Scores to probabilities of being a match, at a stated prior; call it on scores [T] for float64 [T].

    `knots` and `values` hold the fit: for `platt` (slope, intercept) in `values` and no knots, for `isotonic`
    a rising line through (knots, values), flat beyond its ends. `pairs` is how many it was fitted to, `curve`
    its reliability on them, and `error_before`, `error_after` the expected calibration errors of the scores
    taken for probabilities (None with the identity link, where they are none) and of the fit.
    """

    method: Literal["platt", "isotonic"]
    link: Literal["logit", "identity"]
    prior: float
    pairs: int
    knots: tuple[float, ...]
    values: tuple[float, ...]
    error_before: float | None
    error_after: float
    curve: tuple[Bin, ...] = field(repr=False)

    def __call__(self, scores: ArrayLike) -> Floats:
        """Probabilities float64 [T]; NaN stays NaN."""
        score = np.asarray(scores, dtype=np.float64)
        if self.method == "isotonic":
            out: Floats = np.interp(score, self.knots, self.values)
            return np.where(np.isnan(score), np.nan, out)
        slope, intercept = self.values
        return _sigmoid(slope * _linked(score, self.link) + intercept)

    def score_at(self, probability: float = THRESHOLD) -> float:
        """The lowest score whose probability is at least `probability`, the calibrated threshold; inf without one.

        With the logit link scores are taken to lie in [0, 1], and no answer outside it is given.
        """
        if not 0.0 < probability < 1.0:
            raise ValueError(f"a probability lies between 0 and 1, not {probability}")
        if self.method == "isotonic":
            knots, values = np.asarray(self.knots), np.asarray(self.values)
            above = np.flatnonzero(values >= probability)
            if not len(above):
                return math.inf
            first = int(above[0])
            if first == 0:
                return -math.inf
            low, high = values[first - 1], values[first]
            return float(
                knots[first - 1] + (probability - low) / (high - low) * (knots[first] - knots[first - 1])
            )
        slope, intercept = self.values
        if slope <= 0:
            return math.inf
        wanted = (math.log(probability / (1 - probability)) - intercept) / slope
        return wanted if self.link == "identity" else float(_sigmoid(np.asarray(wanted)))

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers, for a checkpoint's JSON; `from_dict` reads them back."""
        plain = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "curve"}
        plain |= {"knots": list(self.knots), "values": list(self.values)}
        return plain | {"curve": [vars(point).copy() for point in self.curve]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Calibration:
        """Raises UserError where a field is missing or unknown."""
        try:
            fields = dict(plain)
            curve = tuple(Bin(**point) for point in fields.pop("curve"))
            knots, values = tuple(fields.pop("knots")), tuple(fields.pop("values"))
            return cls(curve=curve, knots=knots, values=values, **fields)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"calibration: the stored fit cannot be read ({error}); calibrate again"
            ) from error


def calibrate(
    scores: ArrayLike,
    labels: ArrayLike,
    prior: float,
    *,
    method: Literal["platt", "isotonic"] = "platt",
    link: Literal["logit", "identity"] = "logit",
    bins: int = 10,
) -> Calibration:
    """Fits probabilities to scores [T] of held-out human pairs, labels [T] (true = an image with its own text).

    prior: the share of true texts in the corpus the probabilities are meant for. It has to be stated because
    the held-out sample's share is of one's own making (one false text per true one, say), and ITM is trained
    at one match in three: the two classes are weighted so that the sample has this prior. Pairs the filter
    was trained on give a fit that is far too sure; hold them out by image.

    `platt`: a logistic curve of the linked score with smoothed targets, two parameters (Platt, Advances in
    Large Margin Classifiers, 1999, sec. 2.2). `isotonic`: any rising curve (pool adjacent violators), for
    thousands of pairs. link: `logit` for `itm_score`, which lies in [0, 1]; `identity` for a cosine such as
    `itc_score`.

    Raises UserError for one class only, a prior outside (0, 1), or a score outside [0, 1] with the logit
    link.
    """
    score, label = _scored(scores, labels)
    _check_prior(prior)
    true = int(label.sum())
    if not 0 < true < len(label):
        raise UserError("calibration: the held-out pairs hold one class only; give true and false texts")
    if link == "logit" and (score.min() < 0.0 or score.max() > 1.0):
        raise UserError("calibration: scores outside [0, 1]; use link 'identity' for cosines and logits")
    weight = np.where(label, prior * len(label) / true, (1 - prior) * len(label) / (len(label) - true))
    knots: tuple[float, ...]
    values: tuple[float, ...]
    if method == "platt":
        knots, values = (), _fit_platt(_linked(score, link), label, weight)
    else:
        knots, values = _fit_isotonic(score, label, weight)
    fit = Calibration(method, link, prior, len(score), knots, values, None, 0.0, ())
    before = _reliability(score, label, weight, bins)[1] if link == "logit" else None
    curve, after = _reliability(fit(score), label, weight, bins)
    return replace(fit, error_before=before, error_after=after, curve=curve)


def _fit_platt(x: Floats, label: NDArray[np.bool_], weight: Floats) -> tuple[float, ...]:
    true, false = int(label.sum()), int((~label).sum())
    # Platt 1999, sec. 2.2: targets short of 0 and 1 keep the fit finite where the classes do not overlap.
    target = np.where(label, (true + 1) / (true + 2), 1 / (false + 2))
    # On standardised scores, where one unit of slope means the same for logits and for cosines.
    centre, scale = float(x.mean()), float(x.std()) or 1.0
    z = (x - centre) / scale
    design = np.stack([z, np.ones_like(z)], axis=1)

    def loss(beta: Floats) -> float:
        eta = design @ beta
        return float((weight * (np.logaddexp(0.0, eta) - target * eta)).sum())

    prior = float((weight * target).sum() / weight.sum())
    beta = np.array([0.0, math.log(prior / (1 - prior))])
    current = loss(beta)
    for _ in range(100):
        p = _sigmoid(design @ beta)
        gradient = design.T @ (weight * (p - target))
        curvature = design.T @ (design * (weight * p * (1 - p))[:, None])
        step = np.linalg.solve(curvature + 1e-12 * len(x) * np.eye(2), gradient)
        size = 1.0
        # Newton overshoots where the curve is nearly flat; the loss is convex, so halving finds a descent.
        while (proposed := loss(beta - size * step)) > current and size > 1e-8:
            size /= 2
        beta = beta - size * step
        done = current - proposed <= 1e-12 * (abs(current) + 1.0)
        current = proposed
        if done:
            break
    slope = float(beta[0]) / scale
    return slope, float(beta[1]) - slope * centre


def _fit_isotonic(
    x: Floats, label: NDArray[np.bool_], weight: Floats
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    points, inverse = np.unique(x, return_inverse=True)
    mass = np.bincount(inverse, weights=weight)
    mean = np.bincount(inverse, weights=weight * label) / mass
    # Pool adjacent violators: a stack of blocks (mean, mass, first point, last point) with rising means.
    stack: list[tuple[float, float, int, int]] = []
    for index, (value, heavy) in enumerate(zip(mean.tolist(), mass.tolist(), strict=True)):
        block = (value, heavy, index, index)
        while stack and stack[-1][0] >= block[0]:
            below = stack.pop()
            total = below[1] + block[1]
            block = ((below[0] * below[1] + block[0] * block[1]) / total, total, below[2], block[3])
        stack.append(block)
    knots, values = [], []
    for value, _, first, last in stack:
        for end in dict.fromkeys((first, last)):
            knots.append(float(points[end]))
            values.append(value)
    return tuple(knots), tuple(values)


def _reliability(
    probability: Floats, label: NDArray[np.bool_], weight: Floats, bins: int
) -> tuple[tuple[Bin, ...], float]:
    """The filled bins, and the mean distance of predicted from observed, weighted by the bins' shares."""
    which = np.clip((probability * bins).astype(np.int64), 0, bins - 1)
    curve, error = [], 0.0
    for number in np.unique(which).tolist():
        inside = which == number
        mass = weight[inside]
        total = float(mass.sum())
        predicted = float((mass * probability[inside]).sum()) / total
        observed = float(mass[label[inside]].sum()) / total
        curve.append(Bin(number / bins, (number + 1) / bins, predicted, observed, int(inside.sum())))
        error += total * abs(predicted - observed)
    return tuple(curve), error / float(weight.sum())


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


def _scored(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    score, label = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if label.dtype != np.bool_ and not np.isin(label, (0, 1)).all():
        raise ValueError("labels are true or false, 1 or 0")
    if score.shape != label.shape or score.ndim != 1:
        raise ValueError(f"{score.shape} scores for {label.shape} labels")
    if np.isnan(score).any():
        raise ValueError(
            f"{int(np.isnan(score).sum())} scores are NaN; count them as failures, do not average them"
        )
    return score, label.astype(np.bool_)


def _pair(ratings: ArrayLike, scores: ArrayLike) -> tuple[Floats, Floats]:
    rating, score = np.asarray(ratings, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if rating.shape != score.shape or rating.ndim != 1:
        raise ValueError(f"{rating.shape} ratings for {score.shape} scores")
    if np.isnan(rating).any() or np.isnan(score).any():
        raise ValueError("a rating or a score is NaN; count it as a failure, do not correlate it")
    return rating, score


def _check_prior(prior: float) -> None:
    if not 0.0 < prior < 1.0:
        raise UserError(f"prior {prior}: the share of true texts must lie between 0 and 1")


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _linked(score: Floats, link: str) -> Floats:
    if link == "identity":
        return score
    clipped = np.clip(score, _CLIP, 1.0 - _CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(invalid="ignore"):  # NaN in, NaN out: a text that could not be scored has no probability
        return np.asarray(np.exp(-np.logaddexp(0.0, -x)), dtype=np.float64)
