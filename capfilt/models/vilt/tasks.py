"""ViLT finetuned: classes of a text with one picture or two, texts ranked for a picture (arXiv 2102.03334, sec. 4.2, 4.4).

Not here: what classes are trained against (`common/task_objectives.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.common.classifier import classifier_head, head_logits, is_head
from capfilt.models.common.config import Classified
from capfilt.models.common.layers import blocks_of, seeded
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.weights import start_from
from capfilt.models.vilt.model import ImageTokens, Vilt, ViltBody, ViltConfig
from capfilt.tables.contracts import LABELS


@dataclass(frozen=True)
class ViltClassifierConfig(Classified, ViltConfig):
    """Everything that decides the shape of a ViltClassifier; `to_dict`/`from_dict` go through JSON unchanged.

    Attributes:
        task: which of `capfilt.tables.contracts.TASKS` it was made for.
        classes: what the outputs stand for, in order: the labels of the task, or the answers it can give.
        pictures: how many a text is seen with, 1 or 2.
    """

    has: str = "none"
    task: str = "vqa"
    classes: tuple[str, ...] = ("no", "yes")
    pictures: int = 1
    max_words: int = 0  # ViLT, code: texts are cut by tokens alone

    def __post_init__(self) -> None:
        Classified.__post_init__(self)
        ViltConfig.__post_init__(self)


class ViltClassifier(ViltBody):
    """See the module's docstring. Ids, masks and pictures are as in `Vilt`."""

    abilities = ("judge",)
    config: ViltClassifierConfig

    def __init__(self, config: ViltClassifierConfig) -> None:
        super().__init__(config, config.pictures)
        self.cls_head = classifier_head(config.pictures * config.width, len(config.classes), 2 * config.width)

    @property
    def labels(self) -> tuple[str, ...]:
        """What it was trained to tell apart: the task's labels, or answers as most people spell them."""
        return self.config.classes

    @property
    def pictures(self) -> int:
        """How many pictures a text is seen with."""
        return self.config.pictures

    def judge(
        self, ids: Tensor, mask: Tensor | None, images: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """fp32 logits [B, C] of texts ids int64 [B, L], mask bool [B, L], seen with images [B, pictures, 3, H, W].

        image_mask: bool [B, pictures, H, W], as `Patches.forward` takes each picture's.
        """
        pooled = []
        for number, picture in enumerate(images.unbind(1)):
            image = self.encode_image(picture, None if image_mask is None else image_mask[:, number])
            pooled.append(self.pool(self.fuse(ids, mask, image, number, first=True)))
        return head_logits(self.cls_head, torch.cat(pooled, dim=1))


def classifier_from_vilt(
    model: Vilt | ViltClassifier,
    task: str,
    classes: Sequence[str],
    seed: int = 0,
    drop_path: float = 0.0,
    pictures: int = 1,
) -> ViltClassifier:
    """A ViltClassifier that starts from a pretrained ViLT, or from a classifier of other classes; its head is new.

    A second picture's modality type starts as a copy of the first one's (released code). drop_path is for models that have
    it; a ViLT has dropout.
    """
    shape: dict[str, Any] = {each.name: getattr(model.config, each.name) for each in fields(ViltConfig)}
    own: dict[str, Any] = {"has": "none", "task": task, "classes": tuple(classes), "pictures": pictures}
    config = ViltClassifierConfig(**{**shape, **own})
    made = seeded(ViltClassifier, config, seed)
    found = {name: each for name, each in model.state_dict().items() if name.split(".")[0] not in _HEADS}
    types = found["modality"]
    found["modality"] = torch.cat([types[:2], types[1:2]])[: 1 + pictures]
    start_from(made, found, is_head)
    return made


def pair_from_vilt(model: Vilt | ViltClassifier, seed: int = 0, drop_path: float = 0.0) -> ViltClassifier:
    """As `classifier_from_vilt`, for statements about two pictures."""
    return classifier_from_vilt(model, "nlvr", LABELS["nlvr"], seed, drop_path, 2)


_HEADS = ("itm_head", "mlm_head", "mlm_words", "cls_head")


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


def retrieval(model: Vilt, tokenizer: Any, options: Any, ranks: Ranks) -> RankingTraining:
    """A picture's own text above fifteen others (sec. 4.4)."""
    return RankingTraining(model, ranks=ranks)
