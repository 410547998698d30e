"""Catches: keys given to another layer, values for keys, heads mixed up, a precision that is not the engine's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from capfilt.inference.captioner import Captioner
from capfilt.inference.cross import CrossProjections
from capfilt.inference.lowbit import Int8Linear
from capfilt.models import build


@pytest.mark.parametrize("half", ["both", "captioner", "filter"])
def test_every_layer_gets_its_own_keys_and_values(pair, half):
    model = build(dataclasses.replace(pair[0].config, half=half), seed=5).eval()
    for parameter in model.parameters():  # biases begin at 0
        parameter.data.normal_(std=0.3)
    tokens = torch.randn(3, model.config.vision.tokens, model.config.vision.width)
    with torch.inference_mode():
        expected, found = model.prefill_cross(tokens), CrossProjections(model, nn.Linear.eval)(tokens)
    assert len(found) == len(expected) == model.config.text.depth
    assert (expected[0][0] - expected[1][0]).abs().max() > 0.1
    for made, plain in zip(found, expected, strict=True):
        for a, b in zip(made, plain, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
            assert a.is_contiguous()


def test_an_engine_in_8_bits_has_these_in_8_bits_too(pair):
    assert isinstance(Captioner(*pair, precision="int8").cross.joined, Int8Linear)
    assert Captioner(*pair, precision="bf16").cross.joined.weight.dtype == torch.bfloat16
    assert pair[0].text_decoder.bert.layers[0].crossattention.self.key.weight.dtype == torch.float32
