"""Catches: rows lost or done twice where memory runs out, a batch that is never tried smaller, an endless loop at one row,
tokens of one vision tower given to a model that learned with another."""

from __future__ import annotations

import copy

import pytest
import torch

from capfilt.errors import UserError
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter


def scarce(engine, monkeypatch, most):
    """The engine's model, with room for `most` images at a time; returns the batches that were tried."""
    tried = []
    encode = engine.model.encode_image

    def limited(batch):
        tried.append(len(batch))
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return encode(batch)

    monkeypatch.setattr(engine.model, "encode_image", limited)
    return tried


def test_captions_are_the_same_in_batches_halved_for_memory(pair, images, monkeypatch):
    expected = Captioner(*pair).caption(images, samples=2, seed=3)
    captioner = Captioner(*pair)
    tried = scarce(captioner, monkeypatch, 2)
    made = captioner.caption(images, samples=2, seed=3)
    assert [each.text for each in made] == [each.text for each in expected]
    assert tried == [7, 3, 1, *[1] * 6]
    assert captioner.fits == 1
    captioner.caption(images)
    assert tried[9:] == [1] * 7, "what did not fit is not tried again"


def test_scores_are_the_same_in_batches_halved_for_memory(pair, images, monkeypatch):
    texts, index = ["a dog", "two cats", "the ball", "red", "green"], [6, 0, 3, 0, 5]
    expected = Filter(*pair).score_texts(images, index, texts)
    scorer = Filter(*pair)
    tried = scarce(scorer, monkeypatch, 2)
    for a, b in zip(scorer.score_texts(images, index, texts), expected, strict=True):
        assert a.itm_score == pytest.approx(b.itm_score, abs=1e-5)
        assert a.itc_score == pytest.approx(b.itc_score, abs=1e-5)
    assert tried == [4, 2, 2]
    assert scorer.fits == 2


def test_one_encode_serves_both_where_the_towers_are_the_same(pair, images):
    """As two checkpoints finetuned with their vision towers frozen are: the same tower, other text sides."""
    other = copy.deepcopy(pair[0])
    with torch.no_grad():
        other.itm_head.bias.add_(1.0)
    captioner, scorer = Captioner(*pair), Filter(other, pair[1])
    texts, index = ["a dog", "two cats", "the ball"], [6, 0, 3]
    captions, scores = captioner.caption(images), scorer.score_texts(images, index, texts)
    encoded = captioner.encode(images)
    with pytest.raises(UserError, match="another vision tower"):
        scorer.score_texts(encoded, index, texts)
    captioner.share_vision(scorer)
    assert [each.text for each in captioner.caption(encoded, batch_size=3)] == [
        each.text for each in captions
    ]
    for a, b in zip(scorer.score_texts(encoded, index, texts), scores, strict=True):
        assert a.itm_score == pytest.approx(b.itm_score, abs=1e-5)
    assert scorer.score_texts(images, index, texts) == scores

    apart = copy.deepcopy(pair[0])
    with torch.no_grad():
        apart.visual_encoder.norm.bias[0] += 1e-3
    with pytest.raises(UserError, match="freeze-vision"):
        captioner.share_vision(Filter(apart, pair[1]))
    low = [kind(model, pair[1], precision="int8") for kind, model in ((Captioner, pair[0]), (Filter, other))]
    low[0].share_vision(low[1])
    with torch.no_grad():
        apart.visual_encoder.blocks[0].mlp.fc1.weight.mul_(2.0)
        apart.visual_encoder.norm.bias.copy_(pair[0].visual_encoder.norm.bias)
    with pytest.raises(UserError, match="freeze-vision"):
        low[0].share_vision(Filter(apart, pair[1], precision="int8"))


def test_one_image_that_does_not_fit_is_said(pair, images, monkeypatch):
    captioner = Captioner(*pair)
    scarce(captioner, monkeypatch, 0)
    with pytest.raises(UserError, match=r"one image at a time.*out of memory") as caught:
        captioner.caption(images)
    assert "\n" not in str(caught.value)
