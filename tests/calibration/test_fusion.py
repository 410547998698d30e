"""Catches weights that are no logistic regression, and a signal without variance that breaks or moves the others."""

from __future__ import annotations

import numpy as np
import pytest

from capfilt.calibration.fusion import Fusion, fuse
from capfilt.errors import UserError


def signals(count=400, wrong=0.7, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.random(count) >= wrong
    values = np.stack([labels + rng.normal(size=count), 30 + 5 * rng.normal(size=count)], axis=1)
    return np.column_stack([values, values[:, 0] / 2 + rng.normal(size=count)]), labels


def test_weights_are_scikit_learns():
    linear = pytest.importorskip("sklearn.linear_model")
    values, labels = signals()
    made = fuse("abc", values, labels)
    z = (values - values.mean(0)) / values.std(0)
    reference = linear.LogisticRegression(C=1.0, class_weight="balanced", tol=1e-10, max_iter=1000)
    reference.fit(z, labels)
    assert made.weights == pytest.approx(reference.coef_[0], abs=1e-5)
    assert made.intercept == pytest.approx(reference.intercept_[0], abs=1e-5)
    assert made(values) == pytest.approx(reference.decision_function(z), abs=1e-4)


def test_a_constant_signal_weighs_nothing_and_changes_nothing():
    values, labels = signals()
    alone = fuse("abc", values, labels)
    more = fuse("abcd", np.column_stack([values, np.full(len(labels), 7.0)]), labels)
    assert more.weights[3] == 0
    assert more.weights[:3] == pytest.approx(alone.weights)
    assert more(np.append(values[0], 99.0)[None]) == pytest.approx(alone(values[:1]))


def test_it_comes_back_from_plain_numbers_and_damage_is_named():
    values, labels = signals()
    made = fuse("abc", values, labels)
    assert Fusion.from_dict(made.as_dict()) == made
    with pytest.raises(UserError, match="calibrate again"):
        Fusion.from_dict({**made.as_dict(), "other": 1})
