"""BLIP as a classifier of a picture and a text together: closed-set VQA, visual entailment, statements about one picture. And
of a picture alone, where its classes have no text: then it is the vision tower with a head on [CLS] (ViT, arXiv 2010.11929).

The released BLIP has no such model. Its text encoder is fed [ENC] and sees the picture, as for matching; on the state
of [ENC] is the head of the models that publish one: ALBEF's for entailment (arXiv 2107.07651, sec. 5 and code: linear,
ReLU, linear), ViLT's for VQA (arXiv 2102.03334, code: linear to twice the width, LayerNorm, GELU, linear).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.blip import Blip, ModelConfig
from capfilt.models.config import Classified
from capfilt.models.layers import full_precision, init_std, init_truncated
from capfilt.models.text import TextTransformer
from capfilt.models.vision import VisionConfig, VisionTower
from capfilt.models.weights import start_from


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


class BlipClassifier(nn.Module):
    """See the module's docstring. Images, ids and masks are as in `Blip`; position 0 is overwritten here as there."""

    pictures = 1

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = (
            None if config.pictures_alone else TextTransformer(config.text, config.vision.width)
        )
        self.cls_head = head_for(config)

    def encode_image(self, images: Tensor) -> Tensor:
        """Image tokens [B, N, Dv] after the final LayerNorm, [CLS] first."""
        out: Tensor = self.visual_encoder(images)
        return out

    def class_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """fp32 logits [B, C] of texts ids int64 [B, L], mask bool [B, L], seen with image tokens [B, N, Dv].

        A classifier of pictures alone reads no text.
        """
        if self.text_encoder is None:
            return head_logits(self.cls_head, image_tokens[:, 0])
        return fused_logits(self.text_encoder, self.cls_head, ids, mask, image_tokens)

    @property
    def labels(self) -> tuple[str, ...]:
        """What it was trained to tell apart: the task's labels, or answers as most people spell them."""
        return self.config.classes

    def judge(self, ids: Tensor, mask: Tensor | None, images: Tensor) -> Tensor:
        """`class_logits` of texts ids int64 [B, L] seen with images [B, 1, 3, S, S]."""
        return self.class_logits(ids, mask, self.encode_image(images[:, 0]))

    def recompute_activations(self, on: bool = True) -> None:
        """As `Blip.recompute_activations`."""
        self.visual_encoder.recompute = on
        if self.text_encoder is not None:
            self.text_encoder.recompute = on


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


def fused_logits(
    encoder: TextTransformer, head: nn.Sequential, ids: Tensor, mask: Tensor | None, image_tokens: Tensor
) -> Tensor:
    """fp32 logits [B, C] that `head` reads from position 0, made [ENC], of texts seen with their image tokens."""
    ids = ids.clone()
    ids[:, 0] = encoder.config.enc_id
    return head_logits(head, encoder(ids, mask, encoder.cross_keys_values(image_tokens), first=True)[:, 0])


def head_logits(head: nn.Sequential, states: Tensor) -> Tensor:
    """fp32 logits [B, C] that `head` reads from states [B, D]; free of autocast."""
    first = head[0]
    assert isinstance(first, nn.Linear)
    with full_precision(states):
        out: Tensor = head(states.to(first.weight.dtype)).float()
    return out


def build_classifier(config: ClassifierConfig, seed: int = 0) -> BlipClassifier:
    """A freshly initialised BlipClassifier: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BlipClassifier(config)


def classifier_from_blip(
    model: Blip | BlipClassifier,
    task: str,
    classes: Sequence[str],
    seed: int = 0,
    drop_path: float = 0.1,
) -> BlipClassifier:
    """A BlipClassifier that starts from a pretrained BLIP, a filter, or a classifier of other classes; its head is new.

    drop_path 0.1: BLIP, code, for its two other finetunings.
    """
    if isinstance(model, Blip) and task != "classification":
        model.require("filter")
    if getattr(model, "text_encoder", None) is None and task != "classification":
        raise UserError("a classifier of pictures alone reads no text: start from a pretrained model")
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    made = build_classifier(
        ClassifierConfig(vision, model.config.text, task=task, classes=tuple(classes)), seed
    )
    found = model.state_dict()
    names = [name for name in made.state_dict() if name in found and not _is_head(name)]
    start_from(made, {name: found[name] for name in names}, _is_head)
    return made


def _is_head(name: str) -> bool:
    return name.startswith("cls_head.")
