"""Catches a task's model that is not the published one: layers that look at the wrong picture or share the wrong weights, a
decoder that starts from the wrong layers, a [SEP] that is read, a start that leaves a tensor behind, a teacher that is not
heard or is moved by gradients; and texts that are assigned to the wrong pictures."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from capfilt.data.loader import Batch
from capfilt.inference.answering import rank_answers
from capfilt.inference.decoding import Limits, sample
from capfilt.models import build, checkpoint, kind_of
from capfilt.models.albef.model import without_end
from capfilt.models.albef.tasks import (
    ASSIGNED,
    TextAssignment,
    classifier_from_albef,
    nlvr_from_albef,
    two_others,
    vqa_from_albef,
)
from capfilt.models.common.task_objectives import AnsweringConfig, ClassifierTraining, VqaTraining
from tests.models import albef_reference as plain
from tests.models.interop.reference import loud
from tests.models.test_albef import MICRO_ALBEF
from tests.models.test_task_objectives import batch, questions
from tests.refusals import refused

IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0], [2, 5, 6, 3, 0]])
MASK = IDS != 0
LABELS = ("contradiction", "neutral", "entailment")
# Another width of vision tells keys and values of pictures from those of questions.
WIDE = dataclasses.replace(MICRO_ALBEF, vision=dataclasses.replace(MICRO_ALBEF.vision, width=48))


def pretrained(config=MICRO_ALBEF):
    return loud(build(config), 5)


def pictures(count, seed=4):
    return torch.randn(3, count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def unpadded():
    """The ids of each row, without the end that is not read."""
    return [row[keep][:-1] for row, keep in zip(IDS, MASK, strict=True)]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("config", [MICRO_ALBEF, WIDE])
@torch.no_grad()
def test_judging_is_the_published_pass(count, config):
    start = pretrained(config)
    made = classifier_from_albef(start, "entailment", LABELS) if count == 1 else nlvr_from_albef(start)
    model = loud(made, 6)
    state, images = model.state_dict(), pictures(count)
    found = model.judge(IDS, MASK, images)
    depth = 4 if count == 1 else 6
    for row, ids in enumerate(unpadded()):
        seen = [plain.picture(state, image, 2) for image in images[row]]
        first = plain.read(state, "text_encoder.", ids, depth, 2, 2, seen)[0]
        logits = plain.linear(state, "cls_head.2", plain.linear(state, "cls_head.0", first).clamp(min=0))
        torch.testing.assert_close(found[row], logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_pictures_alone_are_judged_without_a_text():
    start = pretrained()
    model = loud(classifier_from_albef(start, "classification", ("cat", "dog", "owl")), 6)
    images = pictures(1)
    found = model.judge(IDS, MASK, images)
    for row in range(3):
        seen = plain.picture(model.state_dict(), images[row, 0], 2)
        torch.testing.assert_close(
            found[row], plain.linear(model.state_dict(), "cls_head.0", seen[0]), atol=1e-5, rtol=1e-5
        )
    with refused("classifier", "text"):
        classifier_from_albef(model, "entailment", LABELS)


def test_each_layer_that_fuses_is_doubled_and_shares_its_keys_and_values():
    start = pretrained()
    model = nlvr_from_albef(start)
    assert [layer.crossattention is not None for layer in model.text_encoder.layers] == [False] * 2 + [
        True
    ] * 4
    for place, origin in enumerate((0, 1, 2, 2, 3, 3)):
        ours, theirs = (
            each.text_encoder.layers[number].state_dict()
            for each, number in ((model, place), (start, origin))
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, two = (model.text_encoder.layers[place].crossattention for place in (2, 3))
    assert one.self.key.weight is two.self.key.weight
    assert one.self.value.bias is two.self.value.bias
    assert one.self.query.weight is not two.self.query.weight
    assert one.output.dense.weight is not two.output.dense.weight


@pytest.mark.parametrize("config", [MICRO_ALBEF, WIDE])
@torch.no_grad()
def test_answers_are_the_published_pass(config):
    model = loud(vqa_from_albef(pretrained(config)), 6)
    state, images = model.state_dict(), pictures(1)[:, 0]
    answers = torch.tensor([[2, 20, 21, 3], [2, 9, 3, 0], [2, 30, 31, 3]])
    states = model.encode_question(IDS, MASK, model.encode_image(images))
    found = model.answer_logits(answers, answers != 0, model.prefill_cross(states), MASK)
    for row, ids in enumerate(unpadded()):
        asked = plain.read(state, "text_encoder.", ids, 4, 2, 2, [plain.picture(state, images[row], 2)])
        answer = answers[row][answers[row] != 0]
        x = plain.embedded(state, "text_decoder.bert.", answer)
        for index in range(2):
            x = plain.layer(state, f"text_decoder.bert.encoder.layer.{index}", x, 2, asked, causal=True)
        words = state["text_decoder.bert.embeddings.word_embeddings.weight"]
        logits = plain.named(state, "text_decoder.cls.predictions.", words, x)
        torch.testing.assert_close(found[row, : len(answer)], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [MICRO_ALBEF, WIDE])
def test_answering_starts_from_the_fusing_layers_and_the_language_head(config):
    start = pretrained(config)
    model = vqa_from_albef(start, seed=1)
    for place in (0, 1):
        ours = model.text_decoder.bert.layers[place].state_dict()
        theirs = start.text_encoder.layers[2 + place].state_dict()
        other = [
            name
            for name, each in theirs.items()
            if each.shape != ours[name].shape or not torch.equal(ours[name], each)
        ]
        fresh = [
            f"crossattention.self.{part}.{leaf}" for part in ("key", "value") for leaf in ("weight", "bias")
        ]
        assert sorted(other) == ([] if config is MICRO_ALBEF else sorted(fresh))
    for name, each in start.mlm_head.state_dict().items():
        assert torch.equal(model.text_decoder.cls.predictions.state_dict()[name], each)
    words = [each.embeddings.word_embeddings.weight for each in (model.text_encoder, model.text_decoder.bert)]
    assert torch.equal(*words)
    assert words[0] is not words[1]


@torch.no_grad()
def test_writing_and_ranking_go_by_the_same_logits():
    model = vqa_from_albef(pretrained())
    images = pictures(1)[:, 0]
    states = model.encode_question(IDS, MASK, model.encode_image(images))
    cross = model.prefill_cross(states)
    limits = Limits(sep_id=3, pad_id=0, max_new_tokens=4, min_new_tokens=4, repetition_penalty=1.0)
    written = sample(model.writer(MASK), cross, torch.tensor([2]), 3, limits).tokens
    ids = torch.full((3, 1), 2)
    for step in range(written.shape[1]):
        logits = model.answer_logits(ids, None, cross, MASK)[:, -1]
        logits[:, 3] = -float("inf")
        assert torch.equal(logits.argmax(dim=1), written[:, step]), step
        ids = torch.cat([ids, written[:, step : step + 1]], dim=1)
    answers = torch.tensor([[2, 7, 3, 0], [2, 8, 9, 3], [2, 12, 3, 0], [2, 14, 15, 3]])
    best, score = rank_answers(model, IDS, MASK, images, answers, answers != 0)
    for row in range(3):
        own = [(keys[row : row + 1], values[row : row + 1]) for keys, values in cross]
        likely = []
        for answer in answers:
            tokens = answer[answer != 0][None]
            line = model.answer_logits(tokens, None, own, MASK[row : row + 1])[0].log_softmax(1)
            likely.append(sum(float(line[t, token]) for t, token in enumerate(tokens[0, 1:].tolist())))
        assert int(best[row]) == max(range(4), key=likely.__getitem__)
        assert float(score[row]) == pytest.approx(max(likely), abs=1e-4)


@pytest.mark.parametrize("kind", ["vqa", "classifier", "nlvr"])
def test_a_checkpoint_holds_it_and_shared_weights_stay_shared(kind, tmp_path, tokenizer_of):
    start = pretrained()
    model = {
        "vqa": vqa_from_albef,
        "classifier": lambda each: classifier_from_albef(each, "entailment", LABELS),
        "nlvr": lambda each: nlvr_from_albef(each, classes=ASSIGNED),
    }[kind](start)
    checkpoint.save(tmp_path / "run", model, tokenizer_of(40))
    loaded = checkpoint.open_any(tmp_path / "run")[0].model
    assert type(loaded) is type(model)
    assert loaded.config == model.config
    assert kind_of(loaded).name == f"albef_{kind}"
    for name, each in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], each), name
    if kind == "nlvr":
        one, two = (loaded.text_encoder.layers[place].crossattention for place in (4, 5))
        assert one.self.key is two.self.key


def apart(module):
    """With a copy that says something else than the model."""
    loud(module.momentum, 8)
    return module.eval()


@torch.no_grad()
def test_a_teachers_word_is_a_part_of_the_targets():
    model = classifier_from_albef(pretrained(), "entailment", LABELS)
    module = apart(ClassifierTraining(model, momentum=0.75))
    pixels, labels = pictures(1), torch.tensor([2, 0, 1])
    found = module.losses(batch(pixels=pixels[:, 0], label=labels), alpha=0.3)["loss"]
    own, said = (each.judge(IDS, MASK, pixels) for each in (model, module.momentum))
    target = 0.7 * F.one_hot(labels, 3) + 0.3 * said.softmax(dim=1)
    expected = -(target * own.log_softmax(dim=1)).sum(dim=1).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert float(module.losses(batch(pixels=pixels[:, 0], label=labels))["loss"]) == pytest.approx(
        float(F.cross_entropy(own, labels)), rel=1e-5
    )
    before, live = (float(each.cls_head[2].bias[0]) for each in (module.momentum, model))
    module.after_step()
    assert float(module.momentum.cls_head[2].bias[0]) == pytest.approx(0.75 * before + 0.25 * live, rel=1e-5)


def test_a_teacher_of_answers_is_heard_at_every_token_and_gets_no_gradient():
    module = apart(VqaTraining(vqa_from_albef(pretrained()), AnsweringConfig(0.0), momentum=0.995))
    given = questions([[[7], [8, 9]], [[5, 6]], [[20]]], [[0.6, 0.4], [1.0], [0.5]])
    found = module.losses(given, alpha=0.4)["loss"]
    expected = 0.0
    for row in range(3):
        lines = []
        for model in (module.model, module.momentum):
            states = model.encode_question(
                IDS[row : row + 1], MASK[row : row + 1], model.encode_image(given.pixels[row : row + 1])
            )
            cross = model.prefill_cross(states)
            lines.append([
                model.answer_logits(ids[mask][None], None, cross, MASK[row : row + 1])[0]
                for ids, mask in zip(given.answer_ids[row], given.answer_mask[row], strict=True)
            ])  # fmt: skip
        for own, said, ids, weight in zip(
            *lines, given.answer_ids[row], given.answer_weight[row], strict=True
        ):
            for place in range(len(own) - 1):
                target = 0.6 * F.one_hot(ids[place + 1], 38) + 0.4 * said[place].softmax(dim=0)
                expected = expected - weight * (target * own[place].log_softmax(dim=0)).sum() / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert all(each.grad is None for each in module.momentum.parameters())


def paired(count=6) -> Batch:
    number = torch.arange(count)
    ids = IDS.repeat(2, 1)[:count]
    pixels = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Batch(
        ids, ids != 0, number, number, number, torch.ones(count), number < 0, ["x"] * count, 0, 0, pixels=pixels
    )  # fmt: skip


def test_texts_are_assigned_a_third_each_and_by_their_pictures_places(monkeypatch):
    start = pretrained()
    model = nlvr_from_albef(start, classes=ASSIGNED)
    module = TextAssignment(model, start.vision_proj)
    rows = paired()
    tokens = model.encode_image(rows.pixels)
    shown = []

    def noting(self, image_tokens):
        shown.append(image_tokens)
        return type(model).prefill_cross(self, image_tokens)

    monkeypatch.setattr(model, "prefill_cross", noting.__get__(model))
    counts = torch.zeros(3)
    for seed in range(60):
        torch.manual_seed(seed)
        found = module.losses(rows)
        sides = shown.pop().chunk(2)
        own = [(side - tokens).abs().amax(dim=(1, 2)) < 1e-6 for side in sides]
        label = torch.where(own[0], 0, torch.where(own[1], 1, 2))
        assert not (own[0] & own[1]).any()
        # The two pictures of a text are never the same one.
        assert not any(torch.allclose(a, b) for a, b in zip(*sides, strict=True))
        counts += torch.bincount(label, minlength=3)
        logits = model.seen_logits(rows.ids, rows.mask, type(model).prefill_cross(model, torch.cat(sides)))
        assert float(found["loss"]) == pytest.approx(float(F.cross_entropy(logits, label)), rel=1e-4)
        assert float(found["accuracy"]) == pytest.approx(float((logits.argmax(1) == label).float().mean()))
    assert counts.sum() == 360
    assert (counts / 360 - 1 / 3).abs().max() < 0.08
    module.losses(rows)["loss"].backward()
    assert module.projection.weight.grad is None
    assert start.vision_proj.weight.requires_grad


def test_wrong_pictures_are_the_likely_ones_and_never_of_the_same_image_or_text():
    torch.manual_seed(0)
    scores = torch.zeros(5, 5)
    scores[0] = torch.tensor([9.0, 9.0, 2.0, 1.0, 0.0])
    image, text = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 1, 2, 3, 4])
    drawn = torch.stack([two_others(scores, image, text)[0][0] for _ in range(2000)])
    assert not (drawn <= 1).any()  # itself, and another text's copy of its picture
    assert (drawn[:, 0] != drawn[:, 1]).all()
    weights = scores[0, 2:].softmax(dim=0)
    share = torch.stack([(drawn[:, 0] == row).float().mean() for row in (2, 3, 4)])
    assert torch.allclose(share, weights, atol=0.04)
    assert two_others(scores[:3, :3], image[:3], text[:3])[1].tolist() == [False, False, True]
    assert two_others(scores[:1, :1], image[:1], text[:1])[1].tolist() == [False]


def test_assignment_needs_its_classes():
    start = pretrained()
    with refused("first, second, neither"):
        TextAssignment(nlvr_from_albef(start), start.vision_proj)
    assert without_end(IDS, MASK)[0].shape == (3, 4)
