"""Would catch: a chance baseline that is wrong for images with many texts, a model that only matches pairs kept from
retrieval, and R-mean's units adding up to something else than R-mean."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from capfilt.data.corpus import Corpus
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.tasks import evaluations
from capfilt.tasks.retrieval import from_scores
from tests.refusals import refused

OWNERS = [0, 0, 1, 3, 3, 3]


class Store:
    """Pictures whose every byte is their number."""

    def __len__(self):
        return 4

    def read(self, rows):
        return np.broadcast_to(np.asarray(rows, np.uint8)[:, None, None, None], (len(rows), 3, 2, 2)).copy()


@pytest.fixture
def corpus():
    texts = [f"text {place}" for place in range(6)]
    return Corpus(Store(), np.array(OWNERS), texts, [f"image {n}" for n in range(4)])


TABLE = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)


class Matches:
    def encode_images(self, batch):
        return batch[:, 0, :1, 0].long().view(len(batch), 1, 1)

    def match(self, image_tokens, image_index, texts):
        rows = image_tokens[image_index, 0, 0].numpy()
        return torch.from_numpy(TABLE[rows, [int(text.split()[1]) for text in texts]])

    match_probability = match


@pytest.mark.parametrize("held", [1, 5, 1 << 14])
def test_a_model_that_only_matches_pairs_scores_all_of_them(corpus, monkeypatch, held):
    """However few pairs it is given at once, and each text once however often it stands there."""
    monkeypatch.setattr(evaluations, "_PAIRS", held)
    seen = []
    options = EvaluateOptions(images="x", batch_size=3)
    found = evaluations.retrieval(Matches(), corpus, options, lambda *each: seen.append(each))
    expected = from_scores(TABLE, OWNERS)
    assert found.metrics == expected.metrics
    assert "every image with every text, 4 x 6 pairs" in found.protocol
    assert seen[-1] == ("pairs", 24, 24)
    for name, each in found.units.items():
        assert each.value() == pytest.approx(found.metrics[name]), name


def test_chance_is_that_of_every_order(corpus):
    found = evaluations.retrieval(
        Matches(), corpus, EvaluateOptions(images="x"), lambda *each: None
    ).baselines
    hits = {1: 0, 5: 0}
    for order in itertools.permutations(range(6)):
        for depth in hits:
            hits[depth] += sum(
                any(OWNERS[text] == image for text in order[:depth]) for image in sorted(set(OWNERS))
            )
    for depth, count in hits.items():
        assert found[f"tr@{depth}"] == pytest.approx(100 * count / (720 * 3))
    assert (found["ir@1"], found["ir@10"]) == (25.0, 100.0)


def test_prompts_are_named_or_read(tmp_path):
    assert evaluations.prompts("single") == ("a photo of a {}.",)
    path = tmp_path / "mine.txt"
    path.write_text("a {}.\n\n  the {} \n")
    assert evaluations.prompts(str(path)) == ("a {}.", "the {}")
    with refused("--templates", tmp_path / "none"):
        evaluations.prompts(str(tmp_path / "none"))


def test_the_constant_caption_is_a_reference():
    references = [["a dog on grass", "x"], ["a cat on grass"], ["a boat"]]
    found = evaluations._constant_caption(references)
    assert set(found) == {"bleu@4", "rouge_l", "cider"}
    assert found["rouge_l"] > 30


def test_match_logits_apart_by_a_rounding_tie(corpus, monkeypatch):
    """As when candidates are re-ranked: a float32 logit out of a whole transformer is no sharper."""
    table = np.zeros((4, 6), np.float32)
    table[OWNERS, range(6)] = 1.0
    for share, hit in ((1.0 - 5e-6, 0.0), (0.5, 100.0)):
        table[2, 3] = table[1, 0] = share
        monkeypatch.setitem(globals(), "TABLE", table)
        found = evaluations.retrieval(Matches(), corpus, EvaluateOptions(images="x"), lambda *each: None)
        assert found.metrics["tr@1"] == pytest.approx(200 / 3 + hit / 3)
        assert found.metrics["ir@1"] == pytest.approx(400 / 6 + 2 * hit / 6)
