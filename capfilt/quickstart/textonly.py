"""How well true texts can be told from false ones without seeing any picture: the world must leak nothing by words.

A hashed bag of words and word pairs under logistic regression, cross-validated. Not a scorer of the project:
nothing is selected by it.
"""

from __future__ import annotations

import itertools
import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BUCKETS = 1 << 14
_FOLDS = 5
_STEPS = 120
_PENALTY = 1e-3


def text_only_auc(texts: Sequence[str], labels: Sequence[bool], seed: int = 0) -> float:
    """ROC-AUC of a text-only classifier over five held-out folds: 0.5 where words tell nothing, 1.0 where all.

    Each fold's scores are ranked within the fold (models of different folds do not share a scale) and the
    folds' areas are averaged. Raises ValueError for fewer than 10 texts of either label, or lengths that
    differ.
    """
    truth = np.asarray(labels, dtype=bool)
    if len(texts) != len(truth):
        raise ValueError(f"{len(texts)} texts but {len(truth)} labels")
    if min(int(truth.sum()), int((~truth).sum())) < 2 * _FOLDS:
        raise ValueError(f"a text-only check needs at least {2 * _FOLDS} true and {2 * _FOLDS} false texts")
    features, weights = _features(texts)
    rng = np.random.default_rng(seed)
    fold = np.empty(len(truth), dtype=np.int64)
    for label in (True, False):
        members = rng.permutation(np.flatnonzero(truth == label))
        fold[members] = np.arange(len(members)) % _FOLDS
    areas = []
    for held_out in range(_FOLDS):
        train, test = fold != held_out, fold == held_out
        coefficients = _fit(features[train], weights[train], truth[train])
        areas.append(roc_auc((coefficients[features[test]] * weights[test]).sum(1), truth[test]))
    return float(np.mean(areas))


def roc_auc(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the share of (true, false) pairs that the scores order rightly, ties counting half."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    middle_rank = np.cumsum(counts) - (counts - 1) / 2
    positives = int(labels.sum())
    negatives = len(labels) - positives
    above = float(middle_rank[inverse][labels].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)


def _features(texts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Hash buckets of each text's words and word pairs, int64 [N, F]; their weights, float64 [N, F], 0 for padding."""
    rows = []
    for text in texts:
        words = ["<", *re.findall(r"\w+|[^\w\s]", text.lower()), ">"]
        pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
        rows.append(sorted({zlib.crc32(feature.encode()) % _BUCKETS for feature in [*words, *pairs]}))
    width = max(len(row) for row in rows)
    features = np.zeros((len(rows), width), dtype=np.int64)
    weights = np.zeros((len(rows), width))
    for i, row in enumerate(rows):
        features[i, : len(row)] = row
        weights[i, : len(row)] = 1.0
    return features, weights


def _fit(
    features: NDArray[np.int64], weights: NDArray[np.float64], labels: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Coefficients of an L2-penalised logistic regression, float64 [buckets], by Nesterov's accelerated gradient."""
    target = labels.astype(np.float64)
    offset = float(np.log(target.mean() / (1 - target.mean())))
    # A quarter of the largest squared row norm bounds the curvature of the mean logistic loss.
    step = 1.0 / (0.25 * float((weights**2).sum(1).max()) + _PENALTY)
    current = np.zeros(_BUCKETS)
    previous = current
    for k in range(_STEPS):
        ahead = current + (k / (k + 3)) * (current - previous)
        margin = (ahead[features] * weights).sum(1) + offset
        error = 1 / (1 + np.exp(-margin)) - target
        spread = (error[:, None] * weights).ravel()
        gradient = (
            np.bincount(features.ravel(), weights=spread, minlength=_BUCKETS) / len(target) + _PENALTY * ahead
        )
        previous, current = current, ahead - step * gradient
    return current
