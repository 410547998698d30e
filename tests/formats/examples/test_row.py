"""Catches answers that are counted twice or lose their order, and a source that is taken for another or for an empty one."""

from __future__ import annotations

import pytest

from capfilt.errors import UserError
from capfilt.formats import EXAMPLE_FORMATS
from capfilt.formats.examples.row import counted, example_rows
from tests.formats.examples.written import lines, read
from tests.formats.sources import touch
from tests.refusals import refused


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ([], ()),
        (["yes", "no", "yes"], (("yes", 2), ("no", 1))),
        ([["b", "a"], "b"], (("b", 2), ("a", 1))),
        ([None, "", 2, 2.0, True, float("nan")], None),
        (
            ["Yes", "yes "],
            (("Yes", 1), ("yes ", 1)),
        ),  # what counts as the same answer is the stage's business
    ],
)
def test_each_answer_comes_once_in_its_order_with_how_often_it_was_given(answers, found):
    got = counted(answers)
    assert len({text for text, _ in got}) == len(got)
    if found is None:
        assert sum(count for _, count in got) == 4  # an empty text is an answer, a null is none
    else:
        assert got == found


def test_two_examples_of_one_key_are_told_apart(tmp_path):
    record = {"question_id": 7, "image": "a.jpg", "question": "red?", "answers": ["yes"]}
    _, rows = read(tmp_path, lines([record, record, {**record, "question_id": "7#2"}]), "source.jsonl")
    assert len({row.key for row in rows}) == len(rows) == 3


@pytest.mark.parametrize(
    ("name", "content"),
    [("source.txt", "what is this?"), ("source.json", '{"images": []}'), ("source.jsonl", "")],
)
def test_what_is_no_source_of_examples_is_refused_by_name(tmp_path, name, content):
    with pytest.raises(UserError, match=name):
        read(tmp_path, content, name)
    with pytest.raises(UserError, match="nowhere"):
        example_rows(tmp_path / "nowhere.json")


@pytest.mark.parametrize("name", ["data.jsonl", "list.json", "sugar.json", "image.txt", "folders"])
def test_answers_beside_a_source_that_has_its_own_are_refused(tmp_path, name):
    """Would catch: --annotations that is given and not read, as once for folders of classes."""
    touch(tmp_path, "folders/cat/1.jpg")
    for file, content in {
        "data.jsonl": '{"image": "a.jpg", "question": "red?", "answers": ["yes"]}\n' * 2,
        "list.json": '[["red?", "yes", 1]]',
        "sugar.json": '{"1": {"filename": "a.jpg", "caption": "a cat", "negative_caption": "a dog"}}',
        "image.txt": "red in the image3 ?\nyes\n",
    }.items():
        (tmp_path / file).write_text(content)
    assert example_rows(tmp_path / name)[1]
    with refused("--annotations", "answers.json", tmp_path / name):
        example_rows(tmp_path / name, tmp_path / "answers.json")


def test_every_format_that_is_listed_can_be_asked():
    from importlib import import_module

    for name in EXAMPLE_FORMATS:
        module = import_module(f"capfilt.formats.examples.{name}")
        assert callable(module.detect)
        assert callable(module.read)
