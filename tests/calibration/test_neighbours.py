"""Catches a neighbour that is the picture itself or says the same words, and a mean over the wrong neighbours."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capfilt.calibration.neighbours import DECAY, PICTURES, TEXTS, Neighbours


def unit(rng, rows, width):
    made = rng.normal(size=(rows, width)).astype(np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


@pytest.fixture
def humans():
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    words = [f"text {number}" for number in range(len(owners))]
    return Neighbours(
        [f"i{n}" for n in range(40)], unit(rng, 40, 8), owners, words, unit(rng, len(owners), 6)
    )


def by_hand(humans, image, words, picture, text):
    best = {}
    for place, owner in enumerate(humans.owners.tolist()):
        if humans.image_ids[owner] != image and humans.words[place] != words:
            best[owner] = max(best.get(owner, -2.0), float(text @ humans.texts[place]))
    near = sorted(best, key=lambda owner: -float(picture @ humans.pictures[owner]))[:PICTURES]
    first = sum(best[owner] for owner in near) / len(near)
    able = [
        place
        for place, owner in enumerate(humans.owners.tolist())
        if humans.image_ids[owner] != image and humans.words[place] != words
    ]
    said = sorted(able, key=lambda place: -float(text @ humans.texts[place]))[:TEXTS]
    weights = [math.exp(DECAY * (float(text @ humans.texts[place]) - 1)) for place in said]
    seen = [float(picture @ humans.pictures[humans.owners[place]]) for place in said]
    return first, sum(w * s for w, s in zip(weights, seen, strict=True)) / sum(weights)


def test_agreement_is_that_of_a_loop(humans):
    rng = np.random.default_rng(1)
    images = ["other", "i3", "i7", "i7"]
    words = ["new", "text 0", "text 9", "text 12"]
    pictures, texts = unit(rng, 4, 8), unit(rng, 4, 6)
    found = humans.agreement(images, words, pictures, texts)
    for row in range(4):
        assert found[row] == pytest.approx(
            by_hand(humans, images[row], words[row], pictures[row], texts[row]), abs=1e-5
        )


def test_the_picture_itself_has_no_say(humans):
    alone = Neighbours(["a"], humans.pictures[:1], np.array([0]), ["one"], humans.texts[:1])
    same = alone.agreement(["a"], ["two"], humans.pictures[:1], humans.texts[:1])
    assert same.tolist() == [[0.0, 0.0]]
    other = alone.agreement(["b"], ["two"], humans.pictures[:1], humans.texts[:1])
    assert other[0] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert alone.agreement(["b"], ["one"], humans.pictures[:1], humans.texts[:1]).tolist() == [[0.0, 0.0]]
