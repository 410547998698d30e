"""Catches a contrastive loss that is not the papers', that changes with how it is cut up or shared out, or that does not
learn."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models import build, preset
from capfilt.models.clip.model import (
    Clip,
    ClipConfig,
    ClipTextConfig,
    ClipTraining,
    ClipVisionConfig,
    ContrastConfig,
)
from capfilt.training.loop import TrainConfig, train
from tests.models.contrast_ranks import ROWS, gradients, gradients_of_two_ranks
from tests.training.grids import pairs, source

CONFIG = ClipConfig(ClipVisionConfig(16, 8, 32, 1, 2, 64), ClipTextConfig(40, 8, 32, 1, 2, 64), embed_dim=8)


def trained(loss: str = "softmax", *ranks, chunk: int = 0) -> ClipTraining:
    model = build(dataclasses.replace(CONFIG, logit_bias=loss == "sigmoid"), seed=3)
    return ClipTraining(model, ContrastConfig(loss, chunk), *ranks)


def batch_of(rows: slice = slice(None)) -> Batch:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 38, (ROWS, 6), generator=generator)
    ids[:, 0], ids[:, -1] = 38, 39
    pixels = torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    number = torch.arange(ROWS)
    every = Batch(
        ids, ids > 0, number, number, number, torch.ones(ROWS), number < 0, ["x"] * ROWS, 0, 0, pixels=pixels
    )
    return every._slice(*rows.indices(ROWS)[:2])


RESNET = dataclasses.replace(
    CONFIG, vision=ClipVisionConfig(32, width=8, heads=4, stages="1-1-1-1"), embed_dim=16
)


@pytest.mark.parametrize(("config", "loss"), [(CONFIG, "softmax"), (CONFIG, "sigmoid"), (RESNET, "softmax")])
def test_a_step_in_bf16_is_near_one_in_fp32(config, loss):
    """Dtypes that do not meet, vectors or logits in bf16, statistics of batches in it: found out on the first GPU."""
    made = {}
    batch = batch_of()
    size = config.vision.image_size
    batch.pixels = F.interpolate(batch.pixels.float(), size=(size, size)).to(torch.uint8)
    for rough in (False, True):
        model = build(dataclasses.replace(config, logit_bias=loss == "sigmoid"), seed=3).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=rough):
            found = ClipTraining(model, ContrastConfig(loss)).losses(batch)
        assert all(each.dtype == torch.float32 for each in found.values())
        found["loss"].backward()
        gradients = [each.grad for each in model.parameters()]
        assert all(each.dtype == torch.float32 and each.isfinite().all() for each in gradients)
        assert all(each.dtype != torch.bfloat16 for each in model.buffers())
        made[rough] = found["loss"].detach(), torch.cat([each.flatten() for each in gradients])
    (exact, gradient), (rough, rough_gradient) = made[False], made[True]
    torch.testing.assert_close(rough, exact, rtol=3e-2, atol=0)
    assert rough != exact, "autocast should have done something"
    assert torch.cosine_similarity(rough_gradient, gradient, dim=0) > 0.98


def by_hand(model: Clip, loss: str) -> torch.Tensor:
    """Pair by pair, from the formulas."""
    batch = batch_of()
    images, texts = model.encode_image(batch.pixels), model.encode_text(batch.ids)
    total = torch.zeros(())
    for i in range(ROWS):
        logits = [
            [model.logit_scale.exp() * F.cosine_similarity(a, b, dim=0) for b in others]
            for a, others in ((images[i], texts), (texts[i], images))
        ]
        if loss == "softmax":
            for each in logits:
                chances = torch.stack(each).exp()
                total = total - (chances[i] / chances.sum()).log() / (2 * ROWS)
        else:
            for j, logit in enumerate(logits[0]):
                z = 1 if i == j else -1
                total = total - torch.log(1 / (1 + torch.exp(-z * (logit + model.logit_bias)))) / ROWS
    return total


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [0, 3, 8])
def test_the_loss_is_that_of_the_formulas_however_it_is_cut(loss, chunk):
    plain, module = trained(loss), trained(loss, chunk=chunk)
    expected = by_hand(plain.model, loss)
    expected.backward()
    found = module.losses(batch_of())
    found["loss"].backward()
    torch.testing.assert_close(found["loss"], expected, atol=1e-5, rtol=1e-5)
    grads = dict(module.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[name].grad, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


CASES = {loss: (lambda ranks, loss=loss: trained(loss, ranks), batch_of) for loss in ("softmax", "sigmoid")}


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_in_chunks_no_tensor_has_every_pair(loss):
    few, chunk = batch_of(), 3
    more = {
        "ids": few.ids.repeat(3, 1),
        "pixels": few.pixels.repeat(3, 1, 1, 1),
        "weight": few.weight.repeat(3),
    }
    batch = dataclasses.replace(few, **more)
    rows, largest = len(batch.ids), 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, given=(), options=None):
            nonlocal largest
            made = function(*given, **(options or {}))
            for each in made if isinstance(made, tuple | list) else [made]:
                if isinstance(each, torch.Tensor) and each.dim() == 2 and each.shape[1] == rows:
                    largest = max(largest, len(each))
            return made

    with Watch():
        trained(loss, chunk=chunk).losses(batch)["loss"].backward()
    assert largest < rows  # embeddings the other way round have as many columns, and E rows


def test_several_ranks_take_the_gradient_of_one(tmp_path):
    found = gradients_of_two_ranks(__name__, tmp_path)
    assert found.keys() == CASES.keys()
    for loss, case in CASES.items():
        for name, expected in gradients(case).items():
            torch.testing.assert_close(found[loss][name], expected, atol=1e-5, rtol=1e-4, msg=name)


def test_the_scale_stays_below_a_hundred_and_the_losses_fit_their_models():
    module = trained()
    assert module.model.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    module.model.logit_scale.data.fill_(9.0)
    module.after_step()
    assert module.model.logit_scale.item() == pytest.approx(math.log(100))
    # A checkpoint may come with more: its first step is no exception.
    module.model.logit_scale.data.fill_(9.0)
    assert ClipTraining(module.model).model.logit_scale.item() == pytest.approx(math.log(100))
    assert trained("sigmoid").model.logit_bias.item() == -10
    with pytest.raises(UserError, match="logit_bias"):
        ClipTraining(build(CONFIG), ContrastConfig("sigmoid"))
    with pytest.raises(UserError, match="softmax, sigmoid"):
        ContrastConfig("hinge")


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_64_pairs_are_learned_by_heart(tmp_path, loss):
    count, steps = 64, 60
    corpus = source(tmp_path / "grids", pairs(count), 64)
    tokenizer = BpeTokenizer.train(corpus.texts(), vocab_size=600)
    model = build(
        dataclasses.replace(preset("clip", "tiny", tokenizer.vocab_size), logit_bias=loss == "sigmoid")
    )
    train(
        ClipTraining(model, ContrastConfig(loss)),
        partial(step_batches, corpus, tokenizer, steps),
        TrainConfig(steps=steps, learning_rate=1e-3, warmup_steps=5, log_every=10),
        examples=count,
    )
    model.eval()
    (everything,) = corpus.batches(tokenizer, count, steps=1)
    with torch.inference_mode():
        similarity = (
            model.embed_image(model.encode_image(everything.pixels)) @ model.embed_text(everything.ids).T
        )
    own = torch.arange(count)
    assert (similarity.argmax(1) == own).float().mean() >= 0.95
    assert (similarity.argmax(0) == own).float().mean() >= 0.95


def step_batches(corpus, tokenizer, steps, start):
    return corpus.batches(tokenizer, 32, steps=steps, start_step=start)
