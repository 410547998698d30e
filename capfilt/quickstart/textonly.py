"""How well true texts can be told from false ones without seeing any picture: the world must leak nothing by words.

A bag of words and word pairs under logistic regression, cross-validated. Not a scorer of the project: nothing is selected
by it.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np

from capfilt.calibration.ranking import roc_auc

_FOLDS = 5
_STEPS = 120
_PENALTY = 1e-3


def text_only_auc(texts: Sequence[str], labels: Sequence[bool], seed: int = 0) -> float:
    """ROC-AUC of a text-only classifier over five held-out folds: 0.5 where words tell nothing, 1.0 where all.

    Each fold's scores are ranked within the fold (models of different folds do not share a scale) and the
    folds' areas are averaged. Raises ValueError for fewer than 10 texts of either label.
    """
    truth = np.asarray(labels, dtype=bool)
    if min(int(truth.sum()), int((~truth).sum())) < 2 * _FOLDS:
        raise ValueError(f"a text-only check needs at least {2 * _FOLDS} true and {2 * _FOLDS} false texts")
    lines = [["<", *re.findall(r"\w+|[^\w\s]", text.lower()), ">"] for text in texts]
    # Dictionaries, not sets: the order of columns decides how sums round.
    found = [dict.fromkeys([*line, *itertools.pairwise(line)]) for line in lines]
    columns = {feature: i for i, feature in enumerate(dict.fromkeys(itertools.chain(*found)))}
    bag = np.array([[feature in row for feature in columns] for row in found], np.float64)
    rng = np.random.default_rng(seed)
    fold = np.empty(len(truth), dtype=np.int64)
    for label in (True, False):
        members = rng.permutation(np.flatnonzero(truth == label))
        fold[members] = np.arange(len(members)) % _FOLDS
    areas = []
    for k in range(_FOLDS):
        x, y = bag[fold != k], truth[fold != k]
        odds = np.log(y.mean() / (1 - y.mean()))
        step = 1 / (0.25 * (x**2).sum(1).max() + _PENALTY)
        current = previous = np.zeros(len(columns))
        for n in range(_STEPS):
            ahead = current + (n / (n + 3)) * (current - previous)
            error = 1 / (1 + np.exp(-(x @ ahead + odds))) - y
            previous, current = current, ahead - step * (x.T @ error / len(y) + _PENALTY * ahead)
        areas.append(roc_auc(bag[fold == k] @ current, truth[fold == k]))
    return float(np.mean(areas))
