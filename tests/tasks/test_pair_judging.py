"""Would catch: a score given to another pair when pairs are sorted by image, equal texts embedded as different ones, ties
counted as right, a threshold tuned on what it is measured on or off by one text, ratings averaged where each should count,
and categories that take each other's examples."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import accuracy_score, roc_auc_score

from capfilt.formats.examples.row import example_rows
from capfilt.tables.contracts import OWN_CAPTION
from capfilt.tasks.outcome import units
from capfilt.tasks.pair_judging import (
    best_threshold,
    judge_choices,
    judge_matches,
    judge_ratings,
    score_pairs,
)
from tests.refusals import failed


class Both:
    """Images and texts are numbers: the cosine is their product, the logit their difference's."""

    def encode_images(self, batch):
        return batch.float().view(len(batch), 1, 1)

    def embed_images(self, tokens):
        return tokens[:, 0]

    def embed_texts(self, texts):
        return torch.tensor([[float(text)] for text in texts])

    def match(self, image_tokens, image_index, texts):
        return self.match_probability(image_tokens, image_index, texts)

    def match_probability(self, image_tokens, image_index, texts):
        assert image_index.tolist() == sorted(image_index.tolist())
        return -(image_tokens[image_index, 0, 0] - torch.tensor([float(text) for text in texts])).abs()


class Cosines:
    encode_images, embed_images, embed_texts = Both.encode_images, Both.embed_images, Both.embed_texts


def test_every_pair_has_its_own_scores():
    rng = np.random.default_rng(0)
    values = torch.tensor([3.0, -1.0, 2.0, 5.0, 0.5])
    index = rng.integers(0, 5, 40).tolist()
    texts = [str(rng.integers(-3, 4)) for _ in range(40)]
    scores = score_pairs(Both(), values.split(2), index, texts, text_batch=3)
    assert list(scores) == ["itm", "itc"]
    for row, (image, text) in enumerate(zip(index, texts, strict=True)):
        assert scores["itc"][row] == float(values[image]) * float(text)
        assert scores["itm"][row] == -abs(float(values[image]) - float(text))
    assert list(score_pairs(Cosines(), values.split(2), index, texts)) == ["itc"]
    with failed("image 7"):
        score_pairs(Both(), values.split(2), [7], ["1"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_no_numbers_end_the_evaluation(value):
    """Catches an accuracy over comparisons with NaN, all of which are false."""
    values = torch.tensor([3.0, value])
    with failed("2 of 3", "finite"):
        score_pairs(Both(), values.split(2), [0, 1, 1], ["1", "2", "3"])


def test_matches_against_scikit_learn():
    rng = np.random.default_rng(1)
    labels = rng.random(200) < 0.4
    scores = {
        "itm": np.round(np.clip(rng.normal(0.4 + 0.2 * labels, 0.2), 0, 1), 2),
        "itc": rng.normal(labels, 1),
    }
    other = rng.random(80) < 0.5
    tuning = ({name: rng.normal(other, 1) for name in scores}, other)
    found = judge_matches(scores, labels, tuning).metrics
    for name, score in scores.items():
        assert found[f"match_auc_{name}"] == pytest.approx(100 * roc_auc_score(labels, score))
        cut = best_threshold(*[tuning[0][name], other])
        assert found[f"match_tuned_{name}"] == pytest.approx(100 * accuracy_score(labels, score >= cut))
    assert found["match_accuracy_itm"] == pytest.approx(100 * accuracy_score(labels, scores["itm"] >= 0.5))
    assert "match_accuracy_itc" not in found, "a cosine has no threshold of its own"
    assert "match_tuned_itm" not in judge_matches(scores, labels).metrics


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_no_threshold_does_better_than_the_best(pairs):
    score, label = np.array([s for s, _ in pairs], float), np.array([t for _, t in pairs])
    chosen = best_threshold(score, label)
    right = [((score >= cut) == label).sum() for cut in (*np.unique(score), np.inf)]
    assert ((score >= chosen) == label).sum() == max(right)


def test_ratings_against_scipy_each_by_itself():
    rng = np.random.default_rng(2)
    ratings = [list(rng.integers(1, 5, size=rng.integers(1, 4)).astype(float)) for _ in range(60)]
    score = rng.normal([np.mean(each) for each in ratings], 1)
    found = judge_ratings({"itc": score}, ratings)
    single = [rating for each in ratings for rating in each]
    repeated = [value for value, each in zip(score, ratings, strict=True) for _ in each]
    means = [np.mean(each) for each in ratings]
    assert found.metrics["tau_c_itc"] == pytest.approx(
        100 * stats.kendalltau(single, repeated, variant="c").statistic
    )
    assert found.metrics["tau_c_mean_itc"] == pytest.approx(
        100 * stats.kendalltau(means, score, variant="c").statistic
    )
    assert found.metrics["spearman_itc"] == pytest.approx(100 * stats.spearmanr(means, score).statistic)


def test_the_real_ratings_without_own_captions(shared_data):
    """Flickr8k-Expert as published: 127 of the pairs here are own captions, and 4,782 with three ratings each remain."""
    task, rows = example_rows(shared_data / "tasks" / "itm_expert" / "data.jsonl")
    kept = [row for row in rows if row.category != OWN_CAPTION]
    assert (task, len(rows), len(kept)) == ("rating", 4909, 4782)
    ratings = [[float(answer) for answer, count in row.answers for _ in range(count)] for row in kept]
    assert {len(each) for each in ratings} == {3}
    noise = np.array([zlib.crc32(row.text.encode()) % 997 / 997 for row in kept])
    scores = 3 * noise + np.mean(ratings, axis=1)
    found = judge_ratings({"itc": scores}, ratings)
    single = np.array(ratings).ravel()
    assert found.columns["tau_c_itc"][0].shape == single.shape == (14346,)
    expected = stats.kendalltau(single, np.repeat(scores, 3), variant="c").statistic
    assert found.metrics["tau_c_itc"] == pytest.approx(100 * expected)


def test_choices_are_lost_by_a_tie_and_counted_by_kind():
    scores = {"itm": np.array([0.9, 0.1, 0.5, 0.5, 0.2, 0.3, 0.8, 0.1, 0.9])}
    right, wrong = [0, 2, 4, 6], [[1], [3], [5], [7, 8]]
    found = judge_choices(scores, wrong, right, ["add", "add", "swap", None])
    assert found.metrics == {
        "choice_itm": 25.0,
        "choice_macro_itm": 25.0,
        "choice_itm_add": 50.0,
        "choice_itm_swap": 0.0,
    }
    assert found.rows["choice_itm_swap"].tolist() == [2]
    assert "choice_macro_itm" not in judge_choices(scores, wrong, right, [None] * 4).metrics


def test_figures_are_what_their_units_say():
    rng = np.random.default_rng(3)
    scores = {"itm": rng.random(30), "itc": rng.normal(size=30)}
    images = [f"image {number}" for number in rng.integers(0, 8, 30)]
    results = [
        judge_matches(scores, rng.random(30) < 0.5),
        judge_ratings(scores, [[1.0, 2.0, float(rng.integers(1, 5))] for _ in range(30)]),
        judge_choices(
            scores,
            [[n] for n in range(1, 30, 2)],
            list(range(0, 30, 2)),
            [("a", "b", "c")[n % 3] for n in range(15)],
        ),
    ]
    for result in results:
        for name, value in result.metrics.items():
            groups = [images[row] for row in result.rows[name]]
            made = units(result.statistics[name], result.columns[name], groups)
            assert made.value() == pytest.approx(value), name
