"""Catches: a score given to another pair, a score that depends on its neighbours or on padding, [CLS] where [ENC]
belongs, logits where probabilities belong."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

import capfilt
from capfilt.inference.filter import Filter
from capfilt.models import checkpoint
from tests.refusals import refused

TEXTS = [
    "a red dog",
    "two cats on the left",
    "the ball",
    "a",
    "green green green dog sits on the ball",
    "dogs",
    "cat",
]


@pytest.fixture(scope="module")
def scorer(pair):
    return Filter(*pair)


def by_hand(pair, image, text):
    """One pair by the model's own methods."""
    model, tokenizer = pair
    ids, mask = tokenizer.encode([text], max_length=35)
    with torch.no_grad():
        tokens = model.encode_image(image[None])
        itm = model.match_logits(ids, mask, tokens).softmax(-1)[0, 1]
        itc = (model.embed_image(tokens) * model.embed_text(ids, mask)).sum()
    return pytest.approx((float(itm), float(itc)), abs=1e-5)


def test_score_i_is_of_pair_i(pair, scorer, images):
    scores = scorer.score(images, TEXTS)
    assert len({score.itm_score for score in scores}) == 7
    for score, image, text in zip(scores, images, TEXTS, strict=True):
        assert (score.itm_score, score.itc_score) == by_hand(pair, image, text)
        assert 0 <= score.itm_score <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_many_texts_of_few_images_in_any_order(pair, scorer, images, batch_size):
    index = [3, 0, 3, 6, 0, 3, 1]
    scores = scorer.score_texts(images, torch.tensor(index), TEXTS, batch_size)
    for score, image, text in zip(scores, index, TEXTS, strict=True):
        assert (score.itm_score, score.itc_score) == by_hand(pair, images[image], text)


@pytest.mark.parametrize(
    ("index", "parts"),
    [
        ([2, 0, 1], [(3, 3, False)]),
        ([1, 0, 1, 0, 2, 3], [(2, 4, False), (2, 2, False)]),  # two each, then one each
        ([0, 2, 0, 2, 1], [(3, 3, True), (2, 2, False)]),  # unlike numbers, then neighbours
        ([0, 3, 0, 3, 1, 2], [(2, 4, True), (2, 2, False)]),  # two each, which are no neighbours
    ],
)
def test_an_images_keys_and_values_are_not_copied_for_each_of_its_texts(
    pair, images, monkeypatch, index, parts
):
    """A copy of an image's keys and values for every one of its texts; and texts that are scored with a
    neighbour's picture where there is none."""
    scorer, own, given = Filter(*pair), [], []
    texts = [f"a {word} dog" for word in ("red", "green", "left", "two", "the", "on")][: len(index)]
    cross, match = scorer.cross.forward, scorer.model.match_logits

    def watched(ids, mask, pairs):
        keys = pairs[0][0]
        copied = keys.untyped_storage().data_ptr() != own[0][0][0].untyped_storage().data_ptr()
        given.append((len(keys), len(ids), copied))
        return match(ids, mask, pairs)

    monkeypatch.setattr(scorer.cross, "forward", lambda tokens: own.append(cross(tokens)) or own[-1])
    monkeypatch.setattr(scorer.model, "match_logits", watched)
    scores = scorer.score_texts(images, index, texts, 6)
    assert given == parts
    for score, image, text in zip(scores, index, texts, strict=True):
        assert (score.itm_score, score.itc_score) == by_hand(pair, images[image], text)


def test_the_image_encoder_runs_once_per_image(pair, scorer, monkeypatch):
    seen = []
    encode = pair[0].encode_image
    monkeypatch.setattr(pair[0], "encode_image", lambda batch: seen.append(len(batch)) or encode(batch))
    rng = np.random.default_rng(0)
    one, two = (Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(2))
    buffer = io.BytesIO()
    one.save(buffer, "PNG")
    scores = scorer.score([one, two, one, buffer.getvalue(), buffer.getvalue()], ["a dog"] * 5)
    assert sum(seen) == 3
    assert scores[0] == scores[2]
    assert scores[3].itm_score == pytest.approx(scores[0].itm_score, abs=1e-5)


def test_texts_are_cut_at_the_models_limit(scorer, images):
    long = "dog " * 29
    assert scorer.model.config.max_text_tokens == 35
    endless = "dogs " * 29  # two pieces a word: 58 and the two ends
    cut = scorer.score(images[:2], [endless, endless + " cat"])
    assert cut[0].itm_score != cut[1].itm_score  # two images
    same = scorer.score_texts(images, [0, 0], [endless, endless + " cat"])
    assert same[0] == same[1]
    assert len(scorer.score(images[:1], [long])) == 1


def test_position_0_is_enc_for_itm_and_cls_for_itc(pair, scorer, images, monkeypatch):
    model, tokenizer = pair
    fed = []
    forward = model.text_encoder.forward
    monkeypatch.setattr(
        model.text_encoder,
        "forward",
        lambda ids, *a, **k: fed.append(int(ids[0, 0])) or forward(ids, *a, **k),
    )
    scorer.score(images[:1], ["a dog"])
    assert fed == [tokenizer.enc_id, tokenizer.cls_id]


def test_wrong_input_is_named(scorer, images):
    for call, named in [
        (lambda: scorer.score(images, ["a"]), "7 images and 1 texts"),
        (lambda: scorer.score_texts(images, [0, 9], ["a", "b"]), "9"),
        (lambda: scorer.score_texts(images, [-1], ["a"]), "-1"),
        (lambda: scorer.score_texts(images, [0], ["a", "b"]), "image indices"),
        (lambda: scorer.score_texts(images, [0], ["a"], -1), "batch_size"),
        (lambda: scorer.score_texts(images, [0], ["a"], max_text_tokens=1), "max_text_tokens"),
        (lambda: scorer.score([b"nothing"], ["a"]), "image 0"),
    ]:
        with refused(named):
            call()
    assert scorer.score([], []) == []


def test_loaded_from_disk_it_scores_the_same(pair, scorer, images, tmp_path):
    checkpoint.save(tmp_path / "f", *pair)
    loaded = capfilt.Filter.load(tmp_path / "f")
    assert loaded.score(images, TEXTS) == scorer.score(images, TEXTS)


def test_the_caller_may_set_another_limit(scorer, images):
    texts = ["a red dog on the ball", "a red dog sits"]
    cut = scorer.score_texts(images, [0, 0], texts, max_text_tokens=5)  # [CLS] a red dog [SEP]
    short = scorer.score_texts(images, [0], ["a red dog"])[0]
    for each in cut:
        assert each.itm_score == pytest.approx(short.itm_score, abs=1e-6)
        assert each.itc_score == pytest.approx(short.itc_score, abs=1e-6)
    past_positions = scorer.score_texts(images, [0], ["dogs " * 29], max_text_tokens=999)
    assert 0 <= past_positions[0].itm_score <= 1
