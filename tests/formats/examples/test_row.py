"""Catches: a question joined with the next one's answer, a picture's name left in the question, parts of one answer taken for
several people's, a slip in one line that loses the whole file, an order of boxes whose picture is another order's, SNLI-VE's
premise read as its hypothesis."""

from __future__ import annotations

import json

import pytest

from capfilt.errors import UserError
from capfilt.formats.examples.daquar import in_parts
from capfilt.formats.examples.row import example_rows


def read(tmp_path, content, name="source.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return example_rows(path)


def lines(records):
    return "\n".join(map(json.dumps, records)) + "\n"


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
    with pytest.raises(UserError, match="names no picture"):
        read(tmp_path, "desk\nwhat is it in the image3 ?\n", "shifted.txt")
    with pytest.raises(UserError, match="3 lines"):
        read(tmp_path, text[: text.index("how")] + "what is it in the image4 ?\n", "odd.txt")
    with pytest.raises(UserError, match="holds its own answers"):
        example_rows(tmp_path / "qa.894.raw.train.txt", tmp_path / "odd.txt")


def test_easy_vqa(tmp_path):
    task, rows = read(
        tmp_path, [["what shape is in the image?", "circle", 3], ["is there a red shape?", "no", 3]]
    )
    assert task == "vqa"
    assert [(row.text, row.answers, row.images) for row in rows] == [
        ("what shape is in the image?", (("circle", 1),), (3,)),
        ("is there a red shape?", (("no", 1),), (3,)),
    ]
    assert len({row.key for row in rows}) == 2
    with pytest.raises(UserError, match="entry 1 is not"):
        read(tmp_path, [["what?", "circle", 3], ["what?", "circle"]])


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


@pytest.mark.parametrize("indent", [None, 4])
def test_sugarcrepes_own_files(tmp_path, indent):
    data = {
        str(number): {"filename": f"00000000000{number}.jpg", "caption": f"a {number}", "negative_caption": f"no {number}"}
        for number in range(2)
    }  # fmt: skip
    task, rows = read(tmp_path, json.dumps({**data, "2": "odd"}, indent=indent), "swap_att.json")
    assert task == "choice"
    assert [(row.key, row.images, row.text, row.wrong_texts, row.category) for row in rows] == [
        ("swap_att:0", ("000000000000.jpg",), "a 0", ("no 0",), "swap_att"),
        ("swap_att:1", ("000000000001.jpg",), "a 1", ("no 1",), "swap_att"),
        ("swap_att:2", (), None, (), "swap_att"),
    ]


def test_vqas_kinds_of_answers_are_kept(tmp_path):
    questions = {
        "data_subtype": "val2014",
        "questions": [{"question_id": 1, "image_id": 9, "question": "how many?"}],
    }
    said = [{"answer": "2", "answer_id": number} for number in range(10)]
    answers = tmp_path / "answers.json"
    answers.write_text(
        json.dumps({"annotations": [{"question_id": 1, "answer_type": "number", "answers": said}]})
    )
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(questions))
    (row,) = example_rows(path, answers)[1]
    assert (row.category, row.answers) == ("number", (("2", 10),))
