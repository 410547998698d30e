"""Catches ids that collide: fields run together, datasets not told apart, equal texts of one image merged."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from capfilt.tables.ids import image_id, text_id

anything = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)


def test_known_answers_never_change():
    # Computed once; an id that changes orphans every caption and score ever written.
    assert image_id("coco", "000000000139") == "126f54c43c1cdb3257b8c174276579fe"
    assert text_id("70c5", "web", "a dog", "", 0) == "2aee7d56e4cbad9a9284687f0859aca9"


@given(anything, anything, anything, anything)
def test_fields_never_run_together(a, b, c, d):
    assert (image_id(a, b) == image_id(c, d)) == ((a, b) == (c, d))


@given(
    st.lists(st.tuples(anything, anything, anything, anything, st.integers(0, 9)), max_size=20, unique=True)
)
def test_different_texts_have_different_ids(rows):
    assert len({text_id(*row) for row in rows}) == len(rows)
