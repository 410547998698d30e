"""Catches: an order of boxes whose picture is another order's, SNLI-VE's premise read as its hypothesis, a line lost."""

from __future__ import annotations

import gzip
import json

import pytest

from capfilt.formats.examples.row import example_rows
from capfilt.tables.contracts import OWN_CAPTION
from tests.formats.examples.written import lines, read


def test_nlvr_has_a_row_for_every_order_of_the_boxes(tmp_path):
    boxes = [[{"x_loc": 1}], [], []]
    records = [
        {
            "sentence": "a tower",
            "label": "true",
            "identifier": "72-0",
            "directory": "5",
            "structured_rep": boxes,
        },
        {
            "sentence": "no tower",
            "label": "false",
            "identifier": "72-1",
            "directory": "5",
            "structured_rep": boxes,
        },
    ]
    task, rows = read(tmp_path, lines(records), "dev.json")
    assert task == "nlvr"
    assert len(rows) == 12
    assert [row.images[0] for row in rows[:6]] == [f"dev-72-0-{order}.png" for order in range(6)]
    assert {row.key for row in rows[6:]} == {f"dev-72-1-{order}" for order in range(6)}
    assert [row.label for row in rows] == ["true"] * 6 + ["false"] * 6
    assert {row.split for row in rows} == {"val"}


def test_snli_ve_in_its_own_lines_and_in_albefs(tmp_path):
    records = [
        {"Flickr30K_ID": "2181846120", "pairID": "2181846120.jpg#2r1c", "gold_label": "contradiction",
         "sentence1": "A premise.", "sentence2": "A hypothesis.", "annotator_labels": ["contradiction"]},
        {"Flikr30kID": "7.jpg", "pairID": "7.jpg#0r1n", "gold_label": "-", "sentence1": "b", "sentence2": "c"},
    ]  # fmt: skip
    task, rows = read(tmp_path, lines(records), "snli_ve_dev.jsonl")
    assert task == "entailment"
    assert [(row.key, row.images, row.text, row.label) for row in rows] == [
        ("2181846120.jpg#2r1c", ("2181846120",), "A hypothesis.", "contradiction"),
        ("7.jpg#0r1n", ("7.jpg",), "c", "-"),
    ]
    listed = [{"image": "flickr30k-images/7.jpg", "sentence": "A hypothesis.", "label": "neutral"}]
    assert read(tmp_path, listed)[0] == "entailment"
    statement = [{"image": "7.jpg", "sentence": "A statement.", "label": "False"}]
    assert read(tmp_path, statement)[0] == "nlvr"


@pytest.mark.parametrize("name", ["list.json", "list.jsonl", "list.csv", "list.json.gz"])
def test_any_file_of_records_is_read_with_the_one_reader(tmp_path, name):
    record = {"id": "a", "image": "1.jpg", "question": "what?", "answer": "a dog"}
    path = tmp_path / name
    data = json.dumps([record]) if "json" in name else "id,image,question,answer\na,1.jpg,what?,a dog\n"
    data = json.dumps(record) + "\n" if name.endswith("l") else data
    path.write_bytes(gzip.compress(data.encode()) if name.endswith(".gz") else data.encode())
    task, (row,) = example_rows(path)
    assert (task, row.key, row.images, row.text, row.answers) == (
        "vqa",
        "a",
        ("1.jpg",),
        "what?",
        (("a dog", 1),),
    )


def test_own_captions_are_known_by_their_ids_and_by_equal_texts(tmp_path):
    """Would catch: a filter that is rated on the very captions that were written for the picture."""
    path = tmp_path / "ratings.jsonl"
    rated = [
        ("clean/1.jpg", "1.jpg#2", "A dog ."),
        ("clean/1.jpg", "2.jpg#0", "a cat"),
        ("clean/1.jpg", "3.jpg#0", "a  dog ."),
        ("clean/2.jpg", "1.jpg#2", "A dog ."),
        ("clean/2.jpg", "2.jpg", "an id without a number"),
        ("clean/2.jpg", None, "A CAT"),
        ("clean/3.jpg", None, "a cat"),
    ]
    names = ("image", "caption_id", "caption")
    records = [dict(zip(names, each, strict=True), ratings=[1, 2, 2]) for each in rated]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task, rows = example_rows(path)
    assert task == "rating"
    assert [row.category for row in rows] == [OWN_CAPTION, None, OWN_CAPTION, None, None, OWN_CAPTION, None]
    records = [{**record, "label": "match", "ratings": None} for record in records]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task, rows = example_rows(path)
    assert (task, {row.category for row in rows}) == ("match", {None})


def test_a_line_that_cannot_be_read_is_a_row_that_says_so(tmp_path):
    rows = read(
        tmp_path, '{"question": "a", "id": 1}\n{"question"\n{"question": "b", "id": 1}\n', "list.jsonl"
    )[1]
    assert [(row.key, row.text) for row in rows] == [("1", "a"), ("#1", None), ("1#2", "b")]
    assert "is not JSON" in rows[1].fault
