"""Catches: an accuracy other than the published one (counts of matches, what is normalised when), a closed set judged as an
open one, ranked answers that are not the list's, a baseline of another split, answers matched to other questions.
"""

from __future__ import annotations

import json
from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from capfilt.data.example_set import ExampleSet
from capfilt.data.store import ArrayStore
from capfilt.tasks.answers import (
    answer_list,
    by_annotators,
    evaluate_vqa,
    exact_match,
    most_frequent,
    soft_accuracy,
    worth,
)
from tests.refusals import refused


def questions(
    answers, labels=None, task="vqa", pictures=None, categories=None, keys=None, texts=None
) -> ExampleSet:
    count = len(answers)
    shown = pictures or [(row,) for row in range(count)]
    images = 1 + max(place for each in shown for place in each)
    grey = ArrayStore(images, (3, 4, 4), np.uint8)
    grey.array[:] = np.arange(images, dtype=np.uint8)[:, None, None, None]
    return ExampleSet(
        task=task,
        images=grey,
        image_ids=[f"i{row}" for row in range(images)],
        pictures=shown,
        example_ids=[f"e{row}" for row in range(count)],
        keys=keys or [str(row) for row in range(count)],
        texts=texts or [f"question {row}" for row in range(count)],
        answers=[tuple(each) for each in answers],
        labels=labels or [None] * count,
        wrong_texts=[()] * count,
        categories=categories or [None] * count,
    )


OPTIONS = SimpleNamespace(batch_size=2, num_beams=3, beam_rule="transformers", answer_list="", answer_k=128)


def silent(*_):
    pass


def annotators(**counts):
    return tuple(counts.items())


def script(predicted: str, said: list[str]) -> float:
    """The published rules over a plain list of annotators, for answers that are in their normal form."""
    others = list(combinations(said, len(said) - 1))
    return sum(min(sum(answer == predicted for answer in each) / 3, 1) for each in others) / len(others)


@pytest.mark.parametrize("predicted", ["red", "blue", "green", "black"])
def test_the_accuracy_of_ten_annotators(predicted):
    said = annotators(red=6, blue=3, green=1)
    listed = [answer for answer, count in said for _ in range(count)]
    assert soft_accuracy(predicted, said) == pytest.approx(script(predicted, listed))


@pytest.mark.parametrize(
    ("predicted", "said", "value"),
    [
        # Executed with the official script of 2021 (a013f00); the one before gave 0, 0.6, 0, 1, 1.
        ("t-shirt", [("t-shirt", 10)], 1),
        ("none", [("none", 6), ("0", 2), ("nothing", 2)], 1),
        ("dog", [("Dog", 7), ("dogs", 3)], 1),
        ("the red", [("red", 10)], 0),
        ("The Red!", [("red", 10)], 0),
        # All agree once the space around is gone, and not before.
        ("two ", [("two", 4), (" two\n", 6)], 1),
        ("2", [("two", 10)], 0),
        ("2", [("two", 9), ("three", 1)], 1),
        ("t-shirt", [("t shirt", 9), ("shirt", 1)], 1),
        ("the", [("a", 5), ("the", 5)], 1),  # both come to nothing, as in the script
    ],
)
def test_what_is_normalised_is_what_the_official_script_normalises(predicted, said, value):
    assert soft_accuracy(predicted, said) == pytest.approx(value)


def test_exact_match_is_in_normal_form():
    assert exact_match("two", [("Two", 1)]) == 1
    assert exact_match("a cup", [("cup", 1), ("book", 1)]) == 1
    assert exact_match("cups", [("cup", 1)]) == 0


def test_few_annotators_anywhere_make_it_exact_match():
    assert by_annotators([annotators(red=4), annotators(red=10)])
    assert not by_annotators([annotators(red=3), annotators(red=10)])
    assert worth(["red"], [annotators(red=1, blue=9)]).tolist() == [pytest.approx(0.3)]
    assert worth(["red", "red"], [annotators(red=1, blue=9), annotators(red=1)]).tolist() == [1, 1]


class Answering:
    """Says the grey value of the picture, or points at that place of the list."""

    def __init__(self):
        self.beams = []
        self.asked = []

    def answer(self, images, texts, *, num_beams=3, max_new_tokens=10, beam_rule="transformers"):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 4, 4)
        self.beams.append(num_beams)
        self.asked += texts
        return [f"the {value}" for value in images[:, 0, 0, 0].tolist()]

    def rank_answers(self, images, texts, answers, *, k=128):
        assert k == 7
        return images[:, 0, 0, 0].long() % len(answers)


class Classifying:
    labels = ("0", "1", "2")
    pictures = 1

    def classify(self, images, texts):
        assert images.shape[1:] == (1, 3, 4, 4)
        return torch.nn.functional.one_hot(images[:, 0, 0, 0, 0].long() % 3, 3).float()


ONE = [[("0", 1)], [("1", 1)], [("5", 1)], [("5", 1)]]


def test_writing_and_ranking_are_told_apart(tmp_path):
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(["zero", "1", "5"]))
    model = Answering()
    options = SimpleNamespace(**{**vars(OPTIONS), "answer_list": str(path), "answer_k": 7})
    found = evaluate_vqa(model, questions(ONE, pictures=[(0,), (1,), (1,), (2,)]), options, silent)
    # Written: 0, 1, 1, 2. Ranked: zero, 1, 1, 5.
    assert found.metrics == {"vqa_written_exact": 50.0, "vqa_ranked_exact": 75.0}
    assert found.baselines == {"vqa_written_exact": 50.0, "vqa_ranked_exact": 50.0}
    assert model.beams == [3, 3]
    assert model.asked == [f"question {row}" for row in range(4)]
    assert "exact match" in found.protocol
    assert found.details["answers"]["vqa_ranked_exact"] == {"e0": "zero", "e1": "1", "e2": "1", "e3": "5"}
    units = found.units["vqa_written_exact"]
    assert units.names == ("i0", "i1", "i2")  # two questions about i1 are drawn together
    assert units.groups.tolist() == [0, 1, 1, 2]
    assert "vqa_ranked_exact" not in evaluate_vqa(Answering(), questions(ONE), OPTIONS, silent).metrics


def test_a_closed_set_is_named_so_and_kinds_are_apart():
    said = [
        annotators(**{"0": 10}),
        annotators(**{"1": 3, "7": 7}),
        annotators(**{"2": 10}),
        annotators(**{"7": 10}),
    ]
    kinds = ["number", "number", "other", None]
    found = evaluate_vqa(Classifying(), questions(said, categories=kinds), OPTIONS, silent)
    assert found.metrics["vqa_closed"] == pytest.approx(100 * (1 + 0.9 + 1 + 0) / 4)
    assert found.metrics["vqa_closed:number"] == pytest.approx(95)
    assert found.metrics["vqa_closed:other"] == 100
    assert found.baselines["vqa_closed"] == pytest.approx(50)  # always 7: 0 + 1 + 0 + 1
    assert "closed set: 3 answers" in found.protocol
    assert "GT-Vision-Lab/VQA a013f00" in found.protocol
    assert most_frequent(said) == "7"
    # In the spelling that most use: where all agree nothing else is right.
    assert most_frequent([[("t-shirt", 6), ("t shirt", 3)], annotators(hat=8)]) == "t-shirt"


def test_what_cannot_be_judged_is_one_line(tmp_path):
    with refused("--tasks vqa", "1 questions"):
        evaluate_vqa(Answering(), questions([[("a", 1)], []]), OPTIONS, silent)

    class Truth(Classifying):
        labels = ("false", "true")

    with refused("--tasks vqa", "finetune"):
        evaluate_vqa(Truth(), questions(ONE), OPTIONS, silent)
    assert answer_list("") == []
    lines = tmp_path / "list.txt"
    lines.write_text("red\n\nblue\nred\n")
    assert answer_list(str(lines)) == ["red", "blue"]
    for content in ("[]", "[1]", "[broken"):
        lines.write_text(content)
        with refused("--answer-list", lines):
            answer_list(str(lines))
    with refused("--answer-list", tmp_path / "missing"):
        answer_list(str(tmp_path / "missing"))
