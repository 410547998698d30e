"""Catches: a head fed another position than [ENC], or another form of head than its source's, padding or pictures that change
the logits where they must not, a start that leaves a pretrained tensor behind, a checkpoint that forgets its classes.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from capfilt.data.tokenizer import Tokenizer
from capfilt.models import build, checkpoint
from capfilt.models.blip.model import BlipConfig
from capfilt.models.blip.tasks import BlipClassifier, classifier_from_blip
from capfilt.models.common.classifier import ClassifierConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.export import homes, places
from tests.models.interop.reference import loud
from tests.refusals import refused

VISION = VisionConfig(16, 8, 24, 1, 2, 48)
TEXT = TextConfig(30, 16, 2, 2, 40, max_positions=12)
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0], [2, 5, 6, 3, 0]])
MASK = IDS != 0
ANSWERS = ("yes", "no", "2", "red", "dog")


def config(task="entailment"):
    classes = ANSWERS if task == "vqa" else ("contradiction", "neutral", "entailment")
    return ClassifierConfig(VISION, TEXT, task=task, classes=classes)


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
@pytest.mark.parametrize("task", ["entailment", "vqa"])
def test_logits_are_the_published_head_on_the_state_of_enc(task):
    model = loud(build(config(task)))
    tokens = model.encode_image(pictures())
    found = model.class_logits(IDS, MASK, tokens)
    weights = model.state_dict()
    started = IDS.clone()
    started[:, 0] = TEXT.enc_id
    states = model.text_encoder(started, MASK, model.text_encoder.cross_keys_values(tokens))[:, 0]
    x = F.linear(states, weights["cls_head.0.weight"], weights["cls_head.0.bias"])
    if task == "vqa":
        centred = x - x.mean(-1, keepdim=True)
        x = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        x = x * weights["cls_head.1.weight"] + weights["cls_head.1.bias"]
        x = F.linear(
            0.5 * x * (1 + torch.erf(x / 2**0.5)), weights["cls_head.3.weight"], weights["cls_head.3.bias"]
        )
        assert weights["cls_head.0.weight"].shape == (32, 16)
    else:
        x = F.linear(x.clamp(min=0), weights["cls_head.2.weight"], weights["cls_head.2.bias"])
    assert found.shape == (3, len(model.config.classes))
    assert found.dtype == torch.float32
    assert torch.allclose(found, x, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing_and_the_picture_does():
    model = loud(build(config()))
    tokens = model.encode_image(pictures())
    whole = model.class_logits(IDS, MASK, tokens)
    alone = torch.cat(
        [
            model.class_logits(IDS[row : row + 1, : int(MASK[row].sum())], None, tokens[row : row + 1])
            for row in range(3)
        ]
    )
    assert torch.allclose(whole, alone, atol=1e-5)
    assert not torch.allclose(whole, model.class_logits(IDS, MASK, tokens.flip(0)), atol=1e-2)


def test_it_starts_from_a_blip_a_filter_or_another_classifier():
    blip = loud(build(BlipConfig(VISION, TEXT, embed_dim=8)), 3)
    made = classifier_from_blip(blip, "vqa", ANSWERS, seed=1, drop_path=0.2)
    assert made.config.vision.drop_path == 0.2
    theirs, ours = blip.state_dict(), made.state_dict()
    for name, tensor in ours.items():
        assert name.startswith("cls_head.") or torch.equal(tensor, theirs[name]), name
    assert not any(name.startswith(("text_decoder", "itm_head", "vision_proj")) for name in ours)
    other = classifier_from_blip(made, "entailment", ("a", "b"), seed=2, drop_path=0.0)
    for name, tensor in other.state_dict().items():
        assert name.startswith("cls_head.") or torch.equal(tensor, theirs[name]), name
    assert other.state_dict()["cls_head.2.weight"].shape == (2, 16)
    again = classifier_from_blip(made, "entailment", ("a", "b"), seed=2, drop_path=0.0)
    assert torch.equal(again.cls_head[0].weight, other.cls_head[0].weight)
    with refused("captioner", "filter"):
        classifier_from_blip(build(dataclasses.replace(blip.config, half="captioner")), "vqa", ANSWERS)


def test_classes_must_be_two_or_more_and_each_once():
    for classes in (("a",), ("a", "a")):
        with refused("classifier", "two classes"):
            ClassifierConfig(VISION, TEXT, classes=classes)


def test_a_checkpoint_keeps_its_classes_and_belongs_in_no_other_layout(tmp_path):
    tokenizer = Tokenizer.train(["a red dog", "two cats"], 60)
    text = dataclasses.replace(TEXT, vocab_size=tokenizer.vocab_size)
    made = ClassifierConfig(VISION, text, task="vqa", classes=ANSWERS, max_words=7)
    model = loud(build(made))
    checkpoint.save(tmp_path / "saved", model, tokenizer)
    contents, meta = checkpoint.open_any(tmp_path / "saved")
    assert type(contents.model) is BlipClassifier
    assert contents.model.config == made
    assert meta["model_type"] == "blip_classifier"
    for name, tensor in model.state_dict().items():
        assert torch.equal(contents.model.state_dict()[name], tensor)
    with refused(tmp_path / "saved", "classifies"):
        checkpoint.load(tmp_path / "saved")
    assert homes("saved", places(made)) == []  # no other project has a class for it


@torch.no_grad()
def test_classes_of_pictures_are_read_from_the_vision_towers_cls_alone(tmp_path):
    blip = loud(build(BlipConfig(VISION, TEXT, half="captioner")), 3)
    model = classifier_from_blip(blip, "classification", ("cat", "dog", "tree"), drop_path=0.0).eval()
    tokens = model.encode_image(pictures())
    assert torch.equal(tokens, blip.eval().encode_image(pictures()))
    found = model.judge(IDS, MASK, pictures()[:, None])
    assert torch.allclose(found, F.linear(tokens[:, 0], model.cls_head[0].weight, model.cls_head[0].bias))
    assert torch.equal(found, model.judge(IDS.flip(0), None, pictures()[:, None]))
    assert not [name for name in model.state_dict() if name.startswith("text_encoder")]
