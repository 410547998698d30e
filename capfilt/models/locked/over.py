"""A locked CLIP whose encoders are the two towers of anybody's CLIP (`--encoders`): heads on the features of both.

Not here: the heads and their loss (`model.py`), how a checkpoint is read (`capfilt.models.checkpoint`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.common.config import Shape, checked_fields
from capfilt.models.common.layers import full_precision
from capfilt.models.common.memo import Memo, keys_of
from capfilt.models.common.weights import read_json
from capfilt.models.family import found
from capfilt.models.locked.model import Heads, LockedConfig

_CLIP = "clip"  # `model_type` of the kind that fits
_FITS = "give a CLIP: capfilt's, transformers' CLIPModel, or the tensors of OpenAI and open_clip"
_SIZES = ("hidden", "embed_dim", "dropout", "max_text_tokens", "max_words")


def _kind() -> Any:
    # By name: a family knows no other.
    return found("capfilt.models:kind_named")(_CLIP)


@dataclass(frozen=True)
class OverConfig(Shape):
    """Everything that decides the shape of an Over: the CLIP's config, whether it is frozen, and the heads' sizes."""

    towers: Any = field(default_factory=lambda: _kind().config())
    frozen: bool = True
    hidden: int = LockedConfig.hidden
    embed_dim: int = LockedConfig.embed_dim
    dropout: float = LockedConfig.dropout
    max_text_tokens: int = LockedConfig.max_text_tokens
    max_words: int = LockedConfig.max_words

    pretrained = ("visual_encoder", "text_encoder")

    @classmethod
    def sides(cls) -> tuple[str, ...]:
        """Both, which are the CLIP's."""
        return ("vision", "text")

    @property
    def vision(self) -> Any:
        """The CLIP's."""
        return self.towers.vision

    @property
    def text(self) -> Any:
        """The CLIP's."""
        return self.towers.text

    def _with(self, **changes: dict[str, Any]) -> Self:
        return dataclasses.replace(self, towers=self.towers._with(**changes))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """As `Shape.from_dict`."""
        rest = dict(values)
        towers = rest.pop("towers", {})
        if not isinstance(towers, Mapping):
            raise UserError("model config: towers is no table of fields")
        return cls(towers=_kind().config.from_dict(towers), **checked_fields(cls(), rest, ""))


class Side(nn.Module):
    """A tower of a CLIP, and its features: float16 where it is frozen, and then remembered under `name`."""

    def __init__(self, tower: nn.Module, name: str, frozen: bool) -> None:
        super().__init__()
        self.tower, self.frozen = tower, frozen
        self.encoder_name = name if frozen else ""
        self.memo: Memo | None = None
        self.requires_grad_(not frozen)

    def train(self, mode: bool = True) -> Self:
        # Running statistics of a frozen ResNet stay too.
        return super().train(mode and not self.frozen)

    def features(self, given: Tensor, keyed: Callable[[], Sequence[Tensor]] | None) -> Tensor:
        """[B, E] of inputs; `keyed` gives the tensors that they are known by, None for inputs that are not remembered."""
        if not self.frozen:
            out: Tensor = self.tower(given)
            return out

        def seen(rows: Tensor) -> Tensor:
            out: Tensor = self.tower(rows).to(torch.float16)
            return out

        # What is remembered must not depend on the precision of who asked first.
        with torch.no_grad(), full_precision(given):
            if self.memo is None or keyed is None:
                return seen(given)
            return self.memo.of(keys_of(keyed()), lambda rows: seen(given[rows])).to(given.device)


class Pictures(Side):
    """Features [B, 1, E] of pixels uint8 [B, 3, S, S] or normalised floats."""

    def forward(self, pixels: Tensor) -> Tensor:
        keyed = (lambda: list(pixels)) if pixels.dtype == torch.uint8 else None
        return self.features(pixels, keyed)[:, None]

    def trunk_features(self, pixels: Tensor) -> Tensor:
        """As `Seeing.trunk_features`, of the whole tower."""
        out: Tensor = self(pixels)
        return out


class Texts(Side):
    """Features [B, E] of ids int64 [B, L] with their mask."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.features(ids, lambda: [row[real] for row, real in zip(ids, mask, strict=True)])


class Over(Heads):
    """See the module's docstring. A picture's features are one vector of the CLIP's width, before it is normalised."""

    def __init__(self, config: OverConfig) -> None:
        clip, width = _kind().model(config.towers), config.towers.embed_dim
        # Weights do not say these.
        said = f"{config.towers.activation}-{config.image_size}-{config.vision.heads}"
        super().__init__(
            config,
            Pictures(clip.visual_encoder, f"clip-{said}", config.frozen),
            Texts(clip.text_encoder, f"clip-text-{said}-{config.text.heads}", config.frozen),
            (1, width),
            width,
        )


def shape_of(directory: str | Path) -> Any:
    """The config of a CLIP's checkpoint; no weights are loaded. UserError, naming what fits, for any other."""
    path = Path(directory) / "config.json"
    theirs = str(read_json(path).get("model_type", "")) if path.is_file() else ""
    if theirs.startswith("siglip"):
        raise UserError(f"--encoders {directory}: a SigLIP, whose towers capfilt's CLIP has not; {_FITS}")
    shape = found("capfilt.models.checkpoint:shape_of")(directory)
    kind = found("capfilt.models:kind_of")(shape)
    if kind.name != _CLIP:
        raise UserError(f"--encoders {directory}: is {kind.one}; {_FITS}")
    return shape


def over(config: LockedConfig, directory: str | Path, frozen: bool) -> OverConfig:
    """The config of these heads over the CLIP of a checkpoint."""
    return OverConfig(shape_of(directory), frozen, *(getattr(config, name) for name in _SIZES))


def vocabulary(directory: str | Path) -> str:
    """The file of the CLIP's vocabulary."""
    layout, place = found("capfilt.models.layouts:locate")(directory)
    folder = place if place.is_dir() else place.parent
    return str(layout.vocabulary.find(folder) if layout else folder / "tokenizer.json")


def start(model: Over, directory: str | Path) -> Any:
    """Takes the weights of the CLIP of a checkpoint; returns its tokenizer."""
    contents, _ = found("capfilt.models.checkpoint:open_any")(directory, model.config.image_size)
    for name in model.config.pretrained:
        getattr(model, name).tower.load_state_dict(getattr(contents.model, name).state_dict())
    return contents.tokenizer
