"""Small CLIPs of both kinds, with weights that tell everything apart."""

from __future__ import annotations

import dataclasses

import torch

from capfilt.models import build
from capfilt.models.clip.model import Clip, ClipConfig, ClipTextConfig, ClipVisionConfig

VIT = ClipConfig(ClipVisionConfig(32, 8, 128, 2, 2, 256), ClipTextConfig(99, 16, 64, 2, 1, 128), embed_dim=24)
RESNET = dataclasses.replace(VIT, vision=ClipVisionConfig(64, width=16, heads=8, stages="1-2-1-1"))


def texts(config: ClipConfig, rows: int = 4) -> torch.Tensor:
    """Start, words, end and padding of several lengths; one text has a second end in its padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, config.text.start_id, (rows, 10), generator=generator)
    ids[:, 0] = config.text.start_id
    for row, end in enumerate((3, 9, 5, 7)):
        ids[row, end] = config.text.end_id
        ids[row, end + 1 :] = 0
    ids[2, 8] = config.text.end_id
    return ids


def sharpened(config: ClipConfig) -> Clip:
    """Random weights with something to tell apart, statistics of batches included."""
    model = build(config).eval()
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "logit_scale":
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
        if name.endswith("running_var"):
            tensor.abs_().add_(0.5)
    return model
