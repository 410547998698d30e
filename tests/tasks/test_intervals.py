"""Would catch: captions resampled as if independent, unpaired differences, seeds or block sizes that change an
interval, a headroom share quoted where there is no headroom, percentiles taken at the wrong ends."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.tasks import intervals
from capfilt.tasks.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_means,
    group_index,
    headroom_recovered,
    paired_difference,
    percentile_interval,
    resample_counts,
)


def test_interval_of_a_mean_is_the_normal_one_for_many_queries():
    hits = np.random.default_rng(0).random(4000) < 0.3
    interval = bootstrap_mean(hits, seed=1)
    error = 1.96 * math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits))
    assert interval.value == pytest.approx(hits.mean())
    assert interval.low == pytest.approx(hits.mean() - error, abs=0.1 * error)
    assert interval.high == pytest.approx(hits.mean() + error, abs=0.1 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = [
        not bootstrap_mean(rng.random(80) < 0.5, resamples=400, seed=n).excludes(0.5) for n in range(150)
    ]
    assert 0.89 <= np.mean(covered) <= 0.99


def test_replicates_agree_with_a_plain_loop_over_drawn_images():
    values, groups = np.array([1.0, 0.0, 0.0, 5.0, 2.0]), ["a", "a", "b", "c", "c"]
    _, replicates = bootstrap_means([values], groups, resamples=50, seed=3)
    members = [[0, 1], [2], [3, 4]]
    counts = np.concatenate(list(resample_counts(3, 50, 3)))
    for row, replicate in zip(counts, replicates[:, 0], strict=True):
        drawn = [
            values[i] for image, times in enumerate(row) for _ in range(int(times)) for i in members[image]
        ]
        assert replicate == pytest.approx(np.mean(drawn))


def test_copies_of_a_query_do_not_narrow_the_interval_when_grouped():
    hits = np.random.default_rng(0).random(300) < 0.4
    alone = bootstrap_mean(hits, seed=5)
    copied = np.repeat(hits, 5)
    grouped = bootstrap_mean(copied, np.repeat(np.arange(300), 5), seed=5)
    naive = bootstrap_mean(copied, seed=5)
    assert (grouped.low, grouped.high) == pytest.approx((alone.low, alone.high))
    assert naive.high - naive.low < 0.6 * (grouped.high - grouped.low)


def test_pairing_narrows_a_difference_and_equal_systems_differ_by_exactly_nothing():
    rng = np.random.default_rng(0)
    first = rng.random(500)
    second = first - 0.02 + 0.01 * rng.standard_normal(500)
    paired = paired_difference(first, second, seed=0)
    assert paired.value == pytest.approx((first - second).mean())
    assert paired.excludes(0.0)
    assert paired.high - paired.low < 0.01
    same = paired_difference(first, first.copy())
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    assert not same.excludes(0.0)


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(1, 400))
@settings(max_examples=50, deadline=None)
def test_counts_depend_on_the_seed_alone_and_sum_to_the_units(units, resamples, seed, block):
    whole = np.concatenate(list(resample_counts(units, resamples, seed)))
    before = intervals._BLOCK
    intervals._BLOCK = block
    try:
        pieces = np.concatenate(list(resample_counts(units, resamples, seed, width=7)))
    finally:
        intervals._BLOCK = before
    assert (whole == pieces).all()
    assert (whole.sum(axis=1) == units).all()
    longer = np.concatenate(list(resample_counts(units, resamples + 5, seed)))
    assert (longer[:resamples] == whole).all()


def test_the_seed_decides():
    values = np.arange(50.0)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_percentiles_by_hand():
    interval = percentile_interval(5.0, np.arange(101.0), level=0.9)
    assert (interval.low, interval.high) == pytest.approx((5.0, 95.0))
    with_gaps = percentile_interval(5.0, np.array([math.nan, *np.arange(101.0)]), level=0.9)
    assert (with_gaps.low, with_gaps.high) == pytest.approx((5.0, 95.0))
    assert math.isnan(percentile_interval(5.0, np.array([math.nan])).low)


def test_headroom_by_hand():
    # raw 2/8, human only 4/8, oracle 8/8, curated 6/8: half of the way from human only to the oracle.
    raw = [1, 1, 0, 0, 0, 0, 0, 0]
    human = [1, 1, 1, 1, 0, 0, 0, 0]
    curated = [1, 1, 1, 1, 1, 1, 0, 0]
    oracle = [1] * 8
    found = headroom_recovered(*(np.repeat(x, 40) for x in (curated, raw, human, oracle)))
    assert found.share.value == pytest.approx(0.5)
    assert found.baseline == "human_only"
    assert found.headroom.value == pytest.approx(0.5)
    assert found.certain == 1.0
    assert 0.3 < found.share.low < 0.5 < found.share.high < 0.7


def test_headroom_is_one_at_the_oracle_and_zero_at_the_baseline():
    rng = np.random.default_rng(0)
    raw, human, oracle = rng.random(400) < 0.2, rng.random(400) < 0.3, rng.random(400) < 0.6
    top = headroom_recovered(oracle, raw, human, oracle).share
    assert (top.value, top.low, top.high) == (1.0, 1.0, 1.0)
    bottom = headroom_recovered(human, raw, human, oracle).share
    assert bottom.value == 0.0
    # The better trivial choice is picked in every resample, so its luck can only lower the share.
    assert bottom.high == 0.0


def test_the_baseline_is_the_better_trivial_choice():
    ones, zeros, half = np.ones(10), np.zeros(10), np.tile([0.0, 1.0], 5)
    assert headroom_recovered(ones, half, zeros, ones).baseline == "raw"
    assert headroom_recovered(ones, zeros, half, ones).baseline == "human_only"


def test_without_headroom_no_share_is_claimed():
    rng = np.random.default_rng(0)
    human = rng.random(200) < 0.5
    found = headroom_recovered(rng.random(200) < 0.5, rng.random(200) < 0.2, human, human)
    assert math.isnan(found.share.value)
    assert (found.share.low, found.share.high) == (-math.inf, math.inf)
    assert found.certain == 0.0
    assert json.loads(json.dumps(found.share.as_dict(), allow_nan=False))["value"] is None


def test_groups_are_numbered_by_first_appearance():
    assert group_index(["b", "a", "b"], 3).tolist() == [0, 1, 0]
    assert group_index(np.array([7, 7, 2]), 3).tolist() == [0, 0, 1]
    assert group_index(None, 3).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="2 groups for 3"):
        group_index(["a", "b"], 3)


def test_what_cannot_be_averaged_is_refused():
    with pytest.raises(ValueError, match="not finite"):
        bootstrap_mean([1.0, math.nan])
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="level"):
        bootstrap_mean([1.0, 2.0], level=95)


def test_interval_as_dict_is_json():
    assert Interval(1.0, 0.5, math.inf, 0.95, 10).as_dict() == {
        "value": 1.0,
        "low": 0.5,
        "high": None,
        "level": 0.95,
        "resamples": 10,
    }
