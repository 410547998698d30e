"""Catches, on a GPU only: a kernel, a recording or a batch's filling that changes what is written or scored; an engine that
silently does without them.

Everything is held against the same weights without recordings and with PyTorch's attention, on the same GPU.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import build
from capfilt.models.blip.model import BlipConfig
from capfilt.models.common.text import Layer, TextConfig
from capfilt.models.common.vision import VisionConfig

pytestmark = pytest.mark.gpu

COUNT = 16


@pytest.fixture(scope="module")
def published():
    """A model with the published one's 577 image tokens and heads of 64, and pictures for it."""
    tokenizer = Tokenizer([*SPECIALS, "a", "picture", "of", *(f"w{i}" for i in range(90)), *ADDED])
    text = TextConfig(tokenizer.vocab_size, 128, 2, 2, 256, max_positions=64)
    model = build(BlipConfig(vision=VisionConfig(384, 16, 64, 1, 1, 128), text=text, embed_dim=16), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Spread as a trained model's are, so that rounding seldom decides.
        model.text_decoder.cls.predictions.transform.LayerNorm.weight.fill_(8.0)
        for layer in model.text_encoder.layers:
            layer.crossattention.output.dense.weight.mul_(6.0)
    images = torch.randint(0, 256, (COUNT, 3, 384, 384), dtype=torch.uint8, generator=generator)
    return model.eval(), tokenizer, images


def on_gpu(published, kind, kernel=True):
    """An engine of its own copy of the model."""
    engine = kind(copy.deepcopy(published[0]).cuda(), published[1])
    if not kernel:
        for module in engine.model.modules():
            if isinstance(module, Layer) and module.crossattention is not None:
                module.crossattention.product = F.scaled_dot_product_attention
    return engine


def without_recordings(engine):
    engine.__dict__["writer"] = engine.model
    return engine


def texts(captions):
    return [each.text for each in captions]


@pytest.mark.parametrize("batch_size", [8, 5])
@pytest.mark.parametrize(
    "how",
    [{"method": "greedy"}, {"samples": 3, "seed": 1}, {"method": "beam", "samples": 2}],
    ids=["greedy", "samples", "beam"],
)
def test_captions_are_those_of_plain_attention_without_graphs(published, batch_size, how):
    images = published[2]
    fast = on_gpu(published, Captioner)
    assert fast.computed()["precision"] == "bf16"
    options = {"batch_size": batch_size, "max_new_tokens": 12, "min_new_tokens": 4, **how}
    made = fast.caption(images, **options)
    assert not fast.writer.failed
    assert fast.writer.shape.images == batch_size
    assert len(fast.writer.shape.steps) >= 4
    assert fast.reader.name == "triton"
    assert texts(fast.caption(images, **options)) == texts(made), "replayed, it writes the same"
    unrecorded = without_recordings(on_gpu(published, Captioner)).caption(images, **options)
    whole = COUNT // batch_size * batch_size * how.get("samples", 1)
    assert texts(unrecorded)[:whole] == texts(made)[:whole], "a recording does what was recorded"
    plain = without_recordings(on_gpu(published, Captioner, kernel=False)).caption(images, **options)
    same = [(a, b) for a, b in zip(made, plain, strict=True) if a.text == b.text]
    assert len(same) >= 0.75 * len(made), "rounding may decide now and then"
    for a, b in same:
        assert a.logprob == pytest.approx(b.logprob, abs=0.3)


@pytest.mark.parametrize("batch_size", [16, 5])
def test_scores_are_those_of_plain_attention(published, batch_size):
    images = published[2]
    said = [f"w{i} w{i + 1} a picture" + " w3" * (i % 20) for i in range(2 * COUNT)]
    index = [i // 2 for i in range(2 * COUNT)]
    found, plain = (
        on_gpu(published, Filter, kernel).score_texts(images, index, said, batch_size=batch_size)
        for kernel in (True, False)
    )
    for a, b in zip(found, plain, strict=True):
        assert a.itm_score == pytest.approx(b.itm_score, abs=0.02)
        assert a.itc_score == pytest.approx(b.itc_score, abs=0.02)
