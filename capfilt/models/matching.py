"""What a ViLT learns from: which picture a text belongs to, its hidden words, and which patches its words speak of; for
retrieval, which of several texts is a picture's own.

Three losses of two passes, and one of its own for retrieval (ViLT, arXiv 2102.03334, sec. 3.2 and 4.4, released code). Which
words are hidden is `masking.py`'s, how words find patches `transport.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.kinds import blocks_of
from capfilt.models.masking import IGNORED, Masking
from capfilt.models.objectives import hard_negatives, matching_loss, token_loss
from capfilt.models.ranks import ALONE, Ranks
from capfilt.models.transport import cosine_cost, transport_distance
from capfilt.models.vilt import ImageTokens, States, Vilt


@dataclass(frozen=True)
class MatchingConfig:
    """What decides the losses.

    Attributes:
        alignment: weight of word-patch alignment beside matching and masked words, which have 1 (released code: 0.1); with 0
            it is not computed.
        max_patches: so many of a picture's patches are seen in a training pass, drawn anew for each (sec. 4.2: 200, of
            pictures of up to 240); 0 for all. A square of 384 px has 144, so there the default leaves none out.
    """

    alignment: float = 0.1
    max_patches: int = 200

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alignment) and self.alignment >= 0):
            raise UserError(f"alignment is {self.alignment}: give a weight of 0 or more")
        if self.max_patches < 0:
            raise UserError(f"max_patches is {self.max_patches}: give 0 (all) or more")


class ViltTraining(nn.Module):
    """A Vilt and its losses."""

    def __init__(
        self, model: Vilt, masking: Masking, config: MatchingConfig | None = None, ranks: Ranks = ALONE
    ) -> None:
        super().__init__()
        model.require("match")
        model.require("words")
        self.model = model
        self.masking = masking
        self.config = config or MatchingConfig()
        self.ranks = ranks

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient (matching + masked words + `alignment` times alignment), and without one
        "itm", "mlm", "wpa", "itm_accuracy", "itm_balanced_accuracy", and "mlm_accuracy" (of the hidden words).

        Half of the texts are seen with another picture, drawn uniformly from this rank's batch; one that is the same, or has
        the same text, is never drawn, and a text without any other leaves the loss. Draws come from torch's global CPU
        generator. With other ranks, means are over everyone's rows (see `Rows`).
        """
        model, limit = self.model, self.config.max_patches if self.training else 0
        images = model.visual_encoder.seen_once(batch.images)
        picture, label, keep = mismatched(batch.image_index, batch.text_index)
        image = model.encode_image(images[picture], limit=limit)
        states = model.fuse(batch.ids, batch.mask, image)
        matching = matching_loss(model.match_logits(states), label, keep, self.ranks)
        found = {"itm": matching.loss}
        if self.config.alignment:
            found["wpa"] = alignment_loss(states, batch.mask, image, label, keep, self.ranks)
        ids, said = self.masking(batch.ids, batch.mask)
        hidden = said != IGNORED
        seen = model.fuse(ids, batch.mask, model.encode_image(images, limit=limit)).text
        logits = model.word_logits(seen[hidden])
        found["mlm"] = token_loss(logits, said[hidden], 0.0, self.ranks)
        loss = found["itm"] + found["mlm"] + self.config.alignment * found.get("wpa", 0.0)
        named = (logits.detach().argmax(dim=1) == said[hidden]).float().sum() / hidden.sum().clamp(min=1)
        return {
            "loss": loss,
            **{name: each.detach() for name, each in found.items()},
            "itm_accuracy": matching.accuracy,
            "itm_balanced_accuracy": matching.balanced_accuracy,
            "mlm_accuracy": named,
        }


class RankingTraining(nn.Module):
    """A Vilt and its finetuning for retrieval: a picture's own text above others, by match logit (sec. 4.4, code).

    The published model takes the match row of the pretrained head for a score of its own; here it stays where it is. What the
    other row says is not trained on, so probabilities of a match mean nothing afterwards.

    Args:
        false_texts: so many other texts beside a picture's own (released code: 15).
    """

    def __init__(self, model: Vilt, false_texts: int = 15, ranks: Ranks = ALONE) -> None:
        super().__init__()
        model.require("match")
        if false_texts < 1:
            raise UserError(f"false_texts is {false_texts}: give 1 or more")
        self.model = model
        self.false_texts = false_texts
        self.ranks = ranks

    @property
    def leaves_unused(self) -> bool:
        """The head of hidden words, where there is one, gets no gradient."""
        return True

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, the mean over pictures of the cross-entropy of their own text among the drawn
        ones, and "accuracy", the share whose own text scores above all of them.

        The others are drawn uniformly and without repetition from this rank's batch (released code: from all training texts),
        never one of the same picture or an equal text; all there are, where they are fewer. A picture without any leaves the
        loss. Draws come from torch's global CPU generator.
        """
        texts, there = self.drawn(batch.image_index, batch.text_index)
        rows, ways = texts.shape
        image = self.model.encode_image(batch.images)
        repeated = ImageTokens(
            image.tokens.repeat_interleave(ways, dim=0),
            None if image.mask is None else image.mask.repeat_interleave(ways, dim=0),
        )
        chosen = texts.flatten()
        states = self.model.fuse(batch.ids[chosen], batch.mask[chosen], repeated, first=True)
        scores = self.model.match_logits(states)[:, 1].view(rows, ways).masked_fill(~there, -math.inf)
        kept = there[:, 1:].any(dim=1)
        loss = -(scores.log_softmax(dim=1)[:, 0] * kept).sum()
        count = self.ranks.mean(kept.sum()).clamp(min=1.0 / self.ranks.world)
        right = (scores.detach().argmax(dim=1) == 0) & kept
        return {"loss": loss / count, "accuracy": right.sum() / kept.sum().clamp(min=1)}

    def drawn(self, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor]:
        """(texts int64 [B, 1 + F], there bool [B, 1 + F]): each row's own text, then others, `there` where they are others."""
        rows = len(image_index)
        other = (image_index[:, None] != image_index) & (text_index[:, None] != text_index)
        order = torch.rand(rows, rows).to(other.device).masked_fill(~other, -1.0)
        best = order.topk(min(self.false_texts, rows), dim=1)
        own = torch.arange(rows, device=other.device)[:, None]
        there = torch.cat([torch.ones_like(own, dtype=torch.bool), best.values >= 0], dim=1)
        return torch.cat([own, best.indices], dim=1), there


def mismatched(image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(picture int64 [B] that text i is seen with, label int64 [B] with 1 = its own, keep bool [B]).

    Half of the texts (the larger half of an odd number), drawn anew, get a picture that is not theirs; where there is none,
    keep is False.
    """
    rows = len(image_index)
    device = image_index.device
    other, found = hard_negatives(torch.zeros(rows, rows, device=device), image_index, text_index)
    own = (torch.randperm(rows) < rows // 2).to(device)
    return torch.where(own, torch.arange(rows, device=device), other), own.long(), own | found


def alignment_loss(
    states: States, mask: Tensor, image: ImageTokens, label: Tensor, keep: Tensor, ranks: Ranks = ALONE
) -> Tensor:
    """Word-patch alignment: fp32 scalar, the transport distances of matching pairs minus those of others, over their count.

    Between the states of a text's tokens without [CLS] and [SEP], and of a picture's patches without its [CLS], by cosine.
    mask: bool [B, L] of the texts. label, keep: int64 and bool [B], as of `matching_loss`.
    """
    words = mask.bool().clone()
    words[:, 0] = False
    words.scatter_(1, mask.sum(dim=1, keepdim=True) - 1, False)
    patches = states.image[:, 1:]
    there = torch.ones(patches.shape[:2], dtype=torch.bool, device=mask.device)
    if image.mask is not None:
        there = image.mask[:, 1:]
    distance = transport_distance(cosine_cost(states.text, patches), words, there)
    sign = torch.where(label == 1, 1.0, -1.0) * keep
    return (distance * sign).sum() / ranks.mean(keep.sum()).clamp(min=1.0 / ranks.world)
