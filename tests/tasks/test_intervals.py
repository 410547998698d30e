"""Would catch: captions resampled as if independent, unpaired differences, seeds or block sizes that change an
interval, a headroom share quoted where there is no headroom, percentiles taken at the wrong ends."""

from __future__ import annotations

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
    headroom,
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


def _rates(*shares: float, pictures: int = 320) -> list[np.ndarray]:
    """Hits [pictures] at each share, nested: who hits at a lower share hits at a higher one."""
    return [np.arange(pictures) < share * pictures for share in shares]


def test_headroom_by_hand():
    # raw 2/8, human only 4/8, oracle 8/8, curated 6/8: half of the way from human only to the oracle.
    names = ("raw", "human", "curated", "oracle")
    rows = {name: [hits] for name, hits in zip(names, _rates(0.25, 0.5, 0.75, 1.0), strict=True)}
    found = headroom(rows, [range(320)], ["raw", "human"])
    half = found["curated"]
    assert half.value == pytest.approx(0.5)
    assert half.baseline == "human"
    assert half.gap == pytest.approx(0.5)
    # The gap is the share of pictures that only the oracle gets: a binomial one.
    assert half.separation == pytest.approx(0.5 / math.sqrt(0.25 / 320), rel=0.1)
    assert 0.35 < half.low < 0.5 < half.high < 0.65
    assert found["raw"].value == pytest.approx(-0.5)


def test_headroom_agrees_with_a_plain_loop_over_drawn_pictures():
    # Texts in an order of their own: rows, seeds and both terms must still meet the same draws of pictures.
    rng = np.random.default_rng(0)
    pictures = [f"p{n}" for n in range(30)]
    of_text = [pictures[n] for n in rng.permutation(np.repeat(np.arange(30), 3))]
    chance = {"raw": 0.1, "mix": 0.2, "x": 0.5, "oracle": 0.9}
    rows = {
        name: [rng.random((2, 30)) < share, rng.random((3, 90)) < share] for name, share in chance.items()
    }
    found = headroom(rows, [pictures, of_text], ["raw", "mix"], resamples=300, seed=4)
    shares, gaps = [], []
    for counts in np.concatenate(list(resample_counts(30, 300, 4))):
        figure = {}
        for name, (images, texts) in rows.items():
            weight = np.array([counts[pictures.index(picture)] for picture in of_text])
            figure[name] = np.average(images.mean(0), weights=counts) + np.average(
                texts.mean(0), weights=weight
            )
        best = max(figure["raw"], figure["mix"])
        gaps.append(figure["oracle"] - best)
        shares.append((figure["x"] - best) / gaps[-1])
    assert (found["x"].low, found["x"].high) == pytest.approx(tuple(np.quantile(shares, [0.025, 0.975])))
    assert found["x"].separation == pytest.approx(found["x"].gap / np.std(gaps, ddof=1))


@given(st.integers(0, 2**31), st.integers(1, 3), st.floats(-5, 5), st.floats(0.01, 100))
@settings(max_examples=25, deadline=None)
def test_headroom_is_of_the_rows_differences_alone(seed, seeds, added, scale):
    # One constant more in all rows, or another unit, changes no share; the ends of the scale are exact.
    rng = np.random.default_rng(seed)
    texts = np.repeat(np.arange(60), 2)
    means = {"raw": 0.1, "human": 0.2, "x": 0.4, "oracle": 0.8}
    rows = {
        name: [rng.normal(mean, 0.2, (seeds, 60)), rng.normal(mean, 0.2, (seeds, 120))]
        for name, mean in means.items()
    }
    rows |= {"same": rows["oracle"], "again": rows["human"]}
    found = headroom(rows, [range(60), texts], ["raw", "human"], resamples=200)
    moved = {name: [scale * each + added for each in terms] for name, terms in rows.items()}
    after = headroom(moved, [range(60), texts], ["raw", "human"], resamples=200)
    for name in rows:
        one, other = found[name], after[name]
        assert (other.value, other.low, other.high, other.separation) == pytest.approx(
            (one.value, one.low, one.high, one.separation), abs=1e-6, rel=1e-6
        )
    for name in ("oracle", "same"):
        assert (found[name].value, found[name].low, found[name].high) == (1.0, 1.0, 1.0)
    # The best trivial choice is picked in every resample, so its luck can only lower the share.
    assert found[found["x"].baseline].value == found[found["x"].baseline].high == 0.0
    assert found["again"] == found["human"]


@pytest.mark.parametrize(
    ("oracle", "separated"),
    [pytest.param(0.5, False, id="none"), pytest.param(0.3, False, id="negative"),
     pytest.param(0.52, False, id="small"), pytest.param(0.56, True, id="enough")],
)  # fmt: skip
def test_headroom_claims_no_share_of_a_gap_under_three_standard_errors(oracle, separated):
    # 320 nested pictures: a gap of 0.02 (6 pictures) is 2.5 standard errors of itself, 0.06 is 4.5.
    names = ("raw", "x", "oracle")
    rows = {name: [hits] for name, hits in zip(names, _rates(0.5, 0.75, oracle), strict=True)}
    found = headroom(rows, [range(320)], ["raw"])["x"]
    assert (found.separation >= 3) == separated
    assert math.isnan(found.value) == math.isnan(found.low) == math.isnan(found.high) == (not separated)
    assert found.gap == pytest.approx(oracle - 0.5, abs=0.004)


def test_headroom_averages_the_seeds():
    low, high = _rates(0.6, 0.9)
    rows = {"raw": [_rates(0.5)[0]], "oracle": [_rates(1.0)[0]], "x": [np.stack([low, high])]}
    assert headroom(rows, [range(320)], ["raw"])["x"].value == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "pictures", "trivial", "said"),
    [
        ({"raw": [[0.0, 1.0]]}, [[1, 2]], ["raw"], "oracle"),
        ({"oracle": [[0.0, 1.0]]}, [[1, 2]], [], "trivial"),
        ({"raw": [[0.0]], "oracle": [[0.0, 1.0]]}, [[1, 2]], ["raw"], "row raw: term 0"),
        ({"raw": [], "oracle": [[0.0, 1.0]]}, [[1, 2]], ["raw"], "raw has 0 terms"),
        ({"raw": [[0.0, 1.0]] * 2, "oracle": [[0.0, 1.0]] * 2}, [[1, 2], [1, 3]], ["raw"], "term 1"),
        ({"raw": [[0.0, math.nan]], "oracle": [[0.0, 1.0]]}, [[1, 2]], ["raw"], "finite"),
    ],
    ids=["no oracle", "nothing trivial", "shape", "terms", "pictures", "not finite"],
)
def test_headroom_refuses(rows, pictures, trivial, said):
    with pytest.raises(ValueError, match=said):
        headroom(rows, pictures, trivial)


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
