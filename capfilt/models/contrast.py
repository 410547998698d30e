"""What a dual encoder learns from: each image's own text among all of the batch, and the other way round.

Two losses: softmax over the batch (CLIP, arXiv 2103.00020, sec. 2.3), and a sigmoid per pair (SigLIP, arXiv 2303.15343,
sec. 3.2). Queues and momentum towers, which smaller batches want, are `objectives.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.clip import MAX_SCALE, Clip
from capfilt.models.layers import full_precision, run_layer
from capfilt.models.objectives import mean_cosine
from capfilt.models.ranks import ALONE, Ranks

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
        images = self.model.embed_image(batch.images)
        texts = self.model.embed_text(batch.ids)
        rows = self.ranks.rows(len(images))
        every_image, every_text = rows.gather(images), rows.gather(texts)
        own = torch.arange(rows.offset, rows.offset + len(images), device=images.device)
        # The rows that a rank has on average, so that the mean over ranks is the mean over everyone's rows.
        share = rows.total / self.ranks.world
        scale = self.model.logit_scale.float().exp()
        with full_precision(images):
            if self.config.loss == "softmax":
                from_images = self._summed(_softmax_rows, images, every_text, own, scale)
                from_texts = self._summed(_softmax_rows, texts, every_image, own, scale)
                loss = (from_images + from_texts) / (2 * share)
            else:
                assert self.model.logit_bias is not None
                bias = self.model.logit_bias.float()
                loss = self._summed(_sigmoid_rows, images, every_text, own, scale, bias) / share
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
        self, rows_of: nn.Module, mine: Tensor, every: Tensor, own: Tensor, *further: Tensor
    ) -> Tensor:
        """The sum over this rank's rows, some of them at a time."""
        size = self.config.chunk or len(mine)
        chunked = size < len(mine)
        total = mine.new_zeros(())
        for start in range(0, len(mine), size):
            part = slice(start, start + size)
            total = total + run_layer(rows_of, mine[part], every, own[part], *further, recompute=chunked)
        return total


class _SoftmaxRows(nn.Module):
    """Sum of cross-entropies of rows [n, E] against candidates [N, E]; row i's own candidate is `own[i]`."""

    def forward(self, mine: Tensor, every: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        return F.cross_entropy(scale * (mine @ every.T), own, reduction="sum")


class _SigmoidRows(nn.Module):
    """Sum over all pairs of rows [n, E] and candidates [N, E] of -log sigmoid(z (scale * cosine + bias)); z is 1 for a row's
    own candidate, else -1.
    """

    def forward(self, mine: Tensor, every: Tensor, own: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * (mine @ every.T) + bias
        sign = torch.full_like(logits, -1.0)
        sign[torch.arange(len(own), device=own.device), own] = 1.0
        return -F.logsigmoid(sign * logits).sum()


_softmax_rows, _sigmoid_rows = _SoftmaxRows(), _SigmoidRows()
