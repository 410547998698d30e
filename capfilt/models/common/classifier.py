"""Classifiers of texts with pictures, or of pictures alone: their configuration, their heads.

Two heads are published: ALBEF's for entailment (arXiv 2107.07651, sec. 5 and code: linear, ReLU, linear), ViLT's for VQA
(arXiv 2102.03334, code: linear to twice the width, LayerNorm, GELU, linear). Not here: the models (a family's `tasks.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from torch import Tensor, nn

from capfilt.models.common.config import Classified, ModelConfig
from capfilt.models.common.layers import full_precision, init_std, init_truncated
from capfilt.models.common.text import TextTransformer
from capfilt.models.common.vision import Towered, VisionConfig, VisionTower


@dataclass(frozen=True)
class ClassifierConfig(Classified, ModelConfig):
    """Everything that decides the shape of a BlipClassifier; `to_dict`/`from_dict` go through JSON unchanged.

    Attributes:
        task: which of `capfilt.tables.contracts.TASKS` it was made for; decides the head, and what an output means.
        classes: what the outputs stand for, in order: the labels of the task, or the answers it can give.
    """

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=384, drop_path=0.1))
    max_text_tokens: int = 35
    max_words: int = 50
    task: str = "entailment"
    classes: tuple[str, ...] = ("contradiction", "neutral", "entailment")

    @property
    def pictures_alone(self) -> bool:
        """Whether no text is read."""
        return self.task == "classification"


class Classifier(Towered, ABC):
    """A vision tower, a reader of texts seen with its tokens (none for pictures alone), and a head.

    Ids are int64 [B, L], masks bool [B, L], as the tokenizer gives them.
    """

    abilities = ("features", "judge")
    pictures = 1
    text_encoder: TextTransformer | None

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = None if config.pictures_alone else self.reader()
        self.cls_head = head_for(config)

    @abstractmethod
    def reader(self) -> TextTransformer:
        """The reader of texts."""

    @abstractmethod
    def read_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """`class_logits` where texts are read."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it was trained to tell apart: the task's labels, or answers as most people spell them."""
        return self.config.classes

    def class_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """fp32 logits [B, C] of texts seen with image tokens [B * pictures, N, Dv]: all first ones before all second ones.

        A classifier of pictures alone reads no text.
        """
        if self.text_encoder is None:
            return head_logits(self.cls_head, image_tokens[:, 0])
        return self.read_logits(ids, mask, image_tokens)

    def judge(self, ids: Tensor, mask: Tensor | None, images: Tensor) -> Tensor:
        """`class_logits` of texts seen with images [B, pictures, 3, S, S]."""
        return self.class_logits(ids, mask, self.encode_image(images.transpose(0, 1).flatten(0, 1)))


def is_head(name: str) -> bool:
    """Whether a tensor is of the head."""
    return name.startswith("cls_head.")


def head_for(config: ClassifierConfig) -> nn.Sequential:
    """[.., D] -> [.., C]: `classifier_head`, or one linear layer for pictures alone."""
    if not config.pictures_alone:
        wide = 2 * config.text.width if config.task == "vqa" else 0
        return classifier_head(config.text.width, len(config.classes), wide)
    head = nn.Sequential(nn.Linear(config.vision.width, len(config.classes)))
    init_truncated(head, init_std(config.vision.width))
    return head


def classifier_head(width: int, classes: int, wide: int = 0) -> nn.Sequential:
    """[.., D] -> [.., C]: linear, ReLU, linear (ALBEF and BLIP's NLVR2, code), or ViLT's with `wide` features inside."""
    if wide:
        head = nn.Sequential(nn.Linear(width, wide), nn.LayerNorm(wide), nn.GELU(), nn.Linear(wide, classes))
    else:
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    init_truncated(head, init_std(width))
    return head


def head_logits(head: nn.Sequential, states: Tensor) -> Tensor:
    """fp32 logits [B, C] that `head` reads from states [B, D]; free of autocast."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    with full_precision(states):
        out: Tensor = head(states.to(first.weight.dtype)).float()
    return out
