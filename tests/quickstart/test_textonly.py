"""Catches a leak check that finds nothing because it cannot learn, or finds something because it saw the answers."""

from __future__ import annotations

import numpy as np
import pytest

from capfilt.quickstart.textonly import text_only_auc
from capfilt.tasks.filter_quality import roc_auc


def test_a_leak_of_one_word_in_ten_texts_is_found():
    rng = np.random.default_rng(1)
    words = np.array(["red", "green", "blue", "star", "ring", "left", "right"])
    labels = rng.random(1000) < 0.5
    texts = [
        " ".join(rng.choice(words, 6)) + (" indeed" if label and rng.random() < 0.1 else "")
        for label in labels
    ]
    assert text_only_auc(texts, labels) > 0.53
    spelled = [f"{'yes' if label else 'no'} {text}" for label, text in zip(labels, texts, strict=True)]
    assert text_only_auc(spelled, labels) > 0.999


def test_a_leak_in_word_order_alone_is_found():
    rng = np.random.default_rng(2)
    labels = rng.random(600) < 0.5
    texts = ["red star blue ring" if label else "blue star red ring" for label in labels]
    assert text_only_auc(texts, labels) > 0.999


def test_noise_is_noise():
    rng = np.random.default_rng(3)
    words = np.array([f"word{i}" for i in range(40)])
    texts = [" ".join(rng.choice(words, 8)) for _ in range(1500)]
    assert text_only_auc(texts, rng.random(1500) < 0.4) == pytest.approx(0.5, abs=0.06)


def test_it_agrees_with_another_solver_of_the_same_loss():
    """scikit-learn's, with the penalty in its own scale; words alone tell here, so that pairs change little."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(4)
    words = np.array([f"word{i}" for i in range(12)])
    weights = rng.normal(0, 0.6, 12)
    drawn = rng.integers(12, size=(500, 5))
    labels = rng.random(500) < 1 / (1 + np.exp(-weights[drawn].sum(1)))
    bag = np.array([[word in row for word in range(12)] for row in drawn], np.float64)
    fold = rng.permutation(500) % 5
    areas = []
    for k in range(5):
        model = linear_model.LogisticRegression(C=1 / (1e-3 * 400)).fit(bag[fold != k], labels[fold != k])
        areas.append(roc_auc(model.decision_function(bag[fold == k]), labels[fold == k]))
    found = text_only_auc([" ".join(words[row]) for row in drawn], labels)
    assert found == pytest.approx(np.mean(areas), abs=0.04)


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="at least 10"):
        text_only_auc(["a"] * 30, [True] * 25 + [False] * 5)
