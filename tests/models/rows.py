"""A micro Blip, batches for it, and ITC by hand, for tests of objectives."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from capfilt.data.loader import Batch
from capfilt.models.blip.model import BlipConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig

MICRO = BlipConfig(
    vision=VisionConfig(16, 8, width=32, depth=1, heads=2, hidden=64),
    text=TextConfig(40, 32, 2, 2, 64, max_positions=16, dropout=0.0, attention_dropout=0.0),
    embed_dim=16,
)


@dataclasses.dataclass(frozen=True)
class Rows:  # what the objectives read of a capfilt.data.loader.Batch
    pixels: Tensor | None
    features: Tensor | None
    ids: Tensor
    mask: Tensor
    image_index: Tensor
    text_index: Tensor
    example: Tensor
    weight: Tensor | None = None
    dropped: Tensor | None = None
    soft: Tensor | None = None
    near_ids: Tensor | None = None
    near_mask: Tensor | None = None
    synthetic: Tensor | None = None
    images = Batch.images


def rows(count: int = 6, seed: int = 0, length: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 38, (count, length), generator=generator)
    lengths = torch.randint(4, length + 1, (count,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids[:, 0] = 2
    ids[~mask] = 0
    return Rows(
        torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        None,
        ids,
        mask,
        torch.arange(count),
        torch.arange(count),
        torch.arange(count),
    )


def itc_by_hand(image, text, image_candidates, text_candidates, tau, targets, valid):
    """Cross-entropy against soft targets with Python floats, one number at a time."""
    sides = []
    for queries, candidates, target in (
        (image, text_candidates, targets[0]),
        (text, image_candidates, targets[1]),
    ):
        losses = []
        for query, wanted in zip(queries.tolist(), target.tolist(), strict=True):
            scores = [sum(a * b for a, b in zip(query, c, strict=True)) / tau for c in candidates.tolist()]
            existing = [s for s, v in zip(scores, valid, strict=True) if v]
            log_total = math.log(sum(math.exp(s) for s in existing))
            losses.append(
                -sum(y * (s - log_total) for y, s, v in zip(wanted, scores, valid, strict=True) if v)
            )
        sides.append(sum(losses) / len(losses))
    return sum(sides) / 2
