"""Catches texts that get another id on another day, or that lose their picture when lists are empty or null."""

from __future__ import annotations

import pyarrow as pa

from capfilt.tables.ids import text_id
from capfilt.tables.texts import found_texts, texts_of


def images(captions):
    ids = [f"i{n}" for n in range(len(captions))]
    return pa.table(
        {
            "image_id": ids,
            "source": ["web"] * len(ids),
            "captions": pa.array(captions, pa.list_(pa.string())),
        }
    )


def test_each_found_text_is_a_row_with_the_published_id():
    table = found_texts(images([["a", "b", "a"], [], ["c"]]))
    assert table["image_id"].to_pylist() == ["i0", "i0", "i0", "i2"]
    assert table["text"].to_pylist() == ["a", "b", "a", "c"]
    expected = [
        text_id("i0", "web", "a", "", 0),
        text_id("i0", "web", "b", "", 1),
        text_id("i0", "web", "a", "", 2),
    ]
    assert table["text_id"].to_pylist() == [*expected, text_id("i2", "web", "c", "", 0)]


def test_ids_do_not_depend_on_how_rows_are_cut_into_chunks_or_slices():
    whole = images([["a", "b"], ["c"], [], ["d", "e"]])
    pieces = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2), whole.slice(3)])
    assert found_texts(pieces).equals(found_texts(whole))
    assert (
        found_texts(whole.slice(3))["text_id"].to_pylist() == found_texts(whole)["text_id"].to_pylist()[-2:]
    )


def test_empty_tables_and_synthetic_texts():
    synthetic = pa.table(
        {"text_id": ["s"], "image_id": ["i0"], "text": ["z"], "failure": pa.array([None], pa.string())}
    )
    assert texts_of(images([]), []).num_rows == 0
    both = texts_of(images([["a"]]), [synthetic])
    assert both["source"].to_pylist() == ["web", "synthetic"]
