"""Catches spam that the grader would take for a caption, and translations that lose or bend a word."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.quickstart import spam
from capfilt.quickstart.language import Mention, Statement, parse, state
from capfilt.quickstart.world import COLOURS, SHAPES, SIZES, Scene

seeds = st.integers(0, 2**32)


@settings(max_examples=150, deadline=None)
@given(seeds)
def test_no_spam_is_a_sentence(seed):
    rng = np.random.default_rng(seed)
    statement = state(Scene.sample(rng), rng)
    texts = [spam.file_name(rng), spam.boilerplate(rng), spam.truncated(statement, rng)]
    texts.append(spam.other_language(statement, rng))
    for text in texts:
        assert text.strip() == text != ""
        assert parse(text) is None
        assert parse(text.rstrip(".")) is None


TWO = Statement((Mention("square", "red", "small"), Mention("star", "green", "large")), "above", "white")
ORANGE = Statement((Mention("star", "orange"),), None, "grassy")


@pytest.mark.parametrize(
    ("statement", "texts"),
    [
        (
            TWO,
            {
                "ein kleines rotes Quadrat über einem großen grünen Stern auf weißem Hintergrund",
                "un cuadrado rojo pequeño encima de una estrella verde grande sobre fondo blanco",
                "un petit carré rouge au-dessus d'une grande étoile verte sur fond blanc",
            },
        ),
        (
            ORANGE,
            {
                "ein oranger Stern auf einer Wiese",
                "una estrella naranja sobre la hierba",
                "une étoile orange sur l'herbe",
            },
        ),
    ],
)
def test_known_translations(statement, texts):
    assert {spam.other_language(statement, np.random.default_rng(seed)) for seed in range(40)} == texts


def test_every_object_has_a_name_of_its_own_in_every_language():
    named = set()
    for shape, colour, size in itertools.product(SHAPES, COLOURS, (None, *SIZES)):
        statement = Statement((Mention(shape, colour, size),))
        named |= {spam.other_language(statement, np.random.default_rng(seed)) for seed in range(20)}
    assert len(named) == 3 * len(SHAPES) * len(COLOURS) * 3
    assert all(len(text.split()) in (3, 4) for text in named)
