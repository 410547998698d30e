"""Catches: answers lost because one file has numbers as text."""

from __future__ import annotations

import json

import pytest

from capfilt.formats.examples.row import example_rows


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


@pytest.mark.parametrize(("asked", "answered"), [(1, "1"), ("1", 1), ("001", 1), (1.0, 1)])
def test_questions_find_their_answers_as_text_and_as_numbers(tmp_path, asked, answered):
    questions = {"questions": [{"question_id": asked, "image_id": "9", "question": "what?"}]}
    answers = {"annotations": [{"question_id": answered, "answers": [{"answer": "a dog"}]}]}
    for name, data in (("q.json", questions), ("a.json", answers)):
        (tmp_path / name).write_text(json.dumps(data))
    (row,) = example_rows(tmp_path / "q.json", tmp_path / "a.json")[1]
    assert (row.answers, row.images) == ((("a dog", 1),), (9,))


@pytest.mark.parametrize("answers", [True, 7, "red", {"answer": "red"}])
def test_answers_that_are_no_list_are_none(tmp_path, answers):
    """A truth value in the place of the list ended the stage with a traceback."""
    given = [{"question_id": 1, "answers": answers}, {"question_id": 2, "answers": [{"answer": "red"}]}]
    (tmp_path / "answers.json").write_text(json.dumps({"annotations": given}))
    asked = [{"question_id": n, "image_id": 1, "question": "q"} for n in (1, 2)]
    (tmp_path / "q.json").write_text(json.dumps({"questions": asked}))
    _, rows = example_rows(tmp_path / "q.json", tmp_path / "answers.json")
    assert [row.answers for row in rows] == [(), (("red", 1),)]
