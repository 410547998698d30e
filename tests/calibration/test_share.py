"""Would catch: a noise rate that the sample's balance decides, a bound that does not hold, a precision that is not met."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.calibration.share import calibration_error, cut, em_share, posterior, threshold_for, upper_bound

chances = st.lists(st.integers(0, 10).map(lambda n: n / 10), min_size=1, max_size=30)


def mixture(share, count, seed, apart=2.0):
    """Scores of a corpus with this share of true pairs, which lie `apart` deviations above the others; their truth."""
    rng = np.random.default_rng(seed)
    true = rng.random(count) < share
    return rng.normal(apart * true, 1.0), true


@pytest.mark.parametrize("share", [0.1, 0.4, 0.8])
def test_the_share_of_a_known_mixture_is_found(share):
    found = []
    for seed in range(5):
        scores, true = mixture(share, 4000, seed)
        # The likelihood ratio of two normals of one deviation.
        found.append(em_share(2.0 * scores - 2.0) - true.mean())
    assert np.abs(np.mean(found)) <= 0.01
    assert np.abs(found).max() <= 0.03


def test_one_kind_alone_has_a_share_at_the_end():
    assert em_share([50.0] * 10) == pytest.approx(1.0)
    assert em_share([-50.0] * 10) == pytest.approx(0.0, abs=1e-6)
    assert math.isnan(em_share([]))
    assert posterior([3.0], 1.0).tolist() == [1.0]


def test_weights_are_repeated_texts():
    ratios = np.array([-2.0, 0.5, 3.0])
    assert em_share(ratios, [1, 2, 3]) == pytest.approx(em_share([-2, 0.5, 0.5, 3, 3, 3]), abs=1e-6)


def test_the_bound_holds_as_often_as_it_says():
    held = 0
    for seed in range(200):
        corpus, true = mixture(0.4, 1000, seed)
        positives, _ = mixture(1.0, 300, 1000 + seed)
        held += upper_bound(corpus, positives, (1000, 300)) >= true.mean()
    assert held >= 190
    # And it says something: with many texts that are far apart it is near the share.
    corpus, true = mixture(0.4, 20_000, 0, apart=5.0)
    assert upper_bound(corpus, mixture(1.0, 20_000, 1, apart=5.0)[0], (20_000, 20_000)) < true.mean() + 0.05


def test_a_cut_by_hand():
    found = cut([0.9, 0.7, 0.2, 0.2], 0.5)
    assert (found.kept, found.precision, found.kept_true) == pytest.approx((0.5, 0.8, 0.8))
    assert math.isnan(cut([0.1], 0.5).precision)


@given(chances, st.integers(1, 10).map(lambda n: n / 10))
@settings(max_examples=200, deadline=None)
def test_the_threshold_for_a_precision_is_the_lowest_that_gives_it(values, wanted):
    able = [t for t in sorted(set(values)) if np.mean([v for v in values if v >= t]) >= wanted - 1e-12]
    assert threshold_for(values, wanted) == (able[0] if able else math.inf)


def test_calibration_error_by_hand():
    # Two texts at 0.95 of which one is true: 0.45 off; two at 0.05 of which none is: 0.05 off.
    assert calibration_error([0.95, 0.95, 0.05, 0.05], [1, 0, 0, 0]) == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    p = rng.random(50_000)
    assert calibration_error(p, rng.random(50_000) < p) < 0.01
