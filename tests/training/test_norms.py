"""Catches running statistics that move twice in a step, move while frozen, or are left out of averaged weights."""

from __future__ import annotations

import copy

import pytest
import torch

from capfilt.data.loader import Batch
from capfilt.models.contrast import ClipTraining, ContrastConfig
from capfilt.models.norms import standing, statistics, training_mode
from capfilt.training.average import swapped
from capfilt.training.loop import TrainConfig, train
from tests.models.interop.clips import RESNET, sharpened, texts

STEPS = 3


def batch(step: int) -> Batch:
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=generator)
    ids = texts(RESNET)
    rows = torch.arange(4)
    return Batch(
        step=step, epoch=0, texts=("",) * 4, ids=ids, mask=ids > 0, image_index=rows, text_index=rows,
        example=rows, weight=torch.ones(4),
        sided=torch.zeros(4, dtype=torch.bool), pixels=pixels,
    )  # fmt: skip


def trained(model, **config):
    settings = TrainConfig(
        steps=STEPS, batch_size=4, learning_rate=1e-3, warmup_steps=0, log_every=1, **config
    )
    module = ClipTraining(model, ContrastConfig())
    return module, train(module, [batch(step) for step in range(STEPS)], settings, examples=4)


def test_a_step_computed_again_moves_them_once():
    plain, again = sharpened(RESNET), sharpened(RESNET)
    again.recompute_activations()
    before = copy.deepcopy(plain.state_dict())
    for model in (plain, again):
        trained(model)
    moved = [name for name in before if name.endswith("running_mean")]
    assert moved
    for name, tensor in again.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=1e-5, atol=1e-6)
        if name in moved:
            assert not torch.equal(tensor, before[name])


def test_those_of_a_frozen_tower_stand_still():
    model = sharpened(RESNET)
    model.visual_encoder.requires_grad_(False)
    before = copy.deepcopy(model.visual_encoder.state_dict())
    trained(model)
    for name, tensor in model.visual_encoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.training
    assert not statistics(training_mode(model))


def test_averaged_weights_have_averaged_statistics():
    """With the live ones, an averaged ResNet is evaluated with means and variances of other weights than its own."""
    model = sharpened(RESNET)
    names = list(statistics(training_mode(model)))
    name = "model." + names[0]
    live = [model.state_dict()[names[0]].clone()]
    seen = []

    def look(step, values):
        seen.append(model.state_dict()[names[0]].clone())

    settings = TrainConfig(
        steps=STEPS, batch_size=4, learning_rate=1e-3, warmup_steps=0, log_every=1, ema=0.9
    )
    module = ClipTraining(model, ContrastConfig())
    result = train(module, [batch(step) for step in range(STEPS)], settings, examples=4, on_step=look)
    average = live[0]
    for done, each in enumerate(seen):
        decay = min(0.9, (1 + done) / (10 + done))
        average = decay * average + (1 - decay) * each
    torch.testing.assert_close(result.average[name], average)
    with swapped(module, result.average):
        torch.testing.assert_close(model.state_dict()[names[0]], average)
    assert torch.equal(model.state_dict()[names[0]], seen[-1])


@pytest.mark.parametrize("fails", [False, True])
def test_standing_ends(fails):
    model = training_mode(sharpened(RESNET))
    before = copy.deepcopy(model.state_dict())
    try:
        with standing(model.visual_encoder):
            model.encode_image(batch(0).pixels)
            if fails:
                raise ValueError
    except ValueError:
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.encode_image(batch(0).pixels)
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
