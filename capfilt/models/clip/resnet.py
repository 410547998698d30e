"""CLIP's other image encoder: a ResNet with a deeper stem, blurred strides and attention in place of pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.models.common.layers import (
    attention,
    merge_heads,
    run_layer,
    split_heads,
)
from capfilt.models.common.trunk import Seeing
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD

if TYPE_CHECKING:
    from capfilt.models.clip.model import ClipConfig, ClipVisionConfig


class Pictures(Seeing):
    """What the two image encoders share: normalised pixels, and how they are trained."""

    pos_embed: nn.Parameter

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.recompute = False
        self.see_through(config, config.width, CLIP_MEAN, CLIP_STD)


class ClipResNet(Pictures):
    """Features [B, E] of images, by the original's ResNet: see `Bottleneck` and `AttentionPool`."""

    def __init__(self, config: ClipConfig) -> None:
        v = config.vision
        super().__init__(v)
        half = v.width // 2
        stem: list[nn.Module] = []
        for into, out, stride in ((3, half, 2), (half, half, 1), (half, v.width, 1)):
            stem += [nn.Conv2d(into, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.stem = nn.Sequential(*stem, nn.AvgPool2d(2))
        stages: list[nn.Module] = []
        into = v.width
        for number, count in enumerate(v.blocks):
            width = v.width << number
            for index in range(count):
                stages.append(Bottleneck(into, width, stride=2 if number and not index else 1))
                into = 4 * width
        self.blocks = nn.ModuleList(stages)
        self.pool = AttentionPool(into, v.heads, config.embed_dim)
        self.pos_embed = nn.Parameter(torch.randn(1, v.tokens, into) * into**-0.5)

    def train(self, mode: bool = True) -> ClipResNet:
        """Its batch normalisation takes and follows the batches' statistics only where the tower learns: frozen, it is as at
        evaluation.
        """
        super().train(mode and any(each.requires_grad for each in self.parameters()))
        return self

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(self.normalise(images))
        for block in self.blocks:
            x = run_layer(block, x, recompute=self.recompute)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.pos_embed
        out: Tensor = self.pool(x)
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 around a skip; where it strides, an average pool does, in the branch and before the skip's 1x1."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(into, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)
        # CLIP, released code: a branch starts as nothing.
        nn.init.zeros_(self.bn3.weight)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or into != out:
            self.skip = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(into, out, 1, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.pool(F.relu(self.bn2(self.conv2(y))))
        out: Tensor = F.relu(self.bn3(self.conv3(y)) + self.skip(x))
        return out


class AttentionPool(nn.Module):
    """One attention whose query is the mean of all tokens (position 0): [B, N, D] -> [B, E]."""

    def __init__(self, width: int, heads: int, embed_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, embed_dim)
        for linear in (self.query, self.key, self.value, self.proj):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        query, keys, values = (
            split_heads(each, self.heads) for each in (self.query(x[:, :1]), self.key(x), self.value(x))
        )
        out: Tensor = self.proj(merge_heads(attention(query, keys, values))[:, 0])
        return out
