"""Scores to probabilities: a fit on pairs whose truth is known, and how far its probabilities are from what happened.

Not here: the share of true pairs in a corpus where nobody knows (`share.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import UserError

Floats = NDArray[np.float64]

THRESHOLD = 0.5
_CLIP = 1e-7  # float32 probabilities saturate at 0 and 1, where the logit is not finite


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
        return sigmoid(slope * _linked(score, self.link) + intercept)

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
        return wanted if self.link == "identity" else float(sigmoid(np.asarray(wanted)))

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
    score, label = scored(scores, labels)
    check_prior(prior)
    true = int(label.sum())
    if not 0 < true < len(label):
        raise UserError("calibration: the held-out pairs hold one class only; give true and false texts")
    if link == "logit" and (score.min() < 0.0 or score.max() > 1.0):
        raise UserError("calibration: scores outside [0, 1]; use link 'identity' for cosines and logits")
    weight = class_weights(label, prior)
    knots: tuple[float, ...]
    values: tuple[float, ...]
    if method == "platt":
        knots, values = (), _fit_platt(_linked(score, link), label, weight)
    else:
        knots, values = _fit_isotonic(score, label, weight)
    fit = Calibration(method, link, prior, len(score), knots, values, None, 0.0, ())
    before = reliability(score, label, weight, bins)[1] if link == "logit" else None
    curve, after = reliability(fit(score), label, weight, bins)
    return replace(fit, error_before=before, error_after=after, curve=curve)


def class_weights(label: NDArray[np.bool_], prior: float) -> Floats:
    """Weights [T], of mean 1, by which the share of true texts is `prior`; both classes are there."""
    true = int(label.sum())
    return np.where(label, prior * len(label) / true, (1 - prior) * len(label) / (len(label) - true))


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
        p = sigmoid(design @ beta)
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


def reliability(
    probability: Floats, label: NDArray[np.bool_], weight: Floats, bins: int = 10
) -> tuple[tuple[Bin, ...], float]:
    """The filled ones of equal bins, and the mean distance of predicted from observed, weighted by the bins' shares."""
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


def _linked(score: Floats, link: str) -> Floats:
    if link == "identity":
        return score
    clipped = np.clip(score, _CLIP, 1.0 - _CLIP)
    return np.asarray(np.log(clipped) - np.log1p(-clipped), dtype=np.float64)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x), float64 of the same shape."""
    with np.errstate(invalid="ignore"):  # NaN in, NaN out: a text that could not be scored has no probability
        return np.asarray(np.exp(-np.logaddexp(0.0, -x)), dtype=np.float64)


def check_prior(prior: float) -> None:
    """UserError for a share that is none."""
    if not 0.0 < prior < 1.0:
        raise UserError(f"prior {prior}: the share of true texts must lie between 0 and 1")


def scored(scores: ArrayLike, labels: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    """Scores float64 [T] and labels bool [T]. ValueError for a NaN or unequal lengths."""
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
