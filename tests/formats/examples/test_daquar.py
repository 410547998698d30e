"""Catches: a question joined with the next one's answer, a picture's name left in the question, an answer cut in parts."""

from __future__ import annotations

from capfilt.formats.examples.daquar import in_parts
from capfilt.formats.examples.row import example_rows
from tests.formats.examples.written import read
from tests.refusals import refused


def test_daquar(tmp_path):
    text = """what is on the right side of the black telephone in the image3 ?
desk
how many chairs are there on the right of the table in this room in the image12 ?
table, chair, cup
what colour is image7

red
"""
    task, rows = read(tmp_path, text, "qa.894.raw.train.txt")
    assert task == "vqa"
    assert [row.text for row in rows] == [
        "what is on the right side of the black telephone ?",
        "how many chairs are there on the right of the table in this room ?",
        "what colour is ?",
    ]
    assert [row.images for row in rows] == [("image3",), ("image12",), ("image7",)]
    assert [row.answers for row in rows] == [(("desk", 1),), (("chair, cup, table", 1),), (("red", 1),)]
    assert [(row.key, row.split) for row in rows] == [
        ("train-0", "train"),
        ("train-1", "train"),
        ("train-2", "train"),
    ]
    assert in_parts("b, a,, a") == "a, a, b"
    slips = {
        "how many drawers are visible in th eimage999 ?": ("how many drawers are visible ?", ("image999",)),
        "what is red in this image4 ?": ("what is red ?", ("image4",)),
        "what is in the image5 in the image5 ?": ("what is ?", ("image5",)),
        "in the image6, what is on the table ?": ("what is on the table ?", ("image6",)),
        "what is behind the chair in image7 on the left?": ("what is behind the chair on the left ?", ("image7",)),
        "what is on the table in the image ?": ("what is on the table in the image ?", ()),
    }  # fmt: skip
    rows = read(tmp_path, "".join(f"{line}\nbox\n" for line in slips), "qa.894.raw.test.txt")[1]
    assert [(row.text, row.images) for row in rows] == list(slips.values())
    with refused("shifted.txt", "image3"):
        read(tmp_path, "desk\nwhat is it in the image3 ?\n", "shifted.txt")
    with refused("odd.txt", "3 lines"):
        read(tmp_path, text[: text.index("how")] + "what is it in the image4 ?\n", "odd.txt")
    with refused("--annotations", "answers"):
        example_rows(tmp_path / "qa.894.raw.train.txt", tmp_path / "odd.txt")
