"""Catches a leak check that finds nothing because it cannot learn, or finds something because it saw the answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from capfilt.quickstart.textonly import roc_auc, text_only_auc


def test_roc_auc_counts_pairs_with_ties_as_half():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 6, 60).astype(np.float64)
    labels = rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels] for b in scores[~labels]]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(pairs))
    assert roc_auc(np.array([1.0, 2.0, 3.0]), np.array([False, True, True])) == 1.0


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


def test_it_agrees_with_newton_s_method_on_a_dense_bag():
    """The same features, loss and penalty, solved to the end by other means."""
    rng = np.random.default_rng(4)
    words = np.array([f"word{i}" for i in range(12)])
    weights = dict(zip(words, rng.normal(0, 0.6, 12), strict=True))
    texts = [" ".join(rng.choice(words, 5)) for _ in range(500)]
    odds = np.array([sum(weights[word] for word in text.split()) for text in texts])
    labels = rng.random(500) < 1 / (1 + np.exp(-odds))
    names: dict[str, int] = {}
    for text in texts:
        line = ["<", *text.split(), ">"]
        for feature in [*line, *itertools.pairwise(line)]:
            names.setdefault(feature, len(names))
    bag = np.zeros((500, len(names)))
    for i, text in enumerate(texts):
        line = ["<", *text.split(), ">"]
        bag[i, [names[feature] for feature in [*line, *itertools.pairwise(line)]]] = 1.0
    fold = rng.permutation(500) % 5
    areas = []
    for k in range(5):
        x, y, w = bag[fold != k], labels[fold != k], np.zeros(len(names))
        offset = np.log(y.mean() / (1 - y.mean()))
        for _ in range(15):
            p = 1 / (1 + np.exp(-(x @ w + offset)))
            hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + 1e-3 * np.eye(len(w))
            w -= np.linalg.solve(hessian, x.T @ (p - y) / len(y) + 1e-3 * w)
        areas.append(roc_auc(bag[fold == k] @ w, labels[fold == k]))
    assert text_only_auc(texts, labels) == pytest.approx(np.mean(areas), abs=0.04)


def test_too_little_is_refused():
    with pytest.raises(ValueError, match="at least 10"):
        text_only_auc(["a"] * 30, [True] * 25 + [False] * 5)
    with pytest.raises(ValueError, match="2 texts but 1"):
        text_only_auc(["a", "b"], [True])
