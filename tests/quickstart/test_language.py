"""Catches a writer whose sentences the reader reads otherwise, and a reader that forgives what models get wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from capfilt.quickstart.language import Mention, Statement, captions, one_attribute_off, parse, state, write
from capfilt.quickstart.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, Scene

seeds = st.integers(0, 2**32)
mentions = st.builds(
    Mention, st.sampled_from(SHAPES), st.sampled_from(COLOURS), st.none() | st.sampled_from(SIZES)
)
grounds = st.none() | st.sampled_from(BACKGROUNDS)
statements = st.builds(lambda a, g: Statement((a,), None, g), mentions, grounds) | st.builds(
    lambda a, b, r, g: Statement((a, b), r, g),
    mentions,
    mentions,
    st.none() | st.sampled_from(RELATIONS),
    grounds,
)


@settings(max_examples=200, deadline=None)
@given(statements, seeds)
def test_what_is_written_is_read_back_exactly(statement, seed):
    text = write(statement, np.random.default_rng(seed))
    assert parse(text) == statement
    assert len(text.split()) <= 18


RED_STAR, BLUE_RING = Mention("star", "red"), Mention("ring", "blue")


@pytest.mark.parametrize(
    ("text", "statement"),
    [
        ("a red star", Statement((RED_STAR,))),
        ("One shape: a red star.", Statement((RED_STAR,))),
        ("an orange circle", Statement((Mention("circle", "orange"),))),
        (
            "a small red star on a grassy background",
            Statement((Mention("star", "red", "small"),), None, "grassy"),
        ),
        ("a red star left of a blue ring", Statement((RED_STAR, BLUE_RING), "left")),
        ("there is a red star to the right of a blue ring", Statement((RED_STAR, BLUE_RING), "right")),
        ("a red star is above a blue ring", Statement((RED_STAR, BLUE_RING), "above")),
        ("a red star over a blue ring", Statement((RED_STAR, BLUE_RING), "above")),
        ("a red star is under a blue ring", Statement((RED_STAR, BLUE_RING), "below")),
        ("a red star and a blue ring", Statement((RED_STAR, BLUE_RING))),
        (
            "on a black background there is a red star with a large blue ring",
            Statement((RED_STAR, Mention("ring", "blue", "large")), None, "black"),
        ),
        ("two shapes a red star and a blue ring", Statement((RED_STAR, BLUE_RING))),
        ("  A  RED star ,\tbelow a blue ring . ", Statement((RED_STAR, BLUE_RING), "below")),
        ("two shapes : a red star and a blue ring", Statement((RED_STAR, BLUE_RING))),
    ],
)
def test_known_sentences(text, statement):
    assert parse(text) == statement


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        None,
        "red star",
        "a star",
        "a red",
        "a red red star",
        "a red blue star",
        "a star red",
        "a large small red star",
        "a red star a blue ring",
        "a red star left a blue ring",
        "a red star to the left of",
        "a red star is left of left of a blue ring",
        "a red star to the above a blue ring",
        "a red star and a blue ring and a yellow square",
        "a red star on a blue background",
        "a red star on a white background on a white background",
        "on a white background a red star on a white background",
        "on a white background",
        "one shape: a red star and a blue ring",
        "two shapes: a red star",
        "there is",
        "a red star...",
        "a red star\u2026",
        "a red star and a blue ri",
        "IMG_2043.jpg",
        "click to enlarge",
        "ein roter Stern",
        "a red star [SEP]",
        "a red star " * 200,
    ],
)
def test_what_is_no_sentence(text):
    assert parse(text) is None


@settings(max_examples=150, deadline=None)
@given(statements, seeds, st.integers(0, 17), st.integers(0, 1))
def test_a_repeated_or_lost_word_is_never_read_as_more_than_was_said(statement, seed, place, repeat):
    words = write(statement, np.random.default_rng(seed)).lower().rstrip(".").split()
    place %= len(words)
    damaged = words[:place] + [words[place]] * (2 if repeat else 0) + words[place + 1 :]
    read = parse(" ".join(damaged))
    if repeat:
        assert read is None
    elif read is not None:
        # Leaving out an optional word ("small", "is") may leave a sentence, which then states no other fact.
        assert read.stated() <= statement.stated()
        assert [(m.shape, m.colour) for m in read.objects] == [(m.shape, m.colour) for m in statement.objects]


@settings(max_examples=200, deadline=None)
@given(statements, seeds)
def test_one_attribute_off_changes_exactly_one_stated_fact(statement, seed):
    assume(len({(m.shape, m.colour) for m in statement.objects}) == len(statement.objects))
    changed, kind = one_attribute_off(statement, np.random.default_rng(seed))

    def facts(s):
        listed = [("relation", s.relation), ("background", s.background)]
        for i, m in enumerate(s.objects):
            listed += [(f"colour{i}", m.colour), (f"shape{i}", m.shape), (f"size{i}", m.size)]
        return listed

    different = [name for (name, a), (_, b) in zip(facts(statement), facts(changed), strict=True) if a != b]
    assert len(different) == 1
    assert different[0].rstrip("01") == kind
    assert changed.stated() == statement.stated()


def test_what_may_be_left_out_is_stated_as_often_as_promised():
    rng = np.random.default_rng(0)
    scenes = [scene for scene in (Scene.sample(rng) for _ in range(3000)) if scene.relation]
    said = [state(scene, rng) for scene in scenes]
    assert np.mean([m.size is not None for s in said for m in s.objects]) == pytest.approx(0.25, abs=0.04)
    assert np.mean([s.relation is not None for s in said]) == pytest.approx(0.15, abs=0.04)
    assert np.mean([s.background is not None for s in said]) == pytest.approx(0.25, abs=0.04)
    same = [s.objects[0].shape == c.objects[0].shape for s, c in zip(said, scenes, strict=True)]
    assert np.mean(same) < 0.7


def test_captions_of_one_scene_differ_in_more_than_case():
    rng = np.random.default_rng(0)
    for _ in range(200):
        found = captions(Scene.sample(rng), 5, rng)
        assert len({text.lower().rstrip(".") for text in found}) == 5


def test_the_language_is_small_and_its_sentences_short():
    rng = np.random.default_rng(0)
    words = [
        write(state(Scene.sample(rng), rng), rng).lower().replace(":", "").rstrip(".").split()
        for _ in range(3000)
    ]
    assert len({word for text in words for word in text}) == 38
    assert max(map(len, words)) <= 18
    assert 7 < np.mean([len(text) for text in words]) < 9
