"""Catches scenes whose relation is ambiguous, pictures that do not show their scene, and drawing that is not seeded."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.quickstart.world import (
    BACKGROUNDS,
    COLOURS,
    HALF_EXTENT,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    render,
)

seeds = st.integers(0, 2**32)


def drawn(scene: Scene, size: int = 96, seed: int = 0) -> np.ndarray:
    return np.asarray(render(scene, np.random.default_rng(seed), size)).astype(np.float64)


def painted(scene: Scene, size: int = 96, seed: int = 0) -> np.ndarray:
    """Where the saturated object colours are: every background of the test is neutral."""
    pixels = drawn(scene, size, seed)
    return pixels.max(2) - pixels.min(2) > 60


@settings(max_examples=200, deadline=None)
@given(seeds)
def test_a_sampled_scene_is_clear_and_survives_json(seed):
    scene = Scene.sample(np.random.default_rng(seed))
    assert Scene.from_json(scene.to_json()) == scene
    for thing in scene.objects:
        assert (thing.shape in SHAPES, thing.colour in COLOURS, thing.size in SIZES) == (True, True, True)
        half = HALF_EXTENT[thing.size]
        assert half <= thing.x <= 1 - half
        assert half <= thing.y <= 1 - half
    if len(scene.objects) == 2:
        first, second = scene.objects
        assert (first.shape, first.colour) != (second.shape, second.colour)
        dx, dy = first.x - second.x, first.y - second.y
        holds = {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[scene.relation]
        axis, other = (abs(dx), abs(dy)) if scene.relation in ("left", "right") else (abs(dy), abs(dx))
        assert holds
        assert axis >= HALF_EXTENT[first.size] + HALF_EXTENT[second.size]
        assert axis >= 2 * other
    else:
        assert scene.relation is None


@pytest.mark.parametrize(
    ("x", "y", "relation"),
    [(0.2, 0.5, "left"), (0.8, 0.5, "right"), (0.5, 0.2, "above"), (0.5, 0.8, "below")],
)
def test_relation_is_the_first_object_seen_from_the_second(x, y, relation):
    scene = Scene(
        (SceneObject("star", "red", "small", x, y), SceneObject("ring", "red", "small", 1 - x, 1 - y)), "gray"
    )
    assert scene.relation == relation


def test_attributes_are_uniform_and_independent_of_the_number_of_objects():
    rng = np.random.default_rng(0)
    scenes = [Scene.sample(rng) for _ in range(4000)]
    things = [thing for scene in scenes for thing in scene.objects]
    for values, seen in (
        (SHAPES, [t.shape for t in things]),
        (COLOURS, [t.colour for t in things]),
        (SIZES, [t.size for t in things]),
        (BACKGROUNDS, [s.background for s in scenes]),
        (RELATIONS, [s.relation for s in scenes if s.relation]),
    ):
        for value in values:
            assert seen.count(value) / len(seen) == pytest.approx(1 / len(values), abs=0.03)
    assert np.mean([len(s.objects) == 2 for s in scenes]) == pytest.approx(0.5, abs=0.03)


def test_equal_streams_draw_equal_pictures_and_others_draw_others():
    scene = Scene.sample(np.random.default_rng(5))
    assert np.array_equal(drawn(scene, seed=1), drawn(scene, seed=1))
    difference = np.abs(drawn(scene, seed=1) - drawn(scene, seed=2))
    assert (difference.max(2) > 2).mean() > 0.3


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_the_picture_shows_each_object_at_its_place_in_its_size(seed):
    scene = dataclasses.replace(Scene.sample(np.random.default_rng(seed)), background="white")
    mask = painted(scene, 96, seed)
    inside = np.zeros_like(mask)
    y, x = (np.indices(mask.shape) + 0.5) / 96
    for thing in scene.objects:
        half = HALF_EXTENT[thing.size]
        box = (np.abs(x - thing.x) <= half + 0.03) & (np.abs(y - thing.y) <= half + 0.03)
        inside |= box
        rows, columns = np.nonzero(mask & box & (np.hypot(x - thing.x, y - thing.y) <= half + 0.03))
        extent = max(np.ptp(rows), np.ptp(columns)) + 1
        assert 2 * half * 96 * 0.70 <= extent <= 2 * half * 96 * 1.1
    assert not (mask & ~inside).any()


def test_small_never_looks_large():
    extents = {}
    for size in SIZES:
        scene = Scene((SceneObject("circle", "blue", size, 0.5, 0.5),), "white")
        extents[size] = [np.ptp(np.nonzero(painted(scene, 48, seed))[0]) + 1 for seed in range(30)]
    assert max(extents["small"]) + 3 < min(extents["large"])


def test_colours_and_shapes_stay_far_apart_in_every_light():
    """Nearest mean colour, and shape by overlap with clean masks, must be right for pictures as noisy as they come."""
    means = {}
    for colour in COLOURS:
        scene = Scene((SceneObject("square", colour, "large", 0.5, 0.5),), "gray")
        means[colour] = np.array([drawn(scene, 48, seed)[20:28, 20:28].mean((0, 1)) for seed in range(20)])
    centres = {colour: values.mean(0) for colour, values in means.items()}
    for colour, values in means.items():
        for value in values:
            assert min(centres, key=lambda other: np.linalg.norm(value - centres[other])) == colour
    areas = {}
    for shape in SHAPES:
        scene = Scene((SceneObject(shape, "blue", "large", 0.5, 0.5),), "white")
        areas[shape] = np.mean([painted(scene, 48, seed) for seed in range(20)], axis=0)
    for a in SHAPES:
        for b in SHAPES:
            if a != b:
                assert np.abs(areas[a] - areas[b]).sum() > 0.1 * (areas[a] + areas[b]).sum(), (a, b)


def test_backgrounds_are_distinct_and_no_object_drowns_in_one():
    for background in BACKGROUNDS:
        for colour in COLOURS:
            scene = Scene((SceneObject("square", colour, "large", 0.5, 0.5),), background)
            for seed in range(3):
                pixels = drawn(scene, 48, seed)
                body = pixels[20:28, 20:28].mean((0, 1))
                around = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
                assert np.linalg.norm(around - body, axis=1).min() > 40, (background, colour)


@pytest.mark.parametrize("size", [6, 16, 48, 96, 130])
def test_any_size_can_be_drawn(size):
    picture = render(Scene.sample(np.random.default_rng(3)), np.random.default_rng(0), size)
    assert picture.size == (size, size)
    assert picture.mode == "RGB"
