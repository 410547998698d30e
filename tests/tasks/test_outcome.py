"""Would catch: a resampled figure that is not the figure of the resampled data, images drawn as if their captions were
independent, numbers that come back from a file changed, and two sets of queries taken for one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from capfilt.tasks.captioning import bleu, bleu_parts
from capfilt.tasks.intervals import resample_counts
from capfilt.tasks.outcome import pack, units, unpack
from tests.refusals import refused


def redrawn(made, counts):
    """The unit rows of one resample, each group's as often as it was drawn."""
    return np.concatenate(
        [np.repeat([row], int(counts[made.groups[row]]), axis=0) for row in range(len(made.groups))]
    ).astype(int)


IMAGES = ["c", "a", "a", "b", "c", "d", "d", "d", "e", "b"]


def reference(statistic, columns):
    first = columns[:, 0]
    if statistic == "mean":
        return 100 * first.mean()
    if statistic == "ratios":
        sums = columns.sum(axis=0)
        return 100 * (sums[0] / sums[1] + sums[2] / sums[3]) / 2
    if statistic == "roc_auc":
        return 100 * roc_auc_score(columns[:, 1], first)
    if statistic == "tau_c":
        return 100 * stats.kendalltau(first, columns[:, 1], variant="c").statistic
    return 100 * stats.spearmanr(first, columns[:, 1]).statistic


@pytest.mark.parametrize("statistic", ["mean", "ratios", "roc_auc", "tau_c", "spearman"])
def test_a_replicate_is_the_figure_of_the_redrawn_images(statistic):
    rng = np.random.default_rng(0)
    count = {"mean": 1, "ratios": 4}.get(statistic, 2)
    columns = [np.round(rng.random(10), 1) for _ in range(count)]
    if statistic == "roc_auc":
        columns[1] = (rng.random(10) < 0.5).astype(float)
    if statistic == "ratios":
        columns[1], columns[3] = np.ones(10), np.ones(10) * 2
    made = units(statistic, columns, IMAGES)
    assert made.value() == pytest.approx(reference(statistic, made.columns))
    drawn = next(resample_counts(5, 40, 3))
    found = made.replicates(40, seed=3)
    compared = 0
    for row, counts in zip(found, drawn, strict=True):
        rows = made.columns[redrawn(made, counts)]
        if statistic == "roc_auc" and len(set(rows[:, 1])) < 2:
            assert np.isnan(row)
            continue
        if statistic in ("tau_c", "spearman") and min(len(set(rows[:, 0])), len(set(rows[:, 1]))) < 2:
            continue
        assert row == pytest.approx(reference(statistic, rows))
        compared += 1
    assert compared > 30


def test_bleu_of_redrawn_images():
    rng = np.random.default_rng(1)
    words = ["a", "dog", "cat", "runs", "sits", "on", "the", "grass", "red"]
    candidates = [list(rng.choice(words, rng.integers(4, 9))) for _ in range(6)]
    references = [[list(rng.choice(words, rng.integers(4, 9))) for _ in range(3)] for _ in range(6)]
    made = units("bleu4", list(bleu_parts(candidates, references).T), list("abcdef"))
    assert made.value() == pytest.approx(bleu(candidates, references)[3])
    drawn = next(resample_counts(6, 20, 5))
    for row, counts in zip(made.replicates(20, seed=5), drawn, strict=True):
        rows = redrawn(made, counts)
        expected = bleu([candidates[r] for r in rows], [references[r] for r in rows])[3]
        assert row == pytest.approx(expected)


def test_an_interval_of_images_is_wider_than_one_of_captions():
    rng = np.random.default_rng(2)
    images = np.repeat(np.arange(60), 5)
    hits = (rng.random(60) < 0.5).astype(float)[images]
    by_image = units("mean", hits, images).interval()
    by_caption = units("mean", hits, np.arange(300)).interval()
    assert by_image.high - by_image.low > 1.7 * (by_caption.high - by_caption.low)


@given(st.lists(st.one_of(st.integers(-300, 70_000), st.floats(allow_infinity=False, width=64)), max_size=20))
@settings(max_examples=100, deadline=None)
def test_numbers_come_back_as_they_were(values):
    assert np.array_equal(unpack(pack(values)), np.array(values, dtype=float), equal_nan=True)


def test_packed_numbers_are_small_and_broken_ones_are_refused():
    assert pack([0, 1, 255]).startswith("|u1:")
    assert pack([0.5, 0.25]).startswith("<f4:")
    assert pack([0.1]).startswith("<f8:")
    assert len(pack(np.arange(25_000) % 2)) < 400
    for broken in ("", "|u1:!!", "<f4:AAAA", "object:AAAA", pack([1.0])[:-6]):
        with refused("numbers"):
            unpack(broken)


def test_queries_are_told_apart_by_images_and_by_order():
    one = units("mean", [1, 0, 1], ["a", "a", "b"])
    assert one.queries == units("mean", [0, 0, 0], ["a", "a", "b"]).queries
    for others in (["a", "b", "b"], ["a", "a", "c"], ["b", "b", "a"], ["a", "a", "b", "b"]):
        assert units("mean", [1] * len(others), others).queries != one.queries
