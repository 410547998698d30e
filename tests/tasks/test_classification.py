"""Would catch: a probe that is another problem than scikit-learn's or stops short of its answer, a penalty chosen on the
test images, shots that are held out as well, prompts averaged before they are unit vectors, classes that take each other's
prompts, and ties won by the luck of a sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from capfilt.tasks import classification
from capfilt.tasks.classification import (
    TEMPLATES,
    by_logits,
    class_vectors,
    few_shot,
    logistic_regression,
    zero_shot,
)
from tests.refusals import refused


def clouds(classes=5, each=30, width=12, apart=1.0, seed=0):
    """Features and labels of overlapping classes."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(classes), each)
    features = apart * rng.normal(size=(classes, width))[truth] + rng.normal(size=(len(truth), width))
    return torch.from_numpy(features).float(), [f"class_{place}" for place in truth], truth


@pytest.mark.parametrize("penalty", [1e-4, 1e-2, 1.0, 100.0])
def test_the_probe_is_scikit_learn_s(penalty):
    features, _, truth = clouds()
    probe = logistic_regression(features, torch.from_numpy(truth), 5, penalty)
    theirs = LogisticRegression(C=penalty, tol=1e-10, max_iter=10_000).fit(features.double().numpy(), truth)
    ours = probe(features).softmax(dim=1).numpy()
    assert ours == pytest.approx(theirs.predict_proba(features.double().numpy()), abs=1e-5)
    start = logistic_regression(features, torch.from_numpy(truth), 5, 1.0)
    warm = logistic_regression(features, torch.from_numpy(truth), 5, penalty, start)
    assert warm(features).softmax(dim=1).numpy() == pytest.approx(ours, abs=1e-4)


def test_few_shots_are_what_scikit_learn_makes_of_the_same_draw(monkeypatch):
    monkeypatch.setattr(classification, "PENALTIES", (0.5,))
    features, labels, truth = clouds(seed=1)
    support, support_labels, support_truth = clouds(each=12, seed=1)
    found = few_shot(features, labels, support, support_labels, shots=(1, 4), seeds=2, seed=7)
    for k in (1, 4):
        shares, nearest = [], []
        for draw in range(2):
            rng = np.random.default_rng([7, draw])
            rows = np.concatenate(
                [rng.permutation(np.flatnonzero(support_truth == place))[:k] for place in range(5)]
            )
            x = support.double().numpy()
            mean = x[rows].mean(axis=0)
            scale = np.sqrt(((x[rows] - mean) ** 2).mean())
            model = LogisticRegression(C=0.5, tol=1e-10, max_iter=10_000)
            model.fit((x[rows] - mean) / scale, support_truth[rows])
            shares.append(model.score((features.double().numpy() - mean) / scale, truth))
            unit = x / np.linalg.norm(x, axis=1, keepdims=True)
            centroids = np.stack(
                [unit[rows][support_truth[rows] == place].mean(axis=0) for place in range(5)]
            )
            centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
            nearest.append(((features.double().numpy() @ centroids.T).argmax(axis=1) == truth).mean())
        assert found.metrics[f"probe@{k}"] == pytest.approx(100 * np.mean(shares))
        assert found.metrics[f"class_mean@{k}"] == pytest.approx(100 * np.mean(nearest))
        assert found.spread[f"probe@{k}"] == pytest.approx(100 * np.std(shares, ddof=1))
        assert found.hits[f"probe@{k}"].mean() == pytest.approx(np.mean(shares))
    assert list(found.metrics) == ["probe@1", "probe@4", "class_mean@1", "class_mean@4"]


def test_what_tells_no_class_apart_is_never_right():
    """Features that are all alike leave every class as likely: the first in the alphabet is no answer."""
    labels = ["a", "b"] * 6
    found = few_shot(torch.ones(12, 3), labels, torch.ones(12, 3), labels, shots=(1, 2), seeds=2)
    assert set(found.metrics.values()) == {0.0}


def test_more_shots_help_and_too_many_are_left_out():
    features, labels, _ = clouds(each=60, seed=2)
    support, support_labels, _ = clouds(each=19, seed=2)
    found = few_shot(features, labels, support, support_labels, seeds=2)
    assert found.metrics["probe@8"] > found.metrics["probe@1"] + 5
    assert set(found.left_out) == {"16 shots"}, "16 and 4 to choose the penalty on are more than 19"
    assert all(len(chosen) == 2 for chosen in found.penalties.values())
    again = few_shot(features, labels, support, support_labels, seeds=2)
    assert again.metrics == found.metrics


def test_the_penalty_is_chosen_without_the_test_images_or_the_shots(monkeypatch):
    features, labels, _ = clouds(each=10, seed=3)
    support, support_labels, _ = clouds(each=10, seed=3)
    seen = []
    real = classification._best_probe

    def spy(x, y, held, held_y, classes):
        seen.append((x, held))
        return real(x, y, held, held_y, classes)

    monkeypatch.setattr(classification, "_best_probe", spy)
    first = few_shot(features, labels, support, support_labels, shots=(2, 5), seeds=1)
    for x, held in seen:
        rows = {tuple(np.round(row, 6)) for row in x.numpy()}
        assert not rows & {tuple(np.round(row, 6)) for row in held.numpy()}
    moved = few_shot(features.flip(0), labels, support, support_labels, shots=(2, 5), seeds=1)
    assert moved.penalties == first.penalties


VECTORS = {"dog": (1.0, 0.0, 0.0), "polar": (0.0, 2.0, 0.0), "bear": (0.0, 1.0, 1.0)}


class Speaker:
    """Embeds a text as the mean of its words' vectors, not of unit length, and images as they are."""

    def encode_images(self, batch):
        return batch

    def embed_images(self, tokens):
        return tokens

    def embed_texts(self, texts):
        rows = []
        for text in texts:
            words = [VECTORS.get(word.strip("."), (0.1, 0.1, 0.1 * len(word))) for word in text.split()]
            rows.append(torch.tensor(words).sum(dim=0))
        return torch.stack(rows)


def test_a_class_is_the_mean_of_its_prompts_unit_vectors():
    model, templates = Speaker(), ("a {}.", "the big {} of it")
    vectors = class_vectors(model, ["dog", "polar bear"], templates)
    for row, name in enumerate(("dog", "polar bear")):
        each = [model.embed_texts([template.format(name)])[0].numpy() for template in templates]
        mean = np.mean([one / np.linalg.norm(one) for one in each], axis=0)
        assert vectors[row].numpy() == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_zero_shot_against_counting_by_hand():
    model = Speaker()
    labels = ["dog", "polar_bear", "polar_bear", "dog"]
    images = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0, 0], [0, 1.0, 0.5], [1.0, 0, 0], [0.0, 0.0, 0.0]]), dim=1
    )
    found = zero_shot(model, images, labels, TEMPLATES["single"])
    # The last image is as near to both classes: a tie, and ties are lost.
    assert found.hits["zero_shot_top1"].tolist() == [1, 1, 0, 0]
    assert found.metrics == {"zero_shot_top1": 50.0, "zero_shot_single_top1": 50.0}
    many = [f"{place}" for place in range(8)]
    top = zero_shot(model, torch.eye(3)[[0] * 8], many, ("{}",))
    assert set(top.metrics) == {"zero_shot_top1", "zero_shot_top5", "zero_shot_single_top1"}
    assert top.metrics["zero_shot_top5"] == 0, "a text that says nothing gives every class one score"


def test_templates_are_clip_s_and_bad_ones_are_refused():
    assert len(TEMPLATES["cifar"]) == len(set(TEMPLATES["cifar"])) == 18
    assert {"a photo of a {}.", "a bad photo of the {}.", "a photo of the big {}."} <= set(TEMPLATES["cifar"])
    assert len(TEMPLATES["imagenet"]) == 7
    assert all(template.count("{}") == 1 for each in TEMPLATES.values() for template in each)
    for templates in ((), ("a photo",), ("{} and {}",)):
        with refused("{}"):
            zero_shot(Speaker(), torch.eye(3)[:2], ["dog", "bear"], templates)


def test_classes_that_cannot_be_told_apart_or_learned():
    with refused("1 class"):
        zero_shot(Speaker(), torch.eye(3)[:2], ["dog", "dog"], ("{}",))
    with refused("few-shot", "b"):
        few_shot(torch.eye(2), ["a", "b"], torch.eye(2), ["a", "a"])


def test_logits_rank_their_classes_and_a_tie_or_an_unknown_class_is_no_hit():
    logits = torch.tensor([[3.0, 1, 0], [0, 2, 2], [0, 1, 5], [9, 0, 0]])
    found = by_logits(logits, ("a", "b", "c"), ["a", "b", "b", "d"])
    assert found.hits["classification_top1"].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert found.metrics == {"classification_top1": 25.0}
    many = by_logits(torch.arange(7.0)[None].expand(3, 7), tuple("abcdefg"), ["g", "c", "b"])
    assert many.metrics == pytest.approx({"classification_top1": 100 / 3, "classification_top5": 200 / 3})
