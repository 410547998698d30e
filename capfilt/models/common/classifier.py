"""Classifiers of texts with pictures, or of pictures alone: their configuration, their heads.

Two heads are published: ALBEF's for entailment (arXiv 2107.07651, sec. 5 and code: linear, ReLU, linear), ViLT's for VQA
(arXiv 2102.03334, code: linear to twice the width, LayerNorm, GELU, linear). Not here: the models (a family's `tasks.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from capfilt.models.common.config import Classified, ModelConfig
from capfilt.models.common.layers import full_precision, init_std, init_truncated
from capfilt.models.common.vision import VisionConfig


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
