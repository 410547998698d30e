"""Bugs caught here: a GPU that only emulates bf16 taken for one that has it, and so three times slower than in fp32; an engine,
a plug-in or an evaluation that decides for itself.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from capfilt.data.tokenizer import Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.models import precision
from capfilt.models.blip import BlipConfig, build
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig
from capfilt.plugins.clip import ClipScorer
from capfilt.tasks import adapters


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
        ("capfilt.tasks.adapters", "has_bf16", True),
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
    with adapters.WholeBlip(model, tokenizer)._evaluating():
        assert torch.is_autocast_enabled("cpu")
