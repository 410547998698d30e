"""CLIP: an image encoder and a causal text encoder whose vectors agree where image and text do (arXiv 2103.00020).

The image encoder is a ViT or a ResNet (`resnet.py`). A ViT's patches may be the map of a pretrained trunk, which the original
has none of. Two losses: softmax over the batch (sec. 2.3), and a sigmoid per pair (SigLIP, arXiv 2303.15343, sec. 3.2).
Not here: queues and momentum towers, which smaller batches want (`common/momentum.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.clip.resnet import ClipResNet, Pictures
from capfilt.models.common.config import Shape
from capfilt.models.common.layers import (
    ACTIVATIONS,
    PreNormBlock,
    full_precision,
    run_layer,
)
from capfilt.models.common.objectives import mean_cosine, soft_target_loss, stand_ins
from capfilt.models.common.presets import TRUNK
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.trunk import grid_of, resized
from capfilt.models.common.vision import resize_position_embedding

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
        else:
            grid_of(self)
        if (32 * self.width if self.stages else self.width) % self.heads:
            raise UserError(f"vision.heads {self.heads} does not divide the width")

    @property
    def blocks(self) -> tuple[int, ...]:
        """Of a ResNet: how many in each stage."""
        return tuple(map(int, self.stages.split("-")))

    @property
    def grid(self) -> int:
        """Tokens per side."""
        return self.image_size // 32 if self.stages else grid_of(self)

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

    abilities = ("features", "embed")

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

    def embed_image(self, features: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] of an image's features [B, E]."""
        return _unit(features)

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 unit vectors [B, E]; a mask says nothing that the end token does not."""
        return _unit(self.encode_text(ids))

    def resize_image(self, image_size: int) -> None:
        """Takes images of another size from now on: the position embedding is resized, everything else stays."""
        vision = resized(self.config.vision, image_size)
        tower = self.visual_encoder
        tower.pos_embed = nn.Parameter(resize_position_embedding(tower.pos_embed.detach(), vision.grid))
        self.config = dataclasses.replace(self.config, vision=vision)


class ClipViT(Pictures):
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


LOSSES = ("softmax", "sigmoid")


@dataclass(frozen=True)
class ContrastConfig:
    """What decides the loss.

    Attributes:
        loss: one of LOSSES; the sigmoid wants a model with a `logit_bias`.
        chunk: so many rows of the batch's logits at a time, made again for the backward pass, so that memory grows with the
            batch and not with its square; 0 for all at once.
    """

    loss: str = "softmax"
    chunk: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise UserError(f"loss {self.loss!r} is unknown: use one of {', '.join(LOSSES)}")
        if self.chunk < 0:
            raise UserError(f"chunk is {self.chunk}: it must be 0 (all at once) or more")


class ClipTraining(nn.Module):
    """A Clip and its loss. Images and texts are compared with those of all ranks."""

    def __init__(self, model: Clip, config: ContrastConfig | None = None, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.model = model
        self.config = config or ContrastConfig()
        self.ranks = ranks
        if (self.config.loss == "sigmoid") != (model.logit_bias is not None):
            raise UserError(
                f"loss {self.config.loss!r}: the sigmoid loss, and it alone, is for models with a logit_bias"
            )
        self._bound()

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return [*self.model.visual_encoder.blocks, *self.model.text_encoder.blocks]

    def after_step(self) -> None:
        """After a step that moved the weights: keep the scale within CLIP's bound."""
        self._bound()

    @torch.no_grad()
    def _bound(self) -> None:
        self.model.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, and without one "contrast" (the same), "accuracy" (the share of images whose
        own text is the likeliest), "scale", "image_cosine" and "text_cosine" (`mean_cosine` of this rank's rows).
        """
        images = self.model.embed_image(self.model.encode_image(batch.images))
        texts = self.model.embed_text(batch.ids)
        rows = self.ranks.rows(len(images))
        every_image, every_text = rows.gather(images), rows.gather(texts)
        own = torch.arange(rows.offset, rows.offset + len(images), device=images.device)
        weight = batch.weight
        share, read = rows.share(weight), rows.gather_read(batch.dropped)
        scale = self.model.logit_scale.float().exp()
        with full_precision(images):
            if self.config.loss == "softmax":
                from_images = self._summed(_softmax_rows, images, every_text, own, weight, scale, read)
                from_texts = self._summed(_softmax_rows, texts, every_image, own, weight, scale, None)
                loss = (from_images + from_texts) / (2 * share)
                if batch.soft is not None:
                    some, stood = stand_ins(batch, self.model, lambda ids, mask: self.model.embed_text(ids))
                    loss = loss + soft_target_loss(
                        *(images[some], stood, every_image, every_text, 1 / scale),
                        *(batch.soft[some], share, read),
                    )
            else:
                assert self.model.logit_bias is not None
                bias = self.model.logit_bias.float()
                others = None if weight is None else rows.gather(weight)
                given = (images, every_text, own, weight, scale, bias, others, read)
                loss = self._summed(_sigmoid_rows, *given) / share
            hits = self._hits(images.detach(), every_text.detach(), own)
        return {
            "loss": loss,
            "contrast": loss.detach(),
            "accuracy": hits / len(images),
            "scale": scale.detach(),
            "image_cosine": mean_cosine(images.detach()),
            "text_cosine": mean_cosine(texts.detach()),
        }

    def _hits(self, mine: Tensor, every: Tensor, own: Tensor) -> Tensor:
        """How many of this rank's rows are likest to their own candidate, some of them at a time: fp32 scalar."""
        size = self.config.chunk or len(mine)
        hits = torch.zeros((), device=mine.device)
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            hits = hits + ((mine[part] @ every.T).argmax(dim=1) == own[part]).sum()
        return hits

    def _summed(
        self,
        rows_of: nn.Module,
        mine: Tensor,
        every: Tensor,
        own: Tensor,
        weight: Tensor | None,
        *further: Tensor | None,
    ) -> Tensor:
        """The sum over this rank's rows, some of them at a time."""
        size = self.config.chunk or len(mine)
        chunked = size < len(mine)
        total = mine.new_zeros(())
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            some = None if weight is None else weight[part]
            given = mine[part], every, own[part], some, *further
            total = total + run_layer(rows_of, *given, recompute=chunked)
        return total


class _SoftmaxRows(nn.Module):
    """Sum of cross-entropies of rows [n, E], of weight fp32 [n] or 1, against candidates [N, E]; row i's own candidate is
    `own[i]`. A candidate for which `read`, bool [N], is False is none.
    """

    def forward(
        self,
        mine: Tensor,
        every: Tensor,
        own: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        read: Tensor | None,
    ) -> Tensor:
        logits = scale * (mine @ every.T)
        if weight is None:
            return F.cross_entropy(logits, own, reduction="sum")
        if read is not None:
            logits = logits.masked_fill(~read, -math.inf)
        losses = F.cross_entropy(logits, own, reduction="none")
        # A row whose own candidate is none has the weight 0, and an infinite loss.
        return torch.where(weight > 0, losses * weight, 0.0).sum()


class _SigmoidRows(nn.Module):
    """Sum over all pairs of rows [n, E] and candidates [N, E] of -log sigmoid(z (scale * cosine + bias)); z is 1 for a row's
    own candidate, else -1. A pair's weight is the mean of its row's, fp32 [n], and its candidate's, fp32 [N]; 1 without, and
    0 where the candidate's `read`, bool [N], is False.
    """

    def forward(
        self,
        mine: Tensor,
        every: Tensor,
        own: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        others: Tensor | None,
        read: Tensor | None,
    ) -> Tensor:
        logits = scale * (mine @ every.T) + bias
        sign = torch.full_like(logits, -1.0)
        sign[torch.arange(len(own), device=own.device), own] = 1.0
        losses = -F.logsigmoid(sign * logits)
        if weight is not None and others is not None:
            losses = losses * (weight[:, None] + others) / 2
        if read is not None:
            losses = losses * read
        return losses.sum()


_softmax_rows, _sigmoid_rows = _SoftmaxRows(), _SigmoidRows()


def objective(model: Clip, tokenizer: Any, options: Any, ranks: Ranks) -> ClipTraining:
    """The symmetric contrastive loss, or the sigmoid one, over the batches of all ranks."""
    if options.contrast == "sigmoid" and getattr(options, "dropped", "") == "soft":
        raise UserError(
            "--dropped soft --contrast sigmoid: soft targets are a softmax's; give --dropped negatives"
        )
    return ClipTraining(model, ContrastConfig(options.contrast, options.contrast_chunk), ranks)


def configured(config: ClipConfig, options: Any) -> ClipConfig:
    """The sigmoid loss has a bias; a ResNet has no patches."""
    if options.patch_size and config.vision.stages:
        raise UserError(
            f"--patch-size {options.patch_size}: the preset {options.preset} is a ResNet, without patches"
        )
    return dataclasses.replace(config, logit_bias=options.contrast == "sigmoid")


# CLIP, arXiv 2103.00020, table 19 and 20: ViT-B/32 and ViT-L/14. The two others have the original's ResNet, which sees shapes
# early, where BLIP's have a convolutional stem; RN is at a quarter of RN50's width. `trunk` is BLIP's of the name.
PRESETS: dict[str, ClipConfig] = {
    "tiny": ClipConfig(
        ClipVisionConfig(64, width=24, heads=6, stages="1-1-1-1"),
        ClipTextConfig(1000, 64, 128, 3, 4, 256),
        embed_dim=128,
    ),
    "trunk": ClipConfig(
        ClipVisionConfig(192, 32, width=192, depth=1, heads=4, hidden=384, trunk=TRUNK),
        ClipTextConfig(4000, 64, 192, 3, 4, 384),
        embed_dim=256,
    ),
    "small": ClipConfig(
        ClipVisionConfig(128, width=32, heads=16, stages="2-2-2-2"),
        ClipTextConfig(4000, 77, 256, 4, 4, 1024),
        embed_dim=256,
    ),
    "base": ClipConfig(),
    "large": ClipConfig(
        ClipVisionConfig(224, 14, 1024, 24, 16, 4096),
        ClipTextConfig(49408, 77, 768, 12, 12, 3072),
        embed_dim=768,
    ),
}
