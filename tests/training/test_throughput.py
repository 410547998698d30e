"""Bugs caught here: FLOPs that are off by the backward pass, count recomputed activations as the model's work, or move the
run they are counted in; a GPU taken for its smaller or larger namesake.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capfilt.data.loader import Batch
from capfilt.models import build
from capfilt.models.blip.model import BlipConfig, BlipPretraining, PretrainingConfig
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.training import throughput

MICRO = BlipConfig(
    vision=VisionConfig(16, 8, width=16, depth=1, heads=2, hidden=32),
    text=TextConfig(40, 16, 1, 2, 32, max_positions=16, dropout=0.1, attention_dropout=0.1),
    embed_dim=8,
)


def batch(count: int) -> Batch:
    numbers = torch.arange(count)
    return Batch(
        ids=torch.full((count, 6), 7),
        mask=torch.ones(count, 6, dtype=torch.bool),
        image_index=numbers,
        text_index=numbers,
        example=numbers,
        weight=torch.ones(count),
        sided=torch.zeros(count, dtype=torch.bool),
        texts=[""] * count,
        step=0,
        epoch=0,
        pixels=torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8),
    )


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 50, bias=False), nn.Linear(50, 20, bias=False)

    def losses(self, given):
        return {"loss": self.second(self.first(given.ids.float())).sum()}


def test_flops_of_two_matrices_by_hand():
    """2 per weight forward; backward again 2 for each weight's gradient and 2 for what passes on, not to the input."""
    module = Two()
    expected = 2 * (300 + 1000) + 2 * (300 + 1000) + 2 * 1000
    assert throughput.flops_per_text(module, batch(24), module.losses) == expected
    module.first.weight.requires_grad_(False)
    assert throughput.flops_per_text(module, batch(3), module.losses) == 2 * 1300 + 2 * 1000


def test_counting_leaves_the_run_as_it_was_and_recomputation_out():
    module = BlipPretraining(build(MICRO), PretrainingConfig(queue_size=13)).train()
    counted, given = [], batch(16)
    for on in (False, True):
        recompute_activations(module.model, on)
        before = {name: value.clone() for name, value in module.state_dict().items()}
        torch.manual_seed(3)
        counted.append(throughput.flops_per_text(module, given, lambda few: module.losses(few, 0.4)))
        after = torch.rand(2)
        torch.manual_seed(3)
        assert torch.equal(torch.rand(2), after)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())
        assert all(each.training for each in module.modules())
        assert module.model.visual_encoder.recompute is on
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA A10G", 70),
        ("NVIDIA L40", 181),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_known_gpus_by_the_name_cuda_gives_them(name, tflops):
    assert throughput.known_peak(name) == (None if tflops is None else pytest.approx(tflops * 1e12))


def test_a_processor_has_no_peak():
    assert throughput.peak_flops(torch.device("cpu")) is None
