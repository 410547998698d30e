"""Catches a dropped text that teaches something, a picture of one that does not, and soft targets of another formula."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models import build
from capfilt.models.blip.model import BlipPretraining, PretrainingConfig
from capfilt.models.common.layers import steady
from capfilt.models.common.objectives import hard_negatives, soft_target_loss
from tests.models import test_contrast as clip
from tests.models.rows import MICRO, rows
from tests.models.test_weights import CASES, gradient

HEEDING = [name for name in CASES if name != "vilt"]
SOFT = ["blip", "clip", "clip in chunks", "locked"]
DROPPED = torch.tensor([False, True, False, True])


def queued_case():
    config = PretrainingConfig(queue_size=9, momentum=0.9)
    return BlipPretraining(build(MICRO, seed=3), config), rows(4)


CASES = {**CASES, "blip with towers": queued_case}


def without(batch, **changes):
    """The batch with its second and fourth text dropped."""
    ids = batch.ids.clone()
    ids[DROPPED] = ids[0].clone()
    return dataclasses.replace(batch, dropped=DROPPED, ids=ids, **changes)


def other_pictures(batch, row: int):
    pixels = batch.pixels.clone()
    pixels[row] = 255 - pixels[row]
    return dataclasses.replace(batch, pixels=pixels)


@pytest.mark.parametrize("name", [*HEEDING, "blip with towers"])
def test_a_dropped_text_teaches_nothing_and_its_picture_is_a_negative(name):
    weight = (~DROPPED).float()
    module, batch = CASES[name]()
    batch = without(batch)
    slope, found = gradient(module, batch, weight)
    ids = batch.ids.clone()
    ids[DROPPED, 1:-1] = 7
    module, _ = CASES[name]()
    other, again = gradient(module, dataclasses.replace(batch, ids=ids), weight)
    torch.testing.assert_close(other, slope, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(again["loss"], found["loss"], atol=1e-6, rtol=1e-6)
    module, _ = CASES[name]()
    _, moved = gradient(module, other_pictures(batch, 1), weight)
    contrast = "itc" if "itc" in found else "contrast"
    assert abs(moved[contrast] - found[contrast]) > 1e-5
    for each in {"itm", "lm", "mlm"} & {*found}:
        torch.testing.assert_close(moved[each], found[each], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_losses_beside_dropped_texts_are_those_of_the_formulas(chunk):
    batch = without(clip.batch_of(slice(0, 4)), weight=(~DROPPED).float())
    kept = [0, 2]
    module = clip.trained("softmax", chunk=chunk)
    images = F.normalize(module.model.encode_image(batch.pixels), dim=1)
    texts = F.normalize(module.model.encode_text(batch.ids), dim=1)
    scale = module.model.logit_scale.exp()
    expected = torch.zeros(())
    for place, row in enumerate(kept):
        expected = expected - (scale * images[row] @ texts[kept].T).log_softmax(0)[place] / 4
        expected = expected - (scale * texts[row] @ images.T).log_softmax(0)[row] / 4
    torch.testing.assert_close(module.losses(batch)["loss"], expected, atol=1e-6, rtol=1e-5)
    module = clip.trained("sigmoid", chunk=chunk)
    images, texts = (
        F.normalize(each, dim=1)
        for each in (module.model.encode_image(batch.pixels), module.model.encode_text(batch.ids))
    )
    expected = torch.zeros(())
    for i in range(4):
        for j in kept:
            logit = module.model.logit_scale.exp() * images[i] @ texts[j] + module.model.logit_bias
            worth = 1.0 if i in kept else 0.5
            expected = expected - worth * F.logsigmoid(logit if i == j else -logit) / 2
    torch.testing.assert_close(module.losses(batch)["loss"], expected, atol=1e-6, rtol=1e-5)


def test_no_row_with_a_dropped_text_is_an_itm_negative_or_enters_the_queue():
    number, read = torch.arange(4), ~DROPPED
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        index, found = hard_negatives(
            torch.randn(4, 4), number, number, (number, number), generator=generator, read=read
        )
        assert found.all()
        assert read[index].all()
    module, batch = queued_case()
    module.train().losses(without(batch, weight=read.float()))
    assert module.queue.filled == 2
    assert module.queue.image_index[:2].tolist() == [0, 2]


def by_hand(images, stood, pictures, texts, temperature, weight, rows, read):
    total = 0.0
    for n in range(len(images)):
        some = [j for j in range(len(texts)) if read[j]]
        for query, judge, candidates in (
            (images[n], stood[n], [texts[j] for j in some]),
            (stood[n], images[n], list(pictures)),
        ):
            scores = [math.exp(float(query @ each) / temperature) for each in candidates]
            wanted = [math.exp(float(judge @ each) / 0.05) for each in candidates]
            p = [each / sum(scores) for each in scores]
            q = [each / sum(wanted) for each in wanted]
            cross = -sum(b * math.log(a) for a, b in zip(p, q, strict=True))
            reverse = -sum(a * math.log(max(b, 1e-4)) for a, b in zip(p, q, strict=True))
            total += float(weight[n]) * (cross + reverse) / 2
    return total / rows


def units(count: int, seed: int) -> Tensor:
    found = torch.randn(count, 6, generator=torch.Generator().manual_seed(seed))
    return F.normalize(found, dim=1)


def test_the_soft_target_loss_is_that_of_the_formula():
    images, stood, pictures, texts = (units(n, seed) for n, seed in ((3, 0), (3, 1), (5, 2), (5, 3)))
    read, weight = torch.tensor([True, False, True, True, False]), torch.tensor([0.5, 0.2, 0.0])
    given = (images, stood, pictures, texts, 0.1, weight, 4.0)
    expected = by_hand(*given, read.tolist())
    assert float(soft_target_loss(*given, read)) == pytest.approx(expected, rel=1e-5)
    # Nothing moves a target: only p has a gradient, which vanishes where p is the target already.
    judges = stood.clone().requires_grad_()
    loss = soft_target_loss(images, judges, pictures, texts, 0.05, torch.zeros(3), 4.0, read)
    loss.backward()
    assert not judges.grad.any()


@pytest.mark.parametrize("name", SOFT)
def test_a_soft_target_adds_its_loss_and_goes_by_the_neighbours_texts(name):
    module, batch = CASES[name]()
    weight = (~DROPPED).float()
    batch = without(batch)
    _, plain = gradient(module, batch, weight)
    soft = torch.tensor([0.0, 0.4, 0.0, 0.1])
    near = batch.ids[:, None].repeat(1, 5, 1)
    with_soft = dataclasses.replace(batch, soft=soft, near_ids=near, near_mask=near > -1)
    slope, found = gradient(module, with_soft, weight)
    model = module.model
    with torch.no_grad(), steady(module):
        images = model.embed_image(model.encode_image(batch.pixels))
        texts = F.normalize(
            model.embed_text(batch.ids) if "clip" in name else model.embed_text(batch.ids, batch.mask), dim=1
        )
        own = texts[0]  # the text that every dropped row has five times
        temperature = model.temperature if name == "blip" else 1 / model.logit_scale.exp()
        expected = by_hand(
            images[[1, 3]],
            [own, own],
            images,
            texts,
            float(temperature),
            soft[[1, 3]],
            2.0,
            (~DROPPED).tolist(),
        )
    contrast = "itc" if "itc" in found else "contrast"
    assert float(found[contrast] - plain[contrast]) == pytest.approx(expected, rel=1e-3)
    assert float(found["loss"] - plain["loss"]) == pytest.approx(expected, rel=1e-3)
    near = near.clone()
    near[0], near[2] = 9, 9  # of rows whose own text counts
    same, _ = gradient(module, dataclasses.replace(with_soft, near_ids=near), weight)
    torch.testing.assert_close(same, slope, atol=1e-7, rtol=1e-5)
    near[1] = near[2].clone()
    other, _ = gradient(module, dataclasses.replace(with_soft, near_ids=near), weight)
    assert not torch.allclose(other, slope, atol=1e-5)
    # A micro-batch without such a row has no loss of theirs.
    none, _ = gradient(module, dataclasses.replace(with_soft, soft=torch.zeros(4)), weight)
    torch.testing.assert_close(none, gradient(module, batch, weight)[0], atol=1e-7, rtol=1e-5)
