"""The vision tower: pixels (or cached trunk features) to tokens, the first of which is [CLS].

A ViT as published, or a convolutional trunk whose feature map becomes the tokens. Decoding, resizing and augmenting
images is capfilt.data's; only normalisation happens here, so that batches travel as uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.common.layers import PreNormBlock, init_std, init_truncated, run_layer
from capfilt.models.common.trunk import Seeing, grid_of, resized

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # BLIP, arXiv 2201.12086, code: CLIP's constants


CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionConfig:
    """Geometry of the vision tower; the defaults are ViT-B/16 at 224 px (BLIP, sec. 3.1)."""

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    drop_path: float = 0.0
    stem: str = "patch"  # "patch": one convolution; "conv": a stack of 3x3 stride-2 ones (arXiv 2106.14881)
    trunk: str = ""  # "" for a ViT, or the name of a pretrained convolutional trunk
    trunk_frozen: bool = True

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"vision.width {self.width} is no multiple of vision.heads {self.heads}")
        if self.stem not in ("patch", "conv"):
            raise UserError(f"vision.stem is {self.stem!r}: use 'patch' or 'conv'")
        grid_of(self)

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return grid_of(self)

    @property
    def tokens(self) -> int:
        """Tokens per image, [CLS] included."""
        return self.grid**2 + 1


def resize_position_embedding(embedding: Tensor, grid: int) -> Tensor:
    """[1, 1 + G*G, D] -> [1, 1 + grid*grid, D], the [CLS] row kept.

    Bicubic, corners not aligned, no antialiasing: as BLIP's code resizes its own.
    """
    side = round((embedding.shape[1] - 1) ** 0.5)
    if side * side + 1 != embedding.shape[1]:
        raise UserError(f"a position embedding of {embedding.shape[1]} rows is no square grid plus [CLS]")
    if side == grid:
        return embedding
    rows = embedding[:, 1:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    rows = F.interpolate(rows, size=(grid, grid), mode="bicubic", align_corners=False)
    rows = rows.permute(0, 2, 3, 1).reshape(1, grid * grid, -1).to(embedding.dtype)
    return torch.cat([embedding[:, :1], rows], dim=1)


class PatchEmbed(nn.Module):
    """Pixels [B, 3, S, S] to patch tokens [B, G*G, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        if config.stem == "patch":
            self.proj: nn.Module = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)
        else:
            self.proj = conv_stem(config)

    def forward(self, pixels: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels).flatten(2).transpose(1, 2)
        return out


class ResidualConv(nn.Module):
    """Two 3x3 convolutions around a skip; the second starts at zero, so that the block starts as nothing."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(_GROUPS, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(_GROUPS, channels)
        nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        inner: Tensor = self.norm2(self.conv2(F.gelu(self.norm1(self.conv1(x)))))
        return F.gelu(x + inner)


_GROUPS = 8


def conv_stem(config: VisionConfig) -> nn.Sequential:
    """3x3 stride-2 convolutions down to the patch size, a residual block between the first and the last.

    Shapes are what a patch convolution is slow to learn from a few thousand pictures.
    """
    halvings = config.patch_size.bit_length() - 1
    if 1 << halvings != config.patch_size or halvings == 0:
        raise UserError(f"vision.stem 'conv' needs a power of two as patch_size, not {config.patch_size}")
    if config.width % (_GROUPS << (halvings - 1)):
        raise UserError(
            f"vision.stem 'conv' needs a width that {_GROUPS << (halvings - 1)} divides, not {config.width}"
        )
    steps: list[nn.Module] = []
    channels = 3
    for step in range(halvings):
        out = config.width >> (halvings - 1 - step)
        steps += [nn.Conv2d(channels, out, 3, 2, 1, bias=False), nn.GroupNorm(_GROUPS, out), nn.GELU()]
        if 0 < step < halvings - 1:
            steps.append(ResidualConv(out))
        channels = out
    return nn.Sequential(*steps)


class VisionTower(Seeing):
    """Tokens [B, 1 + G*G, D] after the final LayerNorm; position 0 is [CLS]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # see `layers.recompute_activations`
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.see_through(config, config.width, CLIP_MEAN, CLIP_STD)
        if not config.trunk:
            self.patch_embed = PatchEmbed(config)
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.ModuleList(
            PreNormBlock(config.width, config.heads, config.hidden, rate) for rate in rates
        )
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        std = init_std(config.width)
        init_truncated(self.blocks, std)
        if config.trunk:
            init_truncated(self.trunk_proj, std)
        nn.init.trunc_normal_(self.cls_token, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)

    def resize(self, image_size: int) -> VisionConfig:
        """Takes images of another size from now on: the position embedding is resized, everything else stays.

        Returns the new configuration. UserError for a trunk, whose size is part of its architecture.
        """
        config = resized(self.config, image_size)
        self.pos_embed = nn.Parameter(resize_position_embedding(self.pos_embed.detach(), config.grid))
        self.config = config
        return config

    def forward(self, images: Tensor) -> Tensor:
        """images: pixels [B, 3, S, S] (uint8, or normalised floats), or trunk features [B, G*G, C] (floating)."""
        if self.trunk is None:
            if images.dim() != 4:
                raise UserError(f"this vision tower takes pixels [B, 3, S, S], not {list(images.shape)}")
            x = self.patch_embed(self.normalise(images))
            cls = self.cls_token.expand(x.shape[0], -1, -1)
        else:
            x = self.trunk_tokens(images)
            cls = self.cls_token + x.mean(dim=1, keepdim=True)
        x = torch.cat([cls.to(x.dtype), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = run_layer(block, x, recompute=self.recompute)
        out: Tensor = self.norm(x)
        return out


class Towered(nn.Module):
    """A model that sees pictures through a `VisionTower`."""

    visual_encoder: VisionTower

    def encode_image(self, images: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] after the final LayerNorm, [CLS] first."""
        out: Tensor = self.visual_encoder(images)
        return out
