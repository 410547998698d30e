"""Would catch: ties counted as wins, a threshold that drops the score equal to it, tau-b in place of tau-c, a
bootstrap whose weighted pair counts differ from really drawn pairs."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.tasks.filter_quality import (
    at_threshold,
    average_ranks,
    balanced_accuracy,
    kendall_tau_c,
    kendall_tau_c_interval,
    operating_curve,
    roc_auc,
    roc_auc_interval,
    spearman,
)
from capfilt.tasks.intervals import resample_counts

# Few values, so that ties abound.
coarse = st.integers(-3, 3).map(lambda n: n / 4)
pairs = st.lists(st.tuples(coarse, st.booleans()), min_size=2, max_size=60)
graded = st.lists(st.tuples(st.integers(1, 4), st.one_of(coarse, st.floats(-1, 1))), min_size=2, max_size=60)


def brute_pairs(x, y):
    """Concordant minus discordant pairs, one by one."""
    return sum(np.sign(x[i] - x[j]) * np.sign(y[i] - y[j]) for i in range(len(x)) for j in range(i))


def test_roc_auc_by_hand():
    assert roc_auc([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1]) == 0.75
    assert roc_auc([1, 2, 3], [0, 1, 1]) == 1.0
    assert roc_auc([3, 2, 1], [0, 1, 1]) == 0.0
    assert roc_auc([5, 5, 5, 5], [0, 1, 0, 1]) == 0.5
    assert math.isnan(roc_auc([1, 2], [1, 1]))


@given(pairs)
@settings(max_examples=100, deadline=None)
def test_roc_auc_is_the_share_of_pairs_won(rows):
    scores, labels = zip(*rows, strict=True)
    true = [s for s, label in rows if label]
    false = [s for s, label in rows if not label]
    found = roc_auc(scores, labels)
    if not true or not false:
        assert math.isnan(found)
        return
    wins = sum((t > f) + 0.5 * (t == f) for t in true for f in false)
    assert found == pytest.approx(wins / (len(true) * len(false)))
    assert roc_auc([-s for s in scores], labels) == pytest.approx(1 - found)
    assert roc_auc(np.exp(scores), labels) == pytest.approx(found)


def test_against_scikit_learn_and_scipy_on_ties():
    metrics = pytest.importorskip("sklearn.metrics")
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(40):
        n = int(rng.integers(4, 400))
        labels = rng.random(n) < 0.4
        labels[:2] = [True, False]
        scores = np.round(rng.normal(labels, 1.5), int(rng.integers(0, 4)))
        ratings = rng.integers(1, 5, n) / 3
        ratings[:2] = [0.1, 9]
        scores[:2] = [-9, 9]
        assert roc_auc(scores, labels) == pytest.approx(metrics.roc_auc_score(labels, scores))
        kept = scores >= 0.5
        assert balanced_accuracy(scores, labels) == pytest.approx(
            metrics.balanced_accuracy_score(labels, kept)
        )
        here = at_threshold(scores, labels)
        assert here.precision == pytest.approx(metrics.precision_score(labels, kept))
        assert here.recall == pytest.approx(metrics.recall_score(labels, kept))
        tau = stats.kendalltau(ratings, scores, variant="c").statistic
        assert kendall_tau_c(ratings, scores) == pytest.approx(tau)
        assert spearman(ratings, scores) == pytest.approx(stats.spearmanr(ratings, scores).statistic)
        assert (average_ranks(scores) == stats.rankdata(scores)).all()


def test_kendall_tau_c_of_two_continuous_variables_and_speed():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    x = rng.random(20_000)
    y = x + rng.random(20_000)
    assert kendall_tau_c(x, y) == pytest.approx(stats.kendalltau(x, y, variant="c").statistic)


def test_kendall_tau_c_by_hand():
    # Ratings 1 1 2 2, scores rising: the 4 pairs across ratings agree, m = 2, so 2 * 4 * 2 / (16 * 1) = 1.
    assert kendall_tau_c([1, 1, 2, 2], [0.1, 0.2, 0.3, 0.4]) == 1.0
    assert kendall_tau_c([1, 1, 2, 2], [0.4, 0.3, 0.2, 0.1]) == -1.0
    # One of the four across ratings is tied in score: 3 concordant.
    assert kendall_tau_c([1, 1, 2, 2], [0.1, 0.3, 0.3, 0.4]) == 0.75
    assert math.isnan(kendall_tau_c([1, 1, 1], [0.1, 0.2, 0.3]))
    assert math.isnan(kendall_tau_c([], []))
    assert math.isnan(spearman([1, 1], [0.1, 0.2]))


@given(graded)
@settings(max_examples=100, deadline=None)
def test_kendall_tau_c_is_the_formula_over_all_pairs(rows):
    ratings, scores = zip(*rows, strict=True)
    m = min(len(set(ratings)), len(set(scores)))
    if m < 2:
        assert math.isnan(kendall_tau_c(ratings, scores))
        return
    expected = 2 * m * brute_pairs(ratings, scores) / (len(rows) ** 2 * (m - 1))
    assert kendall_tau_c(ratings, scores) == pytest.approx(expected)
    assert kendall_tau_c(scores, ratings) == pytest.approx(expected)
    assert kendall_tau_c(ratings, [-s for s in scores]) == pytest.approx(-expected)


def test_bootstrap_of_tau_c_and_roc_auc_equals_drawing_the_pairs():
    rng = np.random.default_rng(2)
    images = rng.integers(0, 12, 60)
    ratings = rng.integers(1, 5, 60)
    scores = np.round(ratings + rng.normal(0, 2, 60), 1)
    labels = ratings >= 3
    order = {image: n for n, image in enumerate(dict.fromkeys(images.tolist()))}
    tau, auc = [], []
    for counts in np.concatenate(list(resample_counts(len(order), 80, 7))):
        drawn = np.repeat(np.arange(60), [int(counts[order[image]]) for image in images.tolist()])
        tau.append(kendall_tau_c(ratings[drawn], scores[drawn]))
        auc.append(roc_auc(scores[drawn], labels[drawn]))
    found = kendall_tau_c_interval(ratings, scores, images, resamples=80, seed=7)
    assert found.value == pytest.approx(kendall_tau_c(ratings, scores))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(tau, [0.025, 0.975])))
    found = roc_auc_interval(scores, labels, images, resamples=80, seed=7)
    assert found.value == pytest.approx(roc_auc(scores, labels))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(auc, [0.025, 0.975])))


def test_what_a_threshold_keeps_by_hand():
    scores, labels = [0.2, 0.5, 0.9, 0.5, 0.6, 0.1], [1, 1, 1, 0, 0, 0]
    here = at_threshold(scores, labels, 0.5)
    assert here.kept_true == here.recall == pytest.approx(2 / 3)  # a score equal to the threshold is kept
    assert here.dropped_false == pytest.approx(1 / 3)
    assert here.precision == pytest.approx(2 / 4)
    assert here.kept == pytest.approx(4 / 6)
    assert here.balanced_accuracy == pytest.approx(0.5)
    assert json.dumps(at_threshold([0.1], [1], 0.5).as_dict(), allow_nan=False)
    assert math.isnan(at_threshold([0.1], [1], 0.5).precision)


def test_operating_curve_at_another_prior():
    rng = np.random.default_rng(0)
    labels = np.arange(4000) % 2 == 0
    scores = rng.normal(labels * 2.0)
    curve = operating_curve(scores, labels, prior=0.2, points=21)
    assert curve[0].kept == pytest.approx(1.0)
    assert curve[0].precision == pytest.approx(0.2)
    assert [p.threshold for p in curve] == sorted(p.threshold for p in curve)
    # The same threshold on a corpus that really has one true text in five.
    middle = curve[10]
    corpus = np.concatenate([scores[labels][:500], scores[~labels]])
    truth = np.arange(len(corpus)) < 500
    assert middle.precision == pytest.approx(
        at_threshold(corpus, truth, middle.threshold).precision, abs=0.03
    )
    assert operating_curve([], []) == []


def test_refusals():
    with pytest.raises(ValueError, match="NaN"):
        roc_auc([0.1, math.nan], [0, 1])
    with pytest.raises(ValueError, match="labels"):
        roc_auc([0.1, 0.2], [0, 2])
    with pytest.raises(ValueError, match="scores for"):
        at_threshold([0.1], [0, 1])
    with pytest.raises(ValueError, match="ratings for"):
        spearman([1], [0.1, 0.2])
