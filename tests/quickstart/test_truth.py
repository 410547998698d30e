"""Catches grading that lets a wrong attribute pass, or fails a caption for what it leaves out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.quickstart.language import one_attribute_off, state, write
from capfilt.quickstart.truth import (
    KINDS,
    SPAM_KINDS,
    attributes_stated,
    is_complete_and_true,
    is_true,
)
from capfilt.quickstart.world import Scene, SceneObject

ONE = Scene((SceneObject("circle", "red", "small", 0.5, 0.5),), "striped")
TWO = Scene(
    (SceneObject("circle", "red", "small", 0.25, 0.5), SceneObject("star", "blue", "large", 0.7, 0.5)),
    "grassy",
)
SAME_SHAPE = Scene(
    (SceneObject("ring", "yellow", "small", 0.5, 0.2), SceneObject("ring", "green", "small", 0.5, 0.8)),
    "black",
)
seeds = st.integers(0, 2**32)


@pytest.mark.parametrize(
    ("scene", "text", "true", "complete"),
    [
        (ONE, "a red circle", True, True),
        (ONE, "a small red circle on a striped background", True, True),
        (ONE, "a blue circle", False, False),
        (ONE, "a red square", False, False),
        (ONE, "a large red circle", False, False),
        (ONE, "a red circle on a gray background", False, False),
        (ONE, "a red circle and a blue star", False, False),
        (ONE, "a red circle and a red circle", False, False),
        (ONE, "a red circle left of a red circle", False, False),
        (TWO, "a red circle and a blue star", True, True),
        (TWO, "a blue star with a red circle", True, True),
        (TWO, "a small red circle to the left of a large blue star on a grassy background", True, True),
        (TWO, "a large blue star is right of a small red circle", True, True),
        (TWO, "a red circle", True, False),
        (TWO, "a large blue star on a grassy background", True, False),
        (TWO, "a blue circle and a red star", False, False),
        (TWO, "a red star and a blue circle", False, False),
        (TWO, "a green circle and a blue star", False, False),
        (TWO, "a red ring and a blue star", False, False),
        (TWO, "a large red circle and a blue star", False, False),
        (TWO, "a red circle and a small blue star", False, False),
        (TWO, "a red circle right of a blue star", False, False),
        (TWO, "a blue star left of a red circle", False, False),
        (TWO, "a red circle above a blue star", False, False),
        (TWO, "a red circle below a blue star", False, False),
        (TWO, "a red circle and a blue star on a white background", False, False),
        (TWO, "a red circle and a red circle", False, False),
        (TWO, "a small circle and a large star", False, False),
        (SAME_SHAPE, "a yellow ring over a green ring", True, True),
        (SAME_SHAPE, "a green ring under a yellow ring", True, True),
        (SAME_SHAPE, "a green ring over a yellow ring", False, False),
        (SAME_SHAPE, "a yellow ring and a yellow ring", False, False),
        (TWO, "IMG_0001.jpg", False, False),
        (TWO, "", False, False),
        (TWO, None, False, False),
        (TWO, "a red red circle and a blue star", False, False),
    ],
)
def test_known_answers(scene, text, true, complete):
    assert is_true(text, scene) is true
    assert is_complete_and_true(text, scene) is complete


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_captions_are_true_of_their_scene_and_false_with_one_attribute_off(seed):
    rng = np.random.default_rng(seed)
    scene = Scene.sample(rng)
    assert is_complete_and_true(write(state(scene, rng), rng), scene)
    wrong, _ = one_attribute_off(state(scene, rng), rng)
    assert not is_true(write(wrong, rng), scene)


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_truth_agrees_with_the_facts_counted_one_by_one(seed):
    """The same question by another road: every fact a text states is in the set of facts the scene affords."""
    rng = np.random.default_rng(seed)
    scene, other = Scene.sample(rng), Scene.sample(rng)
    for statement in (state(scene, rng), state(other, rng)):
        names = [f"{m.colour} {m.shape}" for m in statement.objects]
        here = {f"{o.colour} {o.shape}": o for o in scene.objects}
        ok = len(set(names)) == len(names) and set(names) <= set(here)
        ok = ok and all(m.size in (None, here[n].size) for m, n in zip(statement.objects, names, strict=True))
        ok = ok and statement.background in (None, scene.background)
        if ok and statement.relation:
            a, b = here[names[0]], here[names[1]]
            ok = {
                "left": a.x < b.x - 0.3, "right": a.x > b.x + 0.3, "above": a.y < b.y - 0.3, "below": a.y > b.y + 0.3,
            }[statement.relation]  # fmt: skip
        assert is_true(write(statement, rng), scene) == ok


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a red circle", 2),
        ("a small red circle on a striped background", 4),
        ("a red circle and a blue star", 4),
        ("a small red circle to the left of a large blue star on a grassy background", 8),
        ("a circle", 0),
        (None, 0),
    ],
)
def test_attributes_are_counted(text, count):
    assert attributes_stated(text) == count


def test_kinds_are_split_into_captions_and_spam():
    assert set(KINDS) - set(SPAM_KINDS) == {"true", "other_image", "one_attribute_off"}
    assert [name for name, kind in KINDS.items() if kind.true] == ["true"]
