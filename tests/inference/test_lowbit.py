"""Catches: 8-bit layers that compute something else, a shared layer quantised into two, the caller's own model changed, a
precision taken where the machine cannot do it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from capfilt.inference.captioner import Captioner
from capfilt.inference.engine import _IN
from capfilt.inference.filter import Filter
from capfilt.inference.lowbit import Fp8Linear, Int8Linear, replace_linears
from tests.refusals import refused


@pytest.mark.parametrize("make", [Int8Linear, lambda linear: Fp8Linear(linear, plain=True)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_in_8_bits_is_near_the_layer(make, bias):
    torch.manual_seed(0)
    linear = nn.Linear(96, 40, bias=bias)
    linear.weight.data[3] *= 20  # a loud row
    x = torch.randn(5, 7, 96)
    with torch.inference_mode():
        expected, found = linear(x), make(linear)(x).float()
    assert found.shape == expected.shape
    error = (found - expected).norm(dim=(0, 1)) / expected.norm(dim=(0, 1))
    assert error.max() < 0.1
    assert error.max() > 1e-5, "this would be the layer itself"


def test_a_row_in_int8_does_not_depend_on_its_neighbours():
    torch.manual_seed(1)
    layer = Int8Linear(nn.Linear(32, 16))
    x = torch.randn(6, 32)
    x[0] *= 1000
    x[1] = 0
    assert torch.equal(layer(x)[1:], layer(x[1:]))
    assert torch.isfinite(layer(x)).all()


def test_a_layer_in_two_places_stays_one():
    shared = nn.Linear(8, 8)
    one, two = nn.Sequential(shared, nn.Linear(8, 4)), nn.ModuleDict({"a": nn.Sequential(shared)})
    replace_linears([one, two], Int8Linear)
    assert isinstance(one[0], Int8Linear)
    assert one[0] is two["a"][0]
    assert one[0] is not one[1]


def test_int8_scores_and_texts_are_near_and_the_model_is_left_alone(pair, images):
    before = {name: each.clone() for name, each in pair[0].state_dict().items()}
    texts = ["a red dog", "two cats on the left", "the ball"] * 2
    index = [0, 1, 2, 3, 4, 5]
    plain = Filter(*pair).score_texts(images, index, texts)
    low = Filter(*pair, precision="int8").score_texts(images, index, texts)
    apart = [abs(a.itm_score - b.itm_score) for a, b in zip(plain, low, strict=True)]
    assert 0 < max(apart) < 0.1
    captions = Captioner(*pair, precision="int8").caption(images, method="greedy", max_new_tokens=3)
    exact = Captioner(*pair).caption(images, method="greedy", max_new_tokens=3)
    assert sum(a.text == b.text for a, b in zip(captions, exact, strict=True)) >= 5
    assert all(torch.equal(each, before[name]) for name, each in pair[0].state_dict().items())


def test_bf16_weights_are_those_that_autocast_would_use(pair, images):
    """Converted once and converted at every step are the same numbers."""
    engine = Filter(*pair, precision="bf16")
    assert engine.model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert (
        engine.model.text_encoder.layers[0].crossattention
        is engine.model.text_decoder.bert.layers[0].crossattention
    )
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = pair[0].encode_image(images)
    with torch.inference_mode(), engine.autocast():
        assert torch.equal(engine.model.encode_image(images), expected)
    assert pair[0].visual_encoder.blocks[0].mlp.fc1.weight.dtype == torch.float32


def test_fp8_is_refused_where_no_gpu_has_it(pair):
    with refused("int8"):
        Filter(*pair, precision="fp8")


def test_fp8_is_refused_uncompiled(pair, monkeypatch):
    """A precision that is asked for its speed, and slower than bf16: quantised eagerly, kernel by kernel."""
    monkeypatch.setitem(_IN, "fp8", _IN["bf16"])
    with refused("--compile"):
        Filter(*pair, precision="fp8")
    assert Filter(*pair, precision="fp8", compiled=True).compiled is not None


@pytest.mark.gpu
def test_fp8_on_a_gpu_is_its_plain_twin():
    linear = nn.Linear(128, 256, device="cuda")
    x = torch.randn(3, 16, 128, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        fast, plain = Fp8Linear(linear)(x), Fp8Linear(linear, plain=True)(x)
    assert torch.allclose(fast.float(), plain.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_fp8_scores_on_a_gpu_are_near(pair, images):
    model = copy.deepcopy(pair[0]).cuda()
    texts = ["a red dog"] * 7
    plain = Filter(model, pair[1]).score(images, texts)
    low = Filter(model, pair[1], precision="fp8", compiled=True).score(images, texts)
    assert max(abs(a.itm_score - b.itm_score) for a, b in zip(plain, low, strict=True)) < 0.1
