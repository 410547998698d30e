"""Catches losses that go by no weight, by the weight of another row, or that are not weighted means."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from capfilt.models import build, family_named, preset
from capfilt.models.blip.model import BlipPretraining, PretrainingConfig
from capfilt.models.common.objectives import contrastive_loss, language_loss, matching_loss
from capfilt.models.locked.model import LockedTraining
from capfilt.stages.registry import stage_command
from capfilt.stages.train import Retrain
from capfilt.tables.workspace import Workspace
from tests.models import test_albef_pretraining as albef
from tests.models import test_contrast as clip
from tests.models import test_matching as vilt
from tests.models.rows import MICRO, rows
from tests.refusals import refused

TIMES = torch.tensor([2.0, 0.0, 1.0, 3.0])
AGAIN = torch.repeat_interleave(torch.arange(4), TIMES.long())


def test_a_text_that_weighs_three_is_worth_three():
    """Losses of rows that do not compare each other: repeating a row is the same to the last digits."""
    generator = torch.Generator().manual_seed(0)
    logits, label = torch.randn(4, 2, generator=generator), torch.tensor([0, 1, 1, 0])
    weighed = matching_loss(logits, label, weight=TIMES)
    torch.testing.assert_close(weighed.loss, matching_loss(logits[AGAIN], label[AGAIN]).loss)
    assert weighed.accuracy == matching_loss(logits, label).accuracy
    words, ids = torch.randn(4, 5, 9, generator=generator), torch.randint(1, 9, (4, 5), generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 2])[:, None]
    expected = language_loss(words[AGAIN], ids[AGAIN], mask[AGAIN], 1)
    torch.testing.assert_close(language_loss(words, ids, mask, 1, weight=TIMES), expected)
    images, texts = (F.normalize(torch.randn(4, 6, generator=generator), dim=1) for _ in range(2))
    target = torch.eye(4)
    every = contrastive_loss(images[AGAIN], texts[AGAIN], images, texts, 0.1, (target[AGAIN], target[AGAIN]))
    found = contrastive_loss(images, texts, images, texts, 0.1, (target, target), None, TIMES.sum(), TIMES)
    torch.testing.assert_close(found, every)


def blip_case():
    config = PretrainingConfig(queue_size=0, momentum=None)
    return BlipPretraining(build(MICRO, seed=3), config), rows(4)


def locked_case():
    return LockedTraining(build(preset("locked", "tiny", 40), seed=3)), rows(4)


def vilt_case():
    module = vilt.trained(alignment=0.3)
    return module, vilt.batch_of(slice(0, 4))


def albef_case():
    shared, part = albef.CASES["albef"]
    return shared(albef.Ranks()), part(slice(0, 4))


CASES = {
    "blip": blip_case,
    "albef": albef_case,
    "vilt": vilt_case,
    "clip": lambda: (clip.trained("softmax"), clip.batch_of(slice(0, 4))),
    "clip in chunks": lambda: (clip.trained("softmax", chunk=3), clip.batch_of(slice(0, 4))),
    "sigmoid": lambda: (clip.trained("sigmoid"), clip.batch_of(slice(0, 4))),
    "locked": locked_case,
}


def gradient(module, batch, weight):
    torch.manual_seed(4)
    module.zero_grad()
    found = module.losses(dataclasses.replace(batch, weight=weight))
    found["loss"].backward()
    return torch.cat([each.grad.flatten() for each in module.parameters() if each.grad is not None]), found


@pytest.mark.parametrize("name", CASES)
def test_a_weighted_loss_is_the_mean_of_each_rows_own(name):
    """With the weight on one row alone, a loss is that row's; the loss of all is their mean, by weight."""
    module, batch = CASES[name]()
    # Each text with as many tokens to name as any other, so that a mean over tokens is one over texts.
    batch = dataclasses.replace(batch, mask=batch.ids > -1)
    if hasattr(module, "masking"):
        module.masking = second
    alone = [gradient(module, batch, row) for row in torch.eye(4)]
    losses = [name for name in ("itc", "itm", "lm", "mlm", "wpa", "contrast", "loss") if name in alone[0][1]]
    for weight in (TIMES, TIMES / 7):
        slope, found = gradient(module, batch, weight)
        share = weight / weight.sum()
        for part in losses:
            rows = torch.stack([each[part].detach() for _, each in alone])
            assert rows.std() > 0, f"{part} is the same whatever row counts"
            torch.testing.assert_close(found[part].detach(), (share * rows).sum(), atol=1e-5, rtol=1e-5)
        expected = (share[:, None] * torch.stack([each for each, _ in alone])).sum(dim=0)
        torch.testing.assert_close(slope, expected, atol=1e-5, rtol=1e-4)
    slope, found = gradient(module, batch, torch.ones(4))
    plain, unweighed = gradient(module, batch, None)
    torch.testing.assert_close(found["loss"], unweighed["loss"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope, plain, atol=1e-6, rtol=1e-5)


def second(ids, mask):
    said = torch.full_like(ids, -100)
    said[:, 1] = ids[:, 1]
    return ids, said


def test_no_weight_at_all_is_no_loss():
    module, batch = blip_case()
    slope, found = gradient(module, batch, torch.zeros(4))
    assert found["loss"].item() == 0
    assert not slope.any()


def test_a_family_whose_losses_take_no_weights_is_refused(tmp_path, monkeypatch):
    deaf = dataclasses.replace(family_named("locked"), heeds=())
    monkeypatch.setattr("capfilt.stages.train.family_named", lambda name: deaf)
    options = stage_command("retrain-locked").options(preset="tiny", pairs=("kept",), steps=1, weights="loss")
    with refused("--weights loss", "locked"):
        Retrain(options, Workspace(tmp_path))
