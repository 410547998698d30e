"""EfficientNet-Lite (arXiv 1905.11946): the network without its classifier, so that a checkpoint with one needs no package.

"Lite" is the TensorFlow original's variant for phones (tpu/models/official/efficientnet/lite): without squeeze-and-excitation,
with ReLU6, with a stem, a head and first and last stages that do not scale. Tensors have the names of
efficientnet_lite_pytorch, whose weights fit. Not here: weights (`trunk.py`).
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)  # fmt: skip
"""Of B0: blocks, kernel, stride, expansion, channels (table 1)."""
SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
"""Factors of width and depth, by the number of the network (the original's `efficientnet_lite_builder.py`)."""
CHANNELS = 1280
"""Of its map, whatever the size."""


def _channels(channels: int, width: float) -> int:
    """Scaled, to a multiple of 8, by no more than a tenth too few (the original's `round_filters`)."""
    wanted = channels * width
    made = max(8, int(wanted + 4) // 8 * 8)
    return made + 8 if made < 0.9 * wanted else made


class _Conv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow's SAME does for maps of this side: more after than before."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, side: int, groups: int = 1) -> None:
        super().__init__(into, out, kernel, stride, bias=False, groups=groups)
        pad = max((math.ceil(side / stride) - 1) * stride + kernel - side, 0)
        self.sides = (pad // 2, pad - pad // 2) * 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, self.sides) if any(self.sides) else x)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class _Block(nn.Module):
    """MBConv: expand, depthwise, project; a residual where shapes allow."""

    def __init__(self, into: int, out: int, kernel: int, stride: int, expansion: int, side: int) -> None:
        super().__init__()
        inner = into * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and into == out
        if self.expands:
            self._expand_conv, self._bn0 = _Conv(into, inner, 1, 1, side), _norm(inner)
        self._depthwise_conv, self._bn1 = _Conv(inner, inner, kernel, stride, side, inner), _norm(inner)
        self._project_conv, self._bn2 = _Conv(inner, out, 1, 1, side), _norm(out)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        out: Tensor = self._bn2(self._project_conv(inner))
        return out + x if self.adds else out


class EfficientNetLite(nn.Module):
    """Normalised pixels [B, 3, S, S] of one size -> a map [B, CHANNELS, ceil(S / 32), ceil(S / 32)]."""

    def __init__(self, number: int, image_size: int) -> None:
        super().__init__()
        width, depth = SCALES[number]
        self._conv_stem, self._bn0 = _Conv(3, 32, 3, 2, image_size), _norm(32)
        side, into, blocks = math.ceil(image_size / 2), 32, []
        for place, (count, kernel, stride, expansion, channels) in enumerate(STAGES):
            scaled = _channels(channels, width)
            repeats = count if place in (0, len(STAGES) - 1) else math.ceil(depth * count)
            for index in range(repeats):
                step = stride if index == 0 else 1
                blocks.append(_Block(into, scaled, kernel, step, expansion, side))
                side, into = math.ceil(side / step), scaled
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _Conv(into, CHANNELS, 1, 1, side), _norm(CHANNELS)

    def extract_features(self, pixels: Tensor) -> Tensor:
        """The map after the head's activation."""
        x = F.relu6(self._bn0(self._conv_stem(pixels)))
        for block in self._blocks:
            x = block(x)
        return F.relu6(self._bn1(self._conv_head(x)))
