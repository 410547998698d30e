"""Would catch: probabilities at the sample's prior instead of the stated one, and a fit that a saturated score breaks."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from capfilt.calibration.fit import Calibration, calibrate
from tests.refusals import refused


def test_platt_recovers_a_logistic_curve_and_moves_it_to_the_stated_prior():
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 2, 40_000)
    labels = rng.random(40_000) < 1 / (1 + np.exp(-(0.7 * logit - 0.4)))
    scores = 1 / (1 + np.exp(-logit))
    sample = float(labels.mean())
    fit = calibrate(scores, labels, sample)
    assert fit.values == pytest.approx((0.7, -0.4), abs=0.05)
    assert fit(scores).mean() == pytest.approx(sample, abs=1e-3)
    assert fit.error_after < 0.01 < fit.error_before
    # A prior shifts the log-odds of every text by the difference of the priors' log-odds (Bayes).
    rare = calibrate(scores, labels, 0.1)
    shift = math.log(0.1 / 0.9) - math.log(sample / (1 - sample))
    assert rare.values == pytest.approx((fit.values[0], fit.values[1] + shift), abs=0.03)
    assert rare.score_at(0.5) > fit.score_at(0.5)


@pytest.mark.parametrize("method", ["platt", "isotonic"])
@pytest.mark.parametrize("link", ["logit", "identity"])
def test_probabilities_rise_with_the_score_and_the_threshold_inverts_them(method, link):
    rng = np.random.default_rng(1)
    labels = rng.random(3000) < 0.3
    scores = np.clip(rng.normal(0.3 + 0.3 * labels, 0.2), 0, 1)
    fit = calibrate(scores, labels, 0.4, method=method, link=link)
    grid = fit(np.linspace(0, 1, 500))
    assert (np.diff(grid) >= -1e-12).all()
    assert ((grid >= 0) & (grid <= 1)).all()
    threshold = fit.score_at(0.5)
    assert fit([threshold])[0] == pytest.approx(0.5, abs=1e-6)
    assert fit([threshold - 1e-3])[0] < 0.5
    assert np.isnan(fit([math.nan])[0])
    assert sum(point.count for point in fit.curve) == 3000 == fit.pairs
    weight = np.where(labels, 0.4 / labels.mean(), 0.6 / (1 - labels.mean()))
    assert float((weight * fit(scores)).sum() / weight.sum()) == pytest.approx(0.4, abs=0.01)


def test_platt_against_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    labels = rng.random(2000) < 0.5
    scores = rng.normal(labels * 0.1, 0.2)
    prior = 0.25
    weight = np.where(labels, prior / labels.mean(), (1 - prior) / (1 - labels.mean()))
    model = linear.LogisticRegression(C=np.inf, tol=1e-10).fit(scores[:, None], labels, weight)
    fit = calibrate(scores, labels, prior, link="identity")
    # Platt's smoothed targets are all that differs.
    assert fit.values == pytest.approx((model.coef_[0, 0], model.intercept_[0]), rel=0.02)


def test_isotonic_against_scikit_learn():
    isotonic = pytest.importorskip("sklearn.isotonic")
    rng = np.random.default_rng(4)
    labels = rng.random(500) < 0.5
    scores = np.clip(np.round(rng.normal(0.4 + 0.2 * labels, 0.2), 2), 0, 1)
    weight = np.where(labels, 0.3 / labels.mean(), 0.7 / (1 - labels.mean()))
    reference = isotonic.IsotonicRegression(out_of_bounds="clip").fit(scores, labels, weight)
    fit = calibrate(scores, labels, 0.3, method="isotonic")
    assert fit(scores) == pytest.approx(reference.predict(scores))


def test_separable_and_saturated_scores_stay_finite():
    fit = calibrate([0.0, 0.0, 1.0, 1.0], [0, 0, 1, 1], 0.5)
    assert np.isfinite(fit.values).all()
    assert fit([0.0])[0] < 0.5 < fit([1.0])[0]
    flat = calibrate([0.5] * 10, [0, 1] * 5, 0.2)
    # Five pairs a class: smoothed targets are 6/7 and 1/7, so the mean is 0.2 * 6/7 + 0.8 * 1/7.
    assert flat([0.5])[0] == pytest.approx(2 / 7)
    against = calibrate([0.9, 0.8, 0.2, 0.1], [0, 0, 1, 1], 0.5)
    assert against.score_at(0.5) == math.inf


def test_a_calibration_survives_json():
    rng = np.random.default_rng(0)
    scores = rng.random(200)
    labels = rng.random(200) < scores
    for method in ("platt", "isotonic"):
        fit = calibrate(scores, labels, 0.4, method=method)
        again = Calibration.from_dict(json.loads(json.dumps(fit.as_dict(), allow_nan=False)))
        assert again == fit
    cosine = calibrate(2 * scores - 1, labels, 0.4, link="identity")
    assert Calibration.from_dict(json.loads(json.dumps(cosine.as_dict(), allow_nan=False))) == cosine
    with refused("calibration", "fit"):
        Calibration.from_dict({"method": "platt"})


def test_refusals():
    with refused("one class"):
        calibrate([0.1, 0.2], [1, 1], 0.5)
    with refused("prior 1.0"):
        calibrate([0.1, 0.2], [0, 1], 1.0)
    with refused("identity"):
        calibrate([-0.1, 0.2], [0, 1], 0.5)
