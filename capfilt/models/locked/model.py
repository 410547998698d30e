"""A CLIP with locked towers: frozen encoders that already know pictures and words, and a head of two layers on each.

Locked towers are LiT's (arXiv 2111.07991, there of pictures alone). Only the heads learn, so that a training takes seconds once
the encoders' features are known (`common/memo.py`). The features of pictures are rounded to float16 always, so that it makes no
difference whether they were remembered.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.common.config import Shape
from capfilt.models.common.layers import full_precision
from capfilt.models.common.memo import Memo, keys_of
from capfilt.models.common.objectives import contrastive_loss, contrastive_targets, mean_cosine, positives
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.sentence import SentenceEncoder, recipe_of
from capfilt.models.common.text import TextConfig
from capfilt.models.common.trunk import TRUNKS, Seeing, Trunk
from capfilt.models.family import found

_OVER = "capfilt.models.locked.over"  # by name: it is made of this module's heads
MAX_SCALE = 100.0
"""CLIP, sec. 2.5: the learned scale of the logits is clipped here."""


@dataclass(frozen=True)
class LockedVisionConfig:
    """The picture encoder; its features are the mean of its map, and the means of `cells` x `cells` parts of it.

    On Flickr8k's val split a head on the mean alone retrieved more than with 3 x 3 parts, at a tenth of the features.
    """

    image_size: int = 256
    trunk: str = "efficientnet_lite2"  # "pixels": the pixels themselves, on a grid of 8 x 8
    trunk_frozen: bool = True
    cells: int = 0

    def __post_init__(self) -> None:
        if self.trunk not in (*TRUNKS, "pixels"):
            raise UserError(f"vision.trunk is {self.trunk!r}: use pixels, {', '.join(TRUNKS)}")

    @property
    def features(self) -> tuple[int, int]:
        """The shape of a picture's features: vectors, channels."""
        return (self.cells**2 + 1, TRUNKS[self.trunk].channels) if self.trunk in TRUNKS else (1, 3 * 64)


@dataclass(frozen=True)
class LockedTextConfig(TextConfig):
    """The text encoder; `encoder` "" is a new one of this geometry, which learns."""

    vocab_size: int = 30524
    width: int = 384
    depth: int = 6
    heads: int = 12
    hidden: int = 1536
    max_positions: int = 512
    dropout: float = 0.0
    attention_dropout: float = 0.0
    encoder: str = "minilm"
    pooling: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder:
            recipe_of(self.encoder)


@dataclass(frozen=True)
class LockedConfig(Shape):
    """Everything that decides the shape of a Locked; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: LockedVisionConfig = field(default_factory=LockedVisionConfig)
    text: LockedTextConfig = field(default_factory=LockedTextConfig)
    # Hidden width and dropout were chosen on Flickr8k's val split: heads without dropout learn a thousand pictures by heart.
    hidden: int = 1024
    embed_dim: int = 256
    dropout: float = 0.5
    max_text_tokens: int = 64
    max_words: int = 0

    @property
    def frozen(self) -> bool:
        """Whether pretrained encoders stay as they are."""
        return self.vision.trunk_frozen

    @property
    def pretrained(self) -> tuple[str, ...]:
        """The attributes of the model that hold pretrained encoders."""
        seen = ("visual_encoder",) if self.vision.trunk in TRUNKS else ()
        return (*seen, "text_encoder") if self.text.encoder else seen


class Eye(Seeing):
    """Features [B, V, C] of pixels uint8 [B, 3, S, S] or normalised floats; float16 where nothing learns."""

    def __init__(self, config: LockedVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.memo: Memo | None = None
        self.trunk: Trunk | None = None
        self.constants = ((0.5,) * 3, (0.5,) * 3)
        if config.trunk in TRUNKS:
            recipe = TRUNKS[config.trunk]
            self.trunk = Trunk(recipe, config.image_size, config.trunk_frozen)
            self.constants = (recipe.mean, recipe.std)
        self.set_normalisation()

    @property
    def frozen(self) -> bool:
        return self.trunk is None or self.trunk.frozen

    @property
    def encoder_name(self) -> str:
        """Its name among features; "" where there is nothing worth keeping."""
        c = self.config
        return f"{c.trunk}-{c.image_size}-{c.cells}" if self.trunk and self.frozen else ""

    def forward(self, pixels: Tensor) -> Tensor:
        return self.trunk_features(pixels) if self.frozen else self._seen(pixels)

    @torch.no_grad()
    def trunk_features(self, pixels: Tensor) -> Tensor:
        # What is remembered must not depend on the precision of who asked first.
        with full_precision(pixels):
            if self.memo is None or pixels.dtype != torch.uint8:
                return self._seen(pixels).to(torch.float16)
            features = self.memo.of(keys_of(list(pixels)), lambda rows: self._seen(pixels[rows]))
            return features.to(pixels.device)

    def _seen(self, pixels: Tensor) -> Tensor:
        x = self.normalise(pixels)
        if self.trunk is None:
            return F.adaptive_avg_pool2d(x, 8).flatten(1)[:, None]
        tokens = self.trunk(x)
        grid = math.isqrt(tokens.shape[1])
        whole = tokens.transpose(1, 2).unflatten(2, (grid, grid)).float()
        features: Tensor = whole.mean((2, 3))[:, None]
        if self.config.cells:
            parts = F.adaptive_avg_pool2d(whole, self.config.cells).flatten(2)
            features = torch.cat([features, parts.transpose(1, 2)], dim=1)
        return features


class Head(nn.Module):
    """Features [B, V, C], each vector normalised -> [B, E], by two layers."""

    def __init__(self, vectors: int, channels: int, config: LockedConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.wide = nn.Linear(vectors * channels, config.hidden)
        self.drop = nn.Dropout(config.dropout)
        self.narrow = nn.Linear(config.hidden, config.embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(features.to(self.wide.weight.dtype)).flatten(1)
        out: Tensor = self.narrow(self.drop(F.gelu(self.wide(self.drop(x)))))
        return out


class Heads(nn.Module):
    """Two encoders and a head on each. Images are pixels uint8 [B, 3, S, S], or features float16 [B, V, C]; texts ids int64
    [B, L] with their mask, or vectors [B, D].

    seen, read: the shape of a picture's features (vectors, channels), and the width of a text's.
    """

    abilities = ("features", "embed")

    def __init__(
        self, config: Any, eye: nn.Module, reader: nn.Module, seen: tuple[int, int], read: int
    ) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = eye
        self.text_encoder = reader
        self.image_head = Head(*seen, config)
        self.text_head = Head(1, read, config)
        # CLIP, sec. 2.5: log-parameterised, starts at 1 / 0.07.
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, images: Tensor) -> Tensor:
        """The encoder's features [B, V, C], float16 where it is frozen; the first is of the whole picture."""
        out: Tensor = images if images.dim() == 3 else self.visual_encoder(images)
        return out

    def embed_image(self, features: Tensor) -> Tensor:
        """fp32 unit vectors [B, E] of features [B, V, C], or [B, C] of one."""
        return F.normalize(self._headed(self.image_head, features), dim=-1)

    def like_image(self, features: Tensor) -> Tensor:
        """fp32 unit vectors [B, C] by which pictures are like pictures: the encoder's own, of features as above."""
        return F.normalize((features[:, 0] if features.dim() == 3 else features).float(), dim=-1)

    def like_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """fp32 unit vectors [B, D] by which texts are like texts: the encoder's own."""
        return F.normalize(self.text_encoder(ids, mask).float(), dim=-1)

    def embed_text(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """fp32 unit vectors [B, E] of texts, or of their encoder's vectors [B, D]."""
        vectors = ids
        if not ids.is_floating_point():
            vectors = self.text_encoder(ids, torch.ones_like(ids, dtype=torch.bool) if mask is None else mask)
        return F.normalize(self._headed(self.text_head, vectors[:, None]), dim=-1)

    @staticmethod
    def _headed(head: Head, features: Tensor) -> Tensor:
        # Heads are small: fp32 costs nothing, and cosines of judges are compared in their last digits.
        with full_precision(features):
            out: Tensor = head(features.float())
        return out


class Locked(Heads):
    """See the module's docstring."""

    def __init__(self, config: LockedConfig) -> None:
        text, eye = config.text, Eye(config.vision)
        reader = SentenceEncoder(text, text.pooling, text.encoder, config.frozen)
        super().__init__(config, eye, reader, config.vision.features, text.width)


class LockedTraining(nn.Module):
    """A Locked and its loss: CLIP's, over the batches of all ranks, where texts of one picture are no negatives.

    encoder_rate: factor on the learning rate of pretrained encoders that learn.
    """

    def __init__(self, model: Heads, ranks: Ranks = ALONE, encoder_rate: float = 0.0) -> None:
        super().__init__()
        self.model, self.ranks, self.encoder_rate = model, ranks, encoder_rate

    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by parameter."""
        within = tuple(f"model.{name}." for name in self.model.config.pretrained)
        return {name: self.encoder_rate for name, _ in self.named_parameters() if name.startswith(within)}

    def blocks(self) -> list[nn.Module]:
        """Nothing is large enough to be split over ranks."""
        return []

    @torch.no_grad()
    def after_step(self) -> None:
        """After a step that moved the weights: keep the scale within CLIP's bound."""
        self.model.logit_scale.clamp_(max=math.log(MAX_SCALE))

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, and without one "contrast" (the same), "accuracy" (the share of images whose
        likeliest text is one of their own), "scale", "image_cosine" and "text_cosine".
        """
        images = self.model.embed_image(self.model.encode_image(batch.images))
        texts = self.model.embed_text(batch.ids, batch.mask)
        rows = self.ranks.rows(len(images))
        every_image, every_text = rows.gather(images), rows.gather(texts)
        index, words = rows.gather(batch.image_index), rows.gather(batch.text_index)
        matches = positives(batch.image_index, batch.text_index, index, words, offset=rows.offset)
        targets = contrastive_targets(matches)
        scale = self.model.logit_scale.float().exp()
        loss = contrastive_loss(
            images,
            texts,
            every_image,
            every_text,
            1 / scale,
            (targets, targets),
            None,
            rows.total / self.ranks.world,
        )
        best = (images.detach() @ every_text.detach().T).argmax(dim=1)
        return {
            "loss": loss,
            "contrast": loss.detach(),
            "accuracy": matches.gather(1, best[:, None]).float().mean(),
            "scale": scale.detach(),
            "image_cosine": mean_cosine(images.detach()),
            "text_cosine": mean_cosine(texts.detach()),
        }


def objective(model: Heads, tokenizer: Any, options: Any, ranks: Ranks) -> LockedTraining:
    """CLIP's symmetric contrast of the heads' vectors. UserError where a checkpoint's encoders do not learn as asked."""
    if model.config.frozen != (options.encoder_lr == 0):
        state = "are frozen" if model.config.frozen else "learn; give a rate above 0"
        raise UserError(f"--encoder-lr {options.encoder_lr:g}: the encoders of {options.init} {state}")
    return LockedTraining(model, ranks, options.encoder_lr / options.learning_rate)


def configured(config: LockedConfig, options: Any) -> Any:
    """Pretrained encoders that are frozen, or learn; a CLIP's in place of both. UserError where there are none to learn."""
    if options.encoders:
        return found(f"{_OVER}:over")(config, options.encoders, options.encoder_lr == 0)
    if options.encoder_lr and not config.pretrained:
        raise UserError(
            f"--encoder-lr {options.encoder_lr:g}: the preset {options.preset} has no pretrained encoders"
        )
    vision = dataclasses.replace(config.vision, trunk_frozen=options.encoder_lr == 0)
    return dataclasses.replace(config, vision=vision)


def vocabulary(config: Any, options: Any) -> str:
    """The file of the text encoder's own vocabulary; "" for one that is new."""
    if options.encoders:
        return str(found(f"{_OVER}:vocabulary")(options.encoders))
    return recipe_of(config.text.encoder).vocabulary() if config.text.encoder else ""


def start_encoders(model: Any, directory: str) -> Any:
    """Takes the towers of a CLIP's checkpoint; returns its tokenizer."""
    return found(f"{_OVER}:start")(model, directory)


_SCRATCH = LockedTextConfig(4000, 192, 3, 4, 768, 64, encoder="")
PRESETS: dict[str, LockedConfig] = {
    "tiny": LockedConfig(
        LockedVisionConfig(64, "pixels"), LockedTextConfig(1000, 32, 1, 2, 64, 64, encoder=""), 64, 32, 0.0
    ),
    "lite2-minilm": LockedConfig(),
    "lite0-minilm": LockedConfig(LockedVisionConfig(192, "efficientnet_lite0")),
    "lite2-scratch": LockedConfig(text=_SCRATCH),
}
