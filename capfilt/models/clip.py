"""CLIP: an image encoder and a causal text encoder whose vectors agree where image and text do (arXiv 2103.00020).

The image encoder is a ViT, or the original's other kind, a ResNet with a deeper stem, blurred strides and attention in
place of pooling. A ViT's patches may be the map of a pretrained trunk, which the original has none of. Its loss is
`contrast.py`'s; other projects' layouts are `interop`'s.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.config import Shape
from capfilt.models.layers import (
    ACTIVATIONS,
    PreNormBlock,
    attention,
    full_precision,
    merge_heads,
    run_layer,
    split_heads,
)
from capfilt.models.trunk import Seeing, resized, trunk_grid
from capfilt.models.vision import CLIP_MEAN, CLIP_STD, resize_position_embedding

MAX_SCALE = 100.0
"""CLIP, sec. 2.5: the learned scale of the logits is clipped here; it starts at 1 / 0.07."""


@dataclass(frozen=True)
class ClipVisionConfig:
    """Geometry of the image encoder; the defaults are ViT-B/32. `stages` "" is a ViT, else a ResNet's blocks per stage."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    stages: str = (
        ""  # "3-4-6-3" is RN50; `width` is then its first stage's (64), `heads` that of its attention pool
    )
    trunk: str = ""  # in place of a ViT's patches: the map of a pretrained convolutional trunk
    trunk_frozen: bool = True

    def __post_init__(self) -> None:
        if self.stages:
            if not re.fullmatch(r"[1-9][0-9]{0,2}(-[1-9][0-9]{0,2}){0,7}", self.stages):
                raise UserError(f"vision.stages is {self.stages!r}: write blocks per stage, as 3-4-6-3")
            if self.image_size % 32:
                raise UserError(
                    f"vision.image_size {self.image_size} is no multiple of a ResNet's stride, 32"
                )
            if self.trunk:
                raise UserError(
                    f"vision.stages {self.stages!r} and vision.trunk {self.trunk!r}: give one of them"
                )
        elif self.trunk:
            trunk_grid(self.trunk, self.image_size)
        elif self.image_size % self.patch_size:
            raise UserError(
                f"vision.image_size {self.image_size} is no multiple of vision.patch_size {self.patch_size}"
            )
        if (32 * self.width if self.stages else self.width) % self.heads:
            raise UserError(f"vision.heads {self.heads} does not divide the width")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of a ResNet: how many in each stage."""
        return tuple(map(int, self.stages.split("-")))

    @property
    def grid(self) -> int:
        """Tokens per side."""
        if self.trunk:
            return trunk_grid(self.trunk, self.image_size)
        return self.image_size // (32 if self.stages else self.patch_size)

    @property
    def tokens(self) -> int:
        """Tokens per image, the first one included."""
        return self.grid**2 + 1


@dataclass(frozen=True)
class ClipTextConfig:
    """Geometry of the text encoder; the defaults are ViT-B/32's."""

    vocab_size: int = 49408  # 49,406 pieces, then the start's and the end's
    context: int = 77
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"text.width {self.width} is no multiple of text.heads {self.heads}")

    @property
    def start_id(self) -> int:
        return self.vocab_size - 2

    @property
    def end_id(self) -> int:
        """The end's: the state there is what a text becomes."""
        return self.vocab_size - 1

    @property
    def max_positions(self) -> int:
        return self.context


@dataclass(frozen=True)
class ClipConfig(Shape):
    """Everything that decides the shape of a Clip; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: ClipVisionConfig = field(default_factory=ClipVisionConfig)
    text: ClipTextConfig = field(default_factory=ClipTextConfig)
    embed_dim: int = 512
    activation: str = "quick_gelu"  # "gelu" is what most of open_clip's own models have
    logit_bias: bool = False  # for the sigmoid loss (SigLIP, arXiv 2303.15343, sec. 3.2)
    max_text_tokens: int = 77  # CLIP, code
    max_words: int = 0  # CLIP, code: texts are cut by tokens alone

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise UserError(f"activation is {self.activation!r}: use one of {', '.join(ACTIVATIONS)}")


class Clip(nn.Module):
    """See the module's docstring. Images are pixels uint8 [B, 3, S, S], normalised floats, or trunk features.

    Texts are ids int64 [B, L] = start ... end and padding after the end, whatever it is: nothing before reads it.
    """

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder: ClipViT | ClipResNet = (
            ClipResNet(config) if config.vision.stages else ClipViT(config)
        )
        self.text_encoder = ClipText(config)
        # CLIP, sec. 2.5: log-parameterised, starts at 1 / 0.07; the objective keeps it below MAX_SCALE in place. With a bias
        # it starts at 10, the bias at -10 (SigLIP, sec. 3.2): nearly all pairs of a batch are no match.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10 if config.logit_bias else 1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if config.logit_bias else None

    def encode_image(self, images: Tensor) -> Tensor:
        """Features [B, E] of images, not normalised."""
        out: Tensor = self.visual_encoder(images)
        return out

    def encode_text(self, ids: Tensor) -> Tensor:
        """Features [B, E] of texts int64 [B, L], not normalised."""
        out: Tensor = self.text_encoder(ids)
        return out

    def embed_image(self, images: Tensor) -> Tensor:
        """fp32 unit vectors [B, E]."""
        return _unit(self.encode_image(images))

    def embed_text(self, ids: Tensor) -> Tensor:
        """fp32 unit vectors [B, E]."""
        return _unit(self.encode_text(ids))

    def recompute_activations(self, on: bool = True) -> None:
        """Whether training computes every block's activations again in the backward pass instead of keeping them."""
        self.visual_encoder.recompute = self.text_encoder.recompute = on

    def resize_image(self, image_size: int) -> None:
        """Takes images of another size from now on: the position embedding is resized, everything else stays."""
        vision = resized(self.config.vision, image_size)
        tower = self.visual_encoder
        tower.pos_embed = nn.Parameter(resize_position_embedding(tower.pos_embed.detach(), vision.grid))
        self.config = dataclasses.replace(self.config, vision=vision)


class _Pictures(Seeing):
    """What the two image encoders share: normalised pixels, and how they are trained."""

    pos_embed: nn.Parameter

    def __init__(self, config: ClipVisionConfig) -> None:
        super().__init__()
        self.recompute = False
        self.see_through(config, config.width, CLIP_MEAN, CLIP_STD)


class ClipViT(_Pictures):
    """Features [B, E] of images: patches without a bias, LayerNorm before the blocks too, the first token projected."""

    def __init__(self, config: ClipConfig) -> None:
        v = config.vision
        super().__init__(v)
        if not v.trunk:
            self.patch_embed = nn.Conv2d(3, v.width, v.patch_size, v.patch_size, bias=False)
        self.cls_token = nn.Parameter(torch.empty(1, 1, v.width))
        self.pos_embed = nn.Parameter(torch.empty(1, v.tokens, v.width))
        self.norm_pre = nn.LayerNorm(v.width)
        self.blocks = _blocks(v.width, v.heads, v.hidden, v.depth, config.activation)
        self.norm = nn.LayerNorm(v.width)
        self.proj = nn.Linear(v.width, config.embed_dim, bias=False)
        # CLIP, released code: all three at width^-1/2.
        for weight in (self.cls_token, self.pos_embed, self.proj.weight):
            nn.init.normal_(weight, std=v.width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        if self.trunk is None:
            x = self.patch_embed(self.normalise(images)).flatten(2).transpose(1, 2)
        else:
            x = self.trunk_tokens(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        x = self.norm_pre(x)
        for block in self.blocks:
            x = run_layer(block, x, recompute=self.recompute)
        out: Tensor = self.proj(self.norm(x[:, 0]))
        return out


class ClipText(nn.Module):
    """Features [B, E] of ids int64 [B, L]: a causal transformer, read at the first end token and projected."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        t = config.text
        self.recompute = False
        self.end_id = t.end_id
        self.token_embed = nn.Embedding(t.vocab_size, t.width)
        self.pos_embed = nn.Parameter(torch.empty(t.context, t.width))
        self.blocks = _blocks(t.width, t.heads, t.hidden, t.depth, config.activation, causal=True)
        self.norm = nn.LayerNorm(t.width)
        self.proj = nn.Linear(t.width, config.embed_dim, bias=False)
        # CLIP, released code.
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.proj.weight, std=t.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > len(self.pos_embed):
            raise UserError(f"a text of {ids.shape[1]} tokens: this model reads {len(self.pos_embed)}")
        x = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = run_layer(block, x, recompute=self.recompute)
        end = (ids == self.end_id).int().argmax(dim=1)
        out: Tensor = self.proj(self.norm(x[torch.arange(len(x), device=x.device), end]))
        return out


class ClipResNet(_Pictures):
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


def _blocks(
    width: int, heads: int, hidden: int, depth: int, activation: str, causal: bool = False
) -> nn.ModuleList:
    blocks = [
        PreNormBlock(width, heads, hidden, eps=1e-5, activation=activation, causal=causal)
        for _ in range(depth)
    ]
    for block in blocks:
        if causal:
            # CLIP, released code, of its text encoder: residual branches end smaller the more of them there are.
            nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
            nn.init.normal_(block.attn.proj.weight, std=width**-0.5 * (2 * depth) ** -0.5)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=width**-0.5 * (2 * depth) ** -0.5)
        else:
            # And of its ViT, torch's defaults: of `nn.MultiheadAttention`, and of linears, which the rest keeps.
            nn.init.xavier_uniform_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
        nn.init.zeros_(block.attn.proj.bias)
    return nn.ModuleList(blocks)


def _unit(features: Tensor) -> Tensor:
    with full_precision(features):
        return F.normalize(features.float(), dim=-1)


def build_clip(config: ClipConfig, seed: int = 0) -> Clip:
    """A freshly initialised Clip: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Clip(config)
