"""The share of true pairs in a corpus whose truth nobody knows, from calibrated log-likelihood ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.calibration.fit import sigmoid

Floats = NDArray[np.float64]

ROUNDS = 200


def em_share(ratios: ArrayLike, weights: ArrayLike | None = None) -> float:
    """The share of true pairs among texts with these log-likelihood ratios [T]: the fixed point of "the share is the mean
    posterior" from 0.5 on (Saerens, Latinne and Decaestecker, Neural Computation 14, 2002). NaN without a text.
    """
    ratio = np.asarray(ratios, dtype=np.float64)
    weight = np.ones(len(ratio)) if weights is None else np.asarray(weights, dtype=np.float64)
    if not weight.sum():
        return math.nan
    share = 0.5
    for _ in range(ROUNDS):
        if not 0.0 < share < 1.0:
            break
        new = float(np.average(posterior(ratio, share), weights=weight))
        if abs(new - share) < 1e-9:
            return new
        share = new
    return share


def posterior(ratios: ArrayLike, share: float) -> Floats:
    """Probabilities [T] of texts with these log-likelihood ratios in a corpus with this share of true pairs."""
    if share in (0.0, 1.0):
        return np.full(np.shape(ratios), share)
    return sigmoid(np.asarray(ratios, dtype=np.float64) + math.log(share / (1 - share)))


def upper_bound(
    corpus: ArrayLike, positives: ArrayLike, images: tuple[int, int], level: float = 0.95
) -> float:
    """The most that the share of true pairs can be: the least over thresholds of (corpus above it + e) / (true pairs above it
    - e), where e is the bound of Dvoretzky, Kiefer and Wolfowitz at `level` over the numbers of `images` of the two
    (best bin estimation: Garg et al., NeurIPS 2021, arXiv 2111.00980). 1 where nothing bounds it.
    """
    here, there = np.sort(np.asarray(corpus, np.float64)), np.sort(np.asarray(positives, np.float64))
    slack = [math.sqrt(math.log(2 / (1 - level)) / (2 * max(1, count))) for count in images]
    cuts = np.unique(there)
    above = [1 - np.searchsorted(each, cuts, side="left") / len(each) for each in (here, there)]
    below = above[1] - slack[1]
    bounds = (above[0] + slack[0])[below > 0] / below[below > 0]
    return float(min(1.0, bounds.min(initial=1.0)))


@dataclass(frozen=True)
class Cut:
    """Texts from a probability on: which share of all they are, how many of them are expected to be true, and how many of
    the true ones they are; each in [0, 1], NaN where nothing is kept.
    """

    threshold: float
    kept: float
    precision: float
    kept_true: float


def cut(probabilities: ArrayLike, threshold: float) -> Cut:
    """The expected effect of keeping texts from `threshold` on. No labels: a mean of probabilities is a share."""
    p = np.asarray(probabilities, dtype=np.float64)
    kept = p >= threshold
    total, here = float(p.sum()), float(p[kept].sum())
    count = int(kept.sum())
    return Cut(
        threshold,
        count / len(p) if len(p) else math.nan,
        here / count if count else math.nan,
        here / total if total else math.nan,
    )


def threshold_for(probabilities: ArrayLike, precision: float) -> float:
    """The lowest probability such that the texts from it on have a mean of at least `precision`; infinity where no set has."""
    p = np.sort(np.asarray(probabilities, dtype=np.float64))[::-1]
    if not len(p):
        return math.inf
    means = np.cumsum(p) / np.arange(1, len(p) + 1)
    # Texts of equal probability are kept together.
    last = np.append(p[1:] < p[:-1], True)
    # A sum of tenths may fall short of a mean of 0.6 by its last bit.
    able = np.flatnonzero(last & (means >= precision - 1e-12))
    return float(p[able[-1]]) if len(able) else math.inf


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error in equal bins of [0, 1] (Guo et al., ICML 2017); NaN without a text."""
    p, label = np.asarray(probabilities, np.float64), np.asarray(labels, np.float64)
    if not len(p):
        return math.nan
    which = np.clip((p * bins).astype(np.int64), 0, bins - 1)
    mass = np.bincount(which, minlength=bins)
    gap = np.abs(np.bincount(which, p, bins) - np.bincount(which, label, bins))
    return float(gap[mass > 0].sum() / len(p))
