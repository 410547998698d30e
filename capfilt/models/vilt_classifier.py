"""ViLT as a classifier of a text with one picture or two: closed-set VQA, visual entailment, statements (NLVR2).

A pair of pictures is two passes of the text, one with each, every picture under a modality type of its own; the head reads
the pooled states side by side (ViLT, arXiv 2102.03334, sec. 4.3 and released code, for VQA and NLVR2; entailment, which it
leaves out, has VQA's head).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from capfilt.models.classifier import classifier_head, head_logits
from capfilt.models.config import Classified
from capfilt.models.vilt import Vilt, ViltBody, ViltConfig
from capfilt.models.weights import start_from
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


def build_vilt_classifier(config: ViltClassifierConfig, seed: int = 0) -> ViltClassifier:
    """A freshly initialised ViltClassifier: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ViltClassifier(config)


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
    made = build_vilt_classifier(config, seed)
    found = {name: each for name, each in model.state_dict().items() if name.split(".")[0] not in _HEADS}
    types = found["modality"]
    found["modality"] = torch.cat([types[:2], types[1:2]])[: 1 + pictures]
    start_from(made, found, lambda name: name.startswith("cls_head."))
    return made


def pair_from_vilt(model: Vilt | ViltClassifier, seed: int = 0, drop_path: float = 0.0) -> ViltClassifier:
    """As `classifier_from_vilt`, for statements about two pictures."""
    return classifier_from_vilt(model, "nlvr", LABELS["nlvr"], seed, drop_path, 2)


_HEADS = ("itm_head", "mlm_head", "mlm_words", "cls_head")
