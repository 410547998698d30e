"""Bugs caught here: a GPU that only emulates bf16 taken for one that has it, and so three times slower than in fp32; an engine,
a plug-in or an evaluation that decides for itself, or does not do as it is told; attention of bf16 on a processor that is not
attention, or is torch's fused one, whose gradients take twice as long there.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from capfilt.data.tokenizer import Tokenizer
from capfilt.inference import adapters
from capfilt.inference.captioner import Captioner
from capfilt.models import build
from capfilt.models.blip.model import BlipConfig
from capfilt.models.common import layers, precision
from capfilt.models.common.layouts.contents import Contents
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.plugins.clip import ClipScorer


def answers(native):
    """torch's answer on a GPU that emulates bf16, or computes in it; `old` as releases that did not know the difference."""

    def now(including_emulation=True):
        return including_emulation or native

    def old():
        return native

    return now, old


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("release", [0, 1])
def test_emulated_bf16_is_none(monkeypatch, native, release):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", answers(native)[release])
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert precision.has_bf16(torch.device("cuda")) is native
    assert precision.auto_precision(torch.device("cuda")) == ("bf16" if native else "fp32")


def test_a_processor_computes_in_fp32():
    assert precision.auto_precision(torch.device("cpu")) == "fp32"


def test_who_computes_asks_there(monkeypatch):
    for module, name, answer in (
        ("capfilt.inference.engine", "auto_precision", "bf16"),
        ("capfilt.plugins.clip", "auto_precision", "bf16"),
        ("capfilt.inference.adapters", "auto_precision", "bf16"),
    ):
        monkeypatch.setattr(f"{module}.{name}", lambda _device, answer=answer: answer)
    tokenizer = Tokenizer.train(["a red square"] * 3, 60)
    vision = VisionConfig(16, 8, width=32, depth=1, heads=2, hidden=64)
    text = TextConfig(tokenizer.vocab_size, 32, 1, 2, 64, max_positions=30)
    model = build(BlipConfig(vision=vision, text=text, embed_dim=16), seed=1)
    assert Captioner(model, tokenizer).precision == "bf16"
    scorer = object.__new__(ClipScorer)
    scorer.device, scorer.precision = torch.device("cpu"), "auto"
    assert scorer.computed() == {"precision": "bf16"}
    for given, half in (("auto", True), ("bf16", True), ("fp32", False)):
        able = adapters.opened(Contents(model, tokenizer), precision=given).model
        with able._evaluating():
            assert torch.is_autocast_enabled("cpu") is half
    assert adapters.adapted(model, tokenizer, precision="fp32")._captioner.precision == "fp32"


def test_attention_in_bf16_on_a_processor_is_attention(monkeypatch):
    used = []
    real = layers.sdpa_kernel
    monkeypatch.setattr(layers, "sdpa_kernel", lambda *given: used.append(given) or real(*given))
    sides = torch.randn(3, 2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[1, ..., 5:] = False
    exact = sides.clone().requires_grad_()
    query, keys, values = exact
    chances = (query @ keys.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf).softmax(dim=3)
    (chances @ values).square().sum().backward()
    half = sides.bfloat16().requires_grad_()
    found = layers.attention(*half.unbind(), attn_mask=mask)
    found.float().square().sum().backward()
    assert used
    torch.testing.assert_close(found.float(), (chances @ values), atol=0.02, rtol=0.02)
    torch.testing.assert_close(half.grad.float(), exact.grad, atol=0.1, rtol=0.05)
    used.clear()
    with torch.no_grad():
        layers.attention(*half.unbind(), attn_mask=mask)
    layers.attention(*sides.unbind(), attn_mask=mask)
    assert not used
