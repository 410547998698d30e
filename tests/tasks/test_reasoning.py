"""Catches: right counted by place and not by name, one picture shown where two are meant, consistency over other groups than
the published script's or over parts of them, intervals that take six orders of one picture's boxes for six pictures, a class
left out of the figures, a model of other classes judged all the same.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from capfilt.tasks.reasoning import evaluate_entailment, evaluate_nlvr, statement_of
from tests.refusals import refused
from tests.tasks.test_answers import questions, silent

OPTIONS = SimpleNamespace(batch_size=3)


class Judge:
    """Says the label that is written in the text."""

    def __init__(self, labels, pictures=1):
        self.labels, self.pictures, self.seen = labels, pictures, []

    def classify(self, images, texts):
        assert images.shape[1] == self.pictures
        self.seen += images[:, :, 0, 0, 0].tolist()
        return torch.stack([torch.tensor([float(label == text) for label in self.labels]) for text in texts])


def examples(task, said, labels, **more):
    return questions([()] * len(said), labels=labels, task=task, texts=said, **more)


@pytest.mark.parametrize(
    ("key", "pictures", "statement"),
    [
        ("dev-850-1-0", 2, "dev-850-0"),
        ("dev-850-3-1", 2, "dev-850-1"),
        ("test1-7-0-0", 2, "test1-7-0"),
        ("1572-0", 1, "1572"),
        ("hidden-3868-2-0", 1, "hidden-3868"),
        ("test-12-3-5", 1, "test-12"),
        ("#4", 1, None),
        ("850", 2, None),
    ],
)
def test_which_statement_a_key_is_of(key, pictures, statement):
    assert statement_of(key, pictures) == statement


def test_accuracy_and_consistency_of_pairs_as_the_published_script_has_them():
    keys = ["dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-2-0-0", "dev-2-1-0"]
    labels = ["true", "false", "true", "true", "false"]
    said = ["true", "false", "false", "true", "true"]
    pairs = [(0, 1), (2, 3), (0, 1), (4, 5), (5, 4)]
    model = Judge(("false", "true"), 2)
    found = evaluate_nlvr(model, examples("nlvr", said, labels, keys=keys, pictures=pairs), OPTIONS, silent)
    assert found.metrics["nlvr_accuracy"] == pytest.approx(60)
    # By set and sentence: dev-1 sentence 0 (right, right), dev-1 sentence 1 (wrong), dev-2 sentence 0 (right, wrong).
    assert found.metrics["nlvr_consistency"] == pytest.approx(100 / 3)
    assert found.counts["statements"] == 3
    assert found.baselines["nlvr_accuracy"] == pytest.approx(60)
    assert [tuple(map(int, each)) for each in model.seen] == pairs
    # What was found together is drawn together: by set, statements of one set too.
    assert found.units["nlvr_accuracy"].groups.tolist() == [0, 0, 0, 1, 1]
    assert found.units["nlvr_consistency"].groups.tolist() == [0, 0, 1]
    assert "intervals by set of pairs" in found.protocol


def test_orders_of_boxes_and_scenes_of_a_statement_are_drawn_together():
    keys = [f"dev-7-{scene}-{order}" for scene in range(2) for order in range(6)] + ["dev-8-0-0"]
    data = examples("nlvr", ["true"] * 13, ["true"] * 6 + ["false"] * 6 + ["true"], keys=keys)
    found = evaluate_nlvr(Judge(("false", "true")), data, OPTIONS, silent)
    for metric in ("nlvr_accuracy", "nlvr_consistency"):
        assert len(found.units[metric].names) == 2
    assert found.metrics["nlvr_consistency"] == pytest.approx(50)
    assert "intervals by statement" in found.protocol


@pytest.mark.parametrize("loss", [{"skipped": {"no_image": 2}}, {"deselected": {"limit": 2, "task": 9}}])
def test_consistency_is_not_told_of_parts_of_statements(loss):
    data = examples("nlvr", ["true", "true"], ["true", "false"], keys=["dev-7-0-0", "dev-8-0-0"])
    for name, counts in loss.items():
        setattr(data, name, counts)
    found = evaluate_nlvr(Judge(("false", "true")), data, OPTIONS, silent)
    assert set(found.metrics) == {"nlvr_accuracy"}
    assert found.details["skipped"]["nlvr_consistency"].startswith("2 examples were left out")
    data.skipped, data.deselected = {}, {"task": 9, "split": 3}
    whole = evaluate_nlvr(Judge(("false", "true")), data, OPTIONS, silent)
    assert whole.metrics["nlvr_consistency"] == 50
    assert "skipped" not in whole.details


def test_one_picture_is_shown_twice_to_a_model_of_pairs_and_keys_of_no_form_give_no_consistency():
    model = Judge(("false", "true"), 2)
    found = evaluate_nlvr(model, examples("nlvr", ["true", "true"], ["true", "false"]), OPTIONS, silent)
    assert set(found.metrics) == {"nlvr_accuracy"}
    assert found.units["nlvr_accuracy"].names == ("i0", "i1")
    assert "intervals by" not in found.protocol
    assert model.seen == [[0.0, 0.0], [1.0, 1.0]]


def test_entailment_by_class_whatever_the_order_of_the_models_classes():
    order = ("neutral", "entailment", "contradiction")
    labels = ["entailment", "entailment", "neutral", "contradiction", "contradiction"]
    said = ["entailment", "neutral", "neutral", "entailment", "contradiction"]
    found = evaluate_entailment(Judge(order), examples("entailment", said, labels), OPTIONS, silent)
    assert found.metrics == {
        "entailment_accuracy": pytest.approx(60),
        "entailment_accuracy:contradiction": pytest.approx(50),
        "entailment_accuracy:neutral": pytest.approx(100),
        "entailment_accuracy:entailment": pytest.approx(50),
    }
    assert found.baselines["entailment_accuracy"] == pytest.approx(40)
    assert found.details["chance"] == pytest.approx(100 / 3)
    assert found.details["confusion"]["contradiction"] == {"contradiction": 1, "entailment": 1}


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (Judge(("yes", "no")), {"labels": ["true"]}, "--tasks nlvr: 2 classes"),
        (Judge(("false", "true")), {"labels": [None]}, "1 examples label"),
        (Judge(("false", "true")), {"labels": ["true"], "pictures": [(0, 1)]}, "--single"),
    ],
)
def test_what_cannot_be_judged_is_one_line(model, data, message):
    with refused(message):
        evaluate_nlvr(model, examples("nlvr", ["true"], **data), OPTIONS, silent)
