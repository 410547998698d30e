"""Catches probabilities of a captioner's texts that are sure only because texts of other pictures are far off."""

from __future__ import annotations

import numpy as np
import pytest

from capfilt.calibration.fit import sigmoid
from capfilt.calibration.judgement import Known, judged_synthetic


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_a_probability_is_of_an_own_text_against_a_changed_one_at_even_odds(method):
    rng = np.random.default_rng(0)
    count = 2000
    own, changed, other = rng.normal(1, 1, count), rng.normal(0, 1, count), rng.normal(-3, 1, 4 * count)
    images = np.array([str(n) for n in range(count)])
    known = Known(
        np.concatenate([images, images, np.repeat(images, 4)]),
        np.concatenate([own, changed, other])[:, None],
        np.arange(6 * count) < count,
        (np.arange(6 * count) >= count) & (np.arange(6 * count) < 2 * count),
    )
    made, figures = judged_synthetic(["cosine"], known, method=method)
    asked = np.linspace(-0.5, 1.5, 9)
    # Two normals of one deviation, a unit apart: the log-odds are x - 1/2.
    assert made.probabilities(asked[:, None]) == pytest.approx(sigmoid(asked - 0.5), abs=0.06)
    assert figures["auc"] > 0.98
    assert figures["auc_near"] == pytest.approx(0.76, abs=0.02)  # Phi(1 / sqrt 2)
    assert figures["error"] < 0.03
