"""Signals of pairs whose truth is known, and of a corpus whose truth is not: one score, probabilities, the share of true pairs.

Everything is numpy and told apart by image: a pair's score comes from a fusion that saw no pair of the same picture.
Not here: the parts that they are read from (`capfilt.stages.calibrate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from capfilt.calibration.fit import Calibration, calibrate, class_weights, reliability
from capfilt.calibration.fusion import Fusion, fuse
from capfilt.calibration.ranking import roc_auc
from capfilt.calibration.share import cut, em_share, posterior, upper_bound

LEVEL = 0.95
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
FOLDS = 5
"""The calibration pairs are told by fits that saw none of the picture, or a curve that bends to each would look faultless."""
MOST_RESAMPLED = 20_000
"""Texts that the bootstrap looks at: enough for an interval, few enough for hundreds of draws."""

Floats = npt.NDArray[np.float64]
Method = Literal["platt", "isotonic"]


@dataclass(frozen=True)
class Known:
    """Pairs whose truth is known.

    Attributes:
        owners: each pair's image_id [P].
        values: its signals float64 [P, S].
        own: whether the text is the picture's own, bool [P].
        near: whether the text is one of a picture that is like this one, bool [P]. Such pairs teach the fusion which signals
            tell a near miss. Probabilities and shares are of the other pairs: a corpus whose wrong texts are all near misses
            would have other ones.
    """

    owners: npt.NDArray[np.str_]
    values: Floats
    own: npt.NDArray[np.bool_]
    near: npt.NDArray[np.bool_]

    @cached_property
    def folds(self) -> npt.NDArray[np.int64]:
        """A fold per pair, by its image."""
        _, image = np.unique(self.owners, return_inverse=True)
        found: npt.NDArray[np.int64] = (
            np.random.default_rng(0).permutation(int(image.max()) + 1)[image] % FOLDS
        )
        return found

    def __getitem__(self, rows: npt.NDArray[np.bool_]) -> Known:
        return Known(self.owners[rows], self.values[rows], self.own[rows], self.near[rows])


@dataclass(frozen=True)
class Judgement:
    """Signals to probabilities.

    Attributes:
        fusion: signals to one score.
        fit: scores to probabilities where half of the pairs are true.
        share: of true pairs in the corpus.
    """

    fusion: Fusion
    fit: Calibration
    share: float

    def scores(self, values: Floats) -> Floats:
        """float64 [T] of signals [T, S]."""
        return self.fusion(values)

    def ratios(self, values: Floats) -> Floats:
        """Log-likelihood ratios float64 [T]."""
        return ratios_of(self.fit, self.fusion(values))

    def probabilities(self, values: Floats) -> Floats:
        """float64 [T], in a corpus with this share of true pairs."""
        return posterior(self.ratios(values), self.share)

    def as_dict(self) -> dict[str, Any]:
        """Plain lists and numbers; `from_dict` reads them back."""
        return {"fusion": self.fusion.as_dict(), "fit": self.fit.as_dict(), "share": self.share}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Judgement:
        """Raises UserError where a field is missing or unknown."""
        return cls(
            Fusion.from_dict(plain["fusion"]), Calibration.from_dict(plain["fit"]), float(plain["share"])
        )


def judged(
    names: Sequence[str],
    known: Known,
    corpus: Floats,
    images: Sequence[str],
    *,
    method: Method = "platt",
    seed: int = 0,
    resamples: int = 200,
) -> tuple[Judgement, dict[str, Any]]:
    """The judgement of a corpus, signals [T, S] of texts of `images` [T], and figures of it in plain numbers.

    Keys of the figures: share_interval (of LEVEL; calibration images and images of the corpus are drawn again, and the scores
    are fitted anew), share_bound, share_near (with near texts as the wrong ones), curve and error (of pairs told apart, at the
    corpus's share), cuts, auc and auc_near (of pairs told apart), and by name of a signal, `signals`: auc, auc_near, and
    weight in the fusion, per standard deviation.
    """
    scores = told(names, known)
    uniform = ~known.near
    fit = calibrate(scores[uniform], known.own[uniform], 0.5, method=method, link="identity")
    fusion = fuse(names, known.values, known.own)
    found = fusion(corpus)
    ratios = ratios_of(fit, found)
    share = em_share(ratios)
    made = Judgement(fusion, fit, share)
    one = _Scored(known.owners[uniform], scores[uniform], known.own[uniform])
    told_p = told_apart(one, known.folds[uniform], share, method)
    curve, error = reliability(told_p, one.own, class_weights(one.own, _within(share)))
    # The share with near texts as the wrong ones: other than the share above, as far as the corpus's own noise is near.
    by_near = known.own | known.near
    near_fit = calibrate(scores[by_near], known.own[by_near], 0.5, method=method, link="identity")
    figures = {
        "share_interval": _interval(one, found, images, method, seed, resamples),
        "share_bound": upper_bound(
            found, scores[known.own], (len(set(images)), len(set(known.owners))), LEVEL
        ),
        "share_near": em_share(ratios_of(near_fit, found)),
        "curve": [vars(point) for point in curve],
        "error": error,
        "cuts": [_plain(vars(cut(posterior(ratios, share), threshold))) for threshold in THRESHOLDS],
        **_areas(scores, known),
        "signals": {
            name: {**_areas(known.values[:, place], known), "weight": fusion.weights[place]}
            for place, name in enumerate(names)
        },
    }
    return made, figures


def judged_synthetic(
    names: Sequence[str], known: Known, *, method: Method = "platt"
) -> tuple[Judgement, dict[str, Any]]:
    """The judgement of texts that a captioner wrote, and figures of it in plain numbers: auc, auc_near, curve and
    error.

    `known` are such texts: own ones of their pictures, those of other pictures, and near ones with one word changed. Some own
    ones are wrong too, so no share of true ones can be estimated. A probability is that of an own text against one with a word
    changed, at even odds. On the quickstart's world it was off by 0.05 (expected calibration error against the truth), and
    by 0.13 where texts of other pictures were among the wrong ones (docs/calibration.md).
    """
    by_near = known.own | known.near
    scores = told(names, known, by_near)
    near = known[by_near]
    fit = calibrate(scores[by_near], near.own, 0.5, method=method, link="identity")
    made = Judgement(fuse(names, near.values, near.own), fit, 0.5)
    one = _Scored(near.owners, scores[by_near], near.own)
    told_p = told_apart(one, known.folds[by_near], 0.5, method)
    curve, error = reliability(told_p, near.own, class_weights(near.own, 0.5))
    return made, {**_areas(scores, known), "curve": [vars(point) for point in curve], "error": error}


def told(names: Sequence[str], known: Known, taught: npt.NDArray[np.bool_] | None = None) -> Floats:
    """The score of every pair, by a fusion that saw no pair of the same picture, and none but those `taught`."""
    out = np.empty(len(known.own))
    for number in range(FOLDS):
        rest = known.folds != number
        part = known[rest if taught is None else rest & taught]
        out[~rest] = fuse(names, part.values, part.own)(known.values[~rest])
    return out


@dataclass(frozen=True)
class _Scored:
    owners: npt.NDArray[np.str_]
    scores: Floats
    own: npt.NDArray[np.bool_]


def told_apart(pairs: _Scored, folds: npt.NDArray[np.int64], share: float, method: Method) -> Floats:
    """Probabilities [P] of pairs in a corpus with this share of true ones, by fits that saw no pair of the same picture."""
    out = np.empty(len(pairs.scores))
    for number in range(FOLDS):
        rest = folds != number
        fit = calibrate(pairs.scores[rest], pairs.own[rest], 0.5, method=method, link="identity")
        out[~rest] = posterior(ratios_of(fit, pairs.scores[~rest]), share)
    return out


def ratios_of(fit: Calibration, scores: Floats) -> Floats:
    """Log-likelihood ratios of scores [T], by a fit where half of the pairs are true; NaN stays NaN."""
    if fit.method == "platt":
        slope, intercept = fit.values
        return slope * scores + intercept
    edge = 1 / (fit.pairs + 2)
    p = np.clip(fit(scores), edge, 1 - edge)
    return np.log(p) - np.log1p(-p)


def _interval(
    pairs: _Scored, found: Floats, images: Sequence[str], method: Method, seed: int, resamples: int
) -> list[float]:
    rng = np.random.default_rng([seed, 1])
    keep = slice(None) if len(images) <= MOST_RESAMPLED else rng.permutation(len(images))[:MOST_RESAMPLED]
    owners = np.unique(pairs.owners, return_inverse=True)[1]
    groups = np.unique(np.asarray(images)[keep], return_inverse=True)[1]
    shares = []
    for _ in range(resamples):
        drawn = np.repeat(np.arange(len(owners)), _drawn(rng, owners)[owners])
        own = pairs.own[drawn]
        if own.all() or not own.any():
            continue
        fit = calibrate(pairs.scores[drawn], own, 0.5, method=method, link="identity")
        shares.append(em_share(ratios_of(fit, found[keep]), _drawn(rng, groups)[groups]))
    low, high = np.quantile(shares, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return [float(low), float(high)]


def _drawn(rng: np.random.Generator, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    count = int(groups.max()) + 1
    return np.bincount(rng.integers(count, size=count), minlength=count)


def _areas(scores: Floats, known: Known) -> dict[str, float]:
    """ROC-AUC against uniform texts and against near ones."""
    of_near = known.own | known.near
    found = {"auc": roc_auc(scores[~known.near], known.own[~known.near])}
    return found | {"auc_near": roc_auc(scores[of_near], known.own[of_near])}


def _within(share: float) -> float:
    return min(max(share, 1e-3), 1 - 1e-3)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
