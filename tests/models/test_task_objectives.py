"""Catches: weights that reach another answer, padding or empty places for answers that count, a micro-batch that changes
the loss, an accuracy that is not what the model would write, labels against the wrong logit.
"""

from __future__ import annotations

import math

import pytest
import torch

from capfilt.data.task_corpus import TaskBatch
from capfilt.errors import UserError
from capfilt.inference.decoding import Limits, sample
from capfilt.models import build
from capfilt.models.blip.tasks import NlvrConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.classifier import ClassifierConfig
from capfilt.models.common.task_objectives import AnsweringConfig, ClassifierTraining, VqaTraining
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.models.interop.reference import loud
from tests.refusals import refused

VISION = VisionConfig(16, 8, 16, 1, 2, 32)
TEXT = TextConfig(30, 16, 2, 2, 40, max_positions=12)
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0], [2, 5, 6, 3, 0]])
CLS, SEP = 2, 3


def batch(**more) -> TaskBatch:
    rows = torch.arange(3)
    return TaskBatch(
        ids=IDS, mask=IDS != 0, image_index=rows, text_index=rows, example=rows, weight=torch.ones(3),
        sided=torch.zeros(3, dtype=torch.bool), texts=[""] * 3, step=0, epoch=0, **more,
    )  # fmt: skip


def questions(answers, weights) -> TaskBatch:
    """answers: three lists of lists of tokens; weights alike. Empty places hold a copy of the first answer."""
    most = max(map(len, answers))
    longest = max(len(answer) for each in answers for answer in each) + 2
    ids, weight = torch.zeros(3, most, longest, dtype=torch.int64), torch.zeros(3, most)
    for row, each in enumerate(answers):
        for place in range(most):
            tokens = [CLS, *each[place if place < len(each) else 0], SEP]
            ids[row, place, : len(tokens)] = torch.tensor(tokens)
            weight[row, place] = weights[row][place] if place < len(each) else 0.0
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return batch(pixels=pixels, answer_ids=ids, answer_mask=ids != 0, answer_weight=weight)


ANSWERS = [[[7], [8, 9, 10], [12]], [[5, 6]], [[20], [21, 22]]]
WEIGHTS = [[0.6, 0.3, 0.1], [1.0], [0.1, 0.06]]


@pytest.fixture
def answering():
    return loud(build(VqaConfig(VISION, TEXT)), 2)


@torch.no_grad()
def test_the_answering_loss_is_its_formula(answering):
    given = questions(ANSWERS, WEIGHTS)
    found = VqaTraining(answering).eval().losses(given)
    total = 0.0
    for row, (answers, weights) in enumerate(zip(ANSWERS, WEIGHTS, strict=True)):
        ids = IDS[row : row + 1, : int((IDS[row] != 0).sum())]
        states = answering.encode_question(ids, None, answering.encode_image(given.pixels[row : row + 1]))
        cross = answering.prefill_cross(states)
        for answer, weight in zip(answers, weights, strict=True):
            tokens = torch.tensor([[CLS, *answer, SEP]])
            scores = answering.answer_logits(tokens, None, cross, None)[0].tolist()
            for place, token in enumerate([*answer, SEP]):
                line = scores[place]
                log_sum = math.log(sum(math.exp(score) for score in line))
                right = log_sum - line[token]
                any_token = sum(log_sum - score for score in line) / len(line)
                total += weight * (0.9 * right + 0.1 * any_token)
    assert float(found["loss"]) == pytest.approx(total / 3, rel=1e-5)
    plain = VqaTraining(answering, AnsweringConfig(label_smoothing=0.0)).eval().losses(given)["loss"]
    assert float(plain) != pytest.approx(total / 3, rel=1e-3)


@torch.no_grad()
def test_micro_batches_make_the_same_loss_and_empty_places_none(answering):
    given = questions(ANSWERS, WEIGHTS)
    module = VqaTraining(answering).eval()
    whole = module.losses(given)
    for figure in ("loss", "accuracy"):
        parts = sum(float(module.losses(part)[figure]) * len(part) / 3 for part in given.split(2))
        assert parts == pytest.approx(float(whole[figure]), rel=1e-5)
    other = questions(ANSWERS, WEIGHTS)
    other.answer_ids[1, 1:, 1] = 25
    assert torch.equal(module.losses(other)["loss"], whole["loss"])


@torch.no_grad()
def test_the_accuracy_is_the_weight_of_what_greedy_decoding_writes(answering):
    pixels = questions(ANSWERS, WEIGHTS).pixels
    limits = Limits(sep_id=SEP, pad_id=0, max_new_tokens=8, min_new_tokens=0, repetition_penalty=1.0)
    states = answering.encode_question(IDS, IDS != 0, answering.encode_image(pixels))
    writer, cross = answering.writer(IDS != 0), answering.prefill_cross(states)
    written = sample(writer, cross, torch.tensor([CLS]), 3, limits).tokens.tolist()
    best = [row[: row.index(SEP)] if SEP in row else row for row in written]
    assert all(SEP in row for row in written), "each answer must end, or it cannot be given"
    given = questions([[best[0], [7]], [[5, 6]], [[9], best[2]]], [[0.6, 0.4], [1.0], [0.15, 0.05]])
    found = VqaTraining(answering).eval().losses(given)["accuracy"]
    assert float(found) == pytest.approx((0.6 + 0.0 + 0.25) / 3, abs=1e-6)


@torch.no_grad()
def test_statements_have_their_label_for_a_target():
    model = loud(build(NlvrConfig(VISION, TEXT)), 2)
    pixels = torch.randn(3, 2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    likely = model.judge(IDS, IDS != 0, pixels).softmax(1)[:, 1].tolist()
    for labels in ([0, 1, 1], [1, 1, 0]):
        found = ClassifierTraining(model).eval().losses(batch(pixels=pixels, label=torch.tensor(labels)))
        terms = [-math.log(p if label else 1 - p) for p, label in zip(likely, labels, strict=True)]
        assert float(found["loss"]) == pytest.approx(sum(terms) / 3, rel=1e-4)
        right = [(p > 0.5) == bool(label) for p, label in zip(likely, labels, strict=True)]
        assert float(found["accuracy"]) == pytest.approx(sum(right) / 3)


def test_batches_of_another_task_are_refused_by_name(answering):
    pixels = torch.zeros(3, 3, 16, 16)
    with refused("vqa"):
        VqaTraining(answering).losses(batch(pixels=pixels))
    model = build(NlvrConfig(VISION, TEXT))
    with pytest.raises(UserError, match="1 pictures per text"):
        ClassifierTraining(model).losses(batch(pixels=pixels, label=torch.zeros(3, dtype=torch.int64)))
    with refused("no pixels"):
        ClassifierTraining(model).losses(batch())


@pytest.mark.parametrize("task", ["vqa", "nlvr"])
def test_half_precision_changes_little_and_losses_stay_whole(answering, task):
    """A head or a loss computed in bf16, or dtypes that do not meet, found out on the first GPU."""
    if task == "vqa":
        module, given = VqaTraining(answering), questions(ANSWERS, WEIGHTS)
    else:
        module = ClassifierTraining(loud(build(NlvrConfig(VISION, TEXT)), 2))
        given = batch(pixels=torch.randn(3, 2, 3, 16, 16), label=torch.tensor([0, 1, 1]))
    module.eval()
    plain = module.losses(given)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        half = module.losses(given)["loss"]
    half.backward()
    assert half.dtype == plain.dtype == torch.float32
    found, expected = float(half.detach()), float(plain.detach())
    assert found == pytest.approx(expected, rel=0.1)
    assert found != expected, "autocast should have done something"


@torch.no_grad()
@pytest.mark.parametrize("closed", [True, False])
def test_a_classifiers_loss_is_its_formula_and_its_accuracy_the_likeliest_class(closed):
    task, classes = ("vqa", ("a", "b", "c")) if closed else ("entailment", ("x", "y", "z"))
    model = loud(build(ClassifierConfig(VISION, TEXT, task=task, classes=classes)), 6)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.6, 0.6], [0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 0, 1])
    given = batch(pixels=pixels, **({"targets": targets} if closed else {"label": labels}))
    found = ClassifierTraining(model).eval().losses(given)
    scores = model.class_logits(IDS, IDS != 0, model.encode_image(pixels)).tolist()
    loss = right = 0.0
    for row, line in enumerate(scores):
        best = line.index(max(line))
        if closed:
            for score, target in zip(line, targets[row].tolist(), strict=True):
                likely = 1 / (1 + math.exp(-score))
                loss -= (target * math.log(likely) + (1 - target) * math.log(1 - likely)) / 3
            right += float(targets[row, best]) / 3
        else:
            loss += (math.log(sum(map(math.exp, line))) - line[labels[row]]) / 3
            right += (best == int(labels[row])) / 3
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx(right, rel=1e-5)
    parts = [ClassifierTraining(model).eval().losses(part) for part in given.split(2)]
    for name in ("loss", "accuracy"):
        assert float(2 * parts[0][name] + parts[1][name]) / 3 == pytest.approx(float(found[name]), rel=1e-5)


@torch.no_grad()
def test_answers_that_compete_are_judged_by_their_shares():
    """Would catch: shares that do not add up to 1, and a question without an answer on the list that pulls somewhere."""
    model = loud(build(ClassifierConfig(VISION, TEXT, task="vqa", classes=("a", "b", "c"))), 6)
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    given = batch(pixels=pixels, targets=torch.tensor([[1.0, 0.3, 0.0], [0.0, 0.6, 0.6], [0.0, 0.0, 0.0]]))
    found = ClassifierTraining(model, softmax=True).eval().losses(given)
    scores = model.class_logits(IDS, IDS != 0, model.encode_image(pixels)).tolist()
    loss = 0.0
    for line, shares in zip(scores, ([1 / 1.3, 0.3 / 1.3, 0.0], [0.0, 0.5, 0.5], [0.0] * 3), strict=True):
        total = math.log(sum(map(math.exp, line)))
        loss += sum(share * (total - score) for share, score in zip(shares, line, strict=True)) / 3
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)


def test_a_classifier_refuses_a_batch_that_says_nothing():
    model = build(ClassifierConfig(VISION, TEXT))
    with pytest.raises(UserError, match="neither labels nor targets"):
        ClassifierTraining(model).losses(batch(pixels=torch.zeros(3, 3, 16, 16)))
