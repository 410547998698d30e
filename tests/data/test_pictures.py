"""Catches a picture that is decoded twice, counted twice, or given to another id than its own."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from capfilt.data.pictures import Pictures
from capfilt.data.transforms import decode_uint8
from tests.worlds import failed_row, image_rows


@pytest.fixture
def rows():
    good = image_rows("web", 4)
    good[0]["split"] = "val"
    return [
        *good,
        failed_row("web", "lost"),
        {**failed_row("web", "cut"), "image": {"bytes": b"\xff\xd8\xff"}},
    ]


def gathered(*calls, **options):
    pictures = Pictures(16, options, Counter())
    for some in calls:
        pictures.add(some)
    return pictures


def test_each_id_has_its_own_picture(rows):
    pictures = gathered(rows)
    for row in rows[:4]:
        place = pictures.row_of[row["image_id"]]
        pixels = pictures.store.read(np.array([place]))[0]
        assert np.array_equal(pixels, decode_uint8(row["image"]["bytes"], 16))
        assert pictures.image_ids[place] == row["image_id"]


def test_what_cannot_be_used_has_no_row_and_is_counted_once(rows):
    pictures = gathered(rows, rows, rows[4:])
    assert [pictures.row_of[row["image_id"]] for row in rows[4:]] == [None, None]
    assert pictures.skipped.total() == 2
    assert pictures.skipped["no_image"] == 1


@pytest.mark.parametrize("cut", [0, 1, 3, 6])
def test_a_picture_that_comes_again_is_kept_once_however_rows_arrive(rows, cut):
    pictures = gathered(rows[:cut] + rows[:cut], rows)
    assert len(pictures.store) == len(pictures.image_ids) == 4
    assert sorted(place for place in pictures.row_of.values() if place is not None) == [0, 1, 2, 3]


def test_options_of_the_store_are_passed_on(rows, tmp_path):
    pictures = gathered(rows, memory_limit=0, spill_dir=tmp_path, progress=lambda count: None)
    assert pictures.store.spilled_bytes > 0
    assert np.array_equal(pictures.store.read(np.array([2]))[0], decode_uint8(rows[2]["image"]["bytes"], 16))
