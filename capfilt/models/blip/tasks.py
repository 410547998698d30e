"""BLIP finetuned: answers to questions, classes of a picture with a text, statements about two pictures.

VQA: a question encoder that sees the image, and a decoder that sees the question; they share nothing (arXiv 2201.12086,
sec. 5.3, fig. 5a). NLVR2: every layer of the text encoder has two cross-attentions, one per image, which start from the same
weights; their outputs are averaged in the first half of the layers and merged by a linear layer in the second (sec. 5.4,
fig. 5b, and code). The released BLIP has no classifier: here its text encoder is fed [ENC] and sees the picture, as for
matching, and the head is that of the models that publish one (`common/classifier.py`).
Not here: what is trained against what (`common/task_objectives.py`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capfilt.errors import UserError
from capfilt.models.blip.model import Blip, starting
from capfilt.models.common.answering import Answering, VqaConfig, new_reading
from capfilt.models.common.classifier import (
    Classifier,
    ClassifierConfig,
    classifier_head,
    head_logits,
    is_head,
)
from capfilt.models.common.config import ModelConfig
from capfilt.models.common.layers import Pair, seeded, split_heads
from capfilt.models.common.text import (
    CrossAttention,
    Projections,
    TextConfig,
    TextDecoder,
    TextTransformer,
)
from capfilt.models.common.vision import Towered, VisionConfig, VisionTower
from capfilt.models.common.weights import start_from
from capfilt.tables.contracts import LABELS


class BlipVqa(Answering):
    """See the module's docstring. Position 0 is overwritten here as in `Blip`."""

    def __init__(self, config: VqaConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = TextTransformer(config.text, config.vision.width)
        # The decoder reads text states, so its keys and values come from the text width whatever the vision tower's is.
        self.text_decoder = TextDecoder(config.text, config.text.width)

    def asked(self, ids: Tensor) -> Tensor:
        return starting(ids, self.config.text.enc_id)

    def begun(self, ids: Tensor) -> Tensor:
        return starting(ids, self.config.text.dec_id)


def vqa_from_blip(model: Blip, seed: int = 0, drop_path: float = 0.1) -> BlipVqa:
    """A BlipVqa that starts from a pretrained BLIP: encoder and decoder become copies, what they shared included.

    Where the vision tower's width is not the text's, the decoder's cross-attention keys and values are new: it read
    image tokens and will read the question's (BLIP, code). drop_path 0.1: BLIP, code, for this finetuning.
    """
    model.require("filter")
    model.require("captioner")
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    made = seeded(BlipVqa, VqaConfig(vision, model.config.text), seed)

    new = new_reading(made.config)
    found = model.state_dict()
    names = [name for name in made.state_dict() if name in found and not new(name)]
    start_from(made, {name: found[name] for name in names}, new)
    return made


class BlipClassifier(Classifier):
    """See the module's docstring. Images, ids and masks are as in `Blip`; position 0 is overwritten here as there."""

    def reader(self) -> TextTransformer:
        return TextTransformer(self.config.text, self.config.vision.width)

    def read_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        assert self.text_encoder is not None
        return fused_logits(self.text_encoder, self.cls_head, ids, mask, image_tokens)


def fused_logits(
    encoder: TextTransformer, head: nn.Sequential, ids: Tensor, mask: Tensor | None, image_tokens: Tensor
) -> Tensor:
    """fp32 logits [B, C] that `head` reads from position 0, made [ENC], of texts seen with their image tokens."""
    cross = encoder.cross_keys_values(image_tokens)
    return head_logits(head, encoder(starting(ids, encoder.config.enc_id), mask, cross, first=True)[:, 0])


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
    made = seeded(
        BlipClassifier, ClassifierConfig(vision, model.config.text, task=task, classes=tuple(classes)), seed
    )
    found = model.state_dict()
    names = [name for name in made.state_dict() if name in found and not is_head(name)]
    start_from(made, {name: found[name] for name in names}, is_head)
    return made


@dataclass(frozen=True)
class NlvrConfig(ModelConfig):
    """Everything that decides the shape of a BlipNlvr; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=384, drop_path=0.1))
    max_text_tokens: int = 512  # BLIP, code: no limit but the model's positions
    max_words: int = 40  # BLIP, code: longest sentence


class BlipNlvr(Towered):
    """See the module's docstring. Ids and masks are as in `Blip`; position 0 is overwritten here as there.

    Images come in one batch of 2B, all first ones before all second ones.
    """

    labels = LABELS["nlvr"]
    abilities = ("features", "judge")
    pictures = 2

    def __init__(self, config: NlvrConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = VisionTower(config.vision)
        self.text_encoder = TextTransformer(
            config.text,
            config.vision.width,
            # BLIP, code: from layer 6 of 12.
            crossattention=lambda index: TwinAttention(
                config.text, config.vision.width, merge=index >= config.text.depth // 2
            ),
        )
        self.cls_head = classifier_head(config.text.width, 2)

    def truth_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """fp32 logits [B, 2], index 1 = true, of sentences ids int64 [B, L], mask bool [B, L], seen with their images.

        image_tokens: [2B, N, Dv], those of sentence i's first image at i, of its second at B + i.
        """
        return fused_logits(self.text_encoder, self.cls_head, ids, mask, image_tokens)

    def judge(self, ids: Tensor, mask: Tensor | None, images: Tensor) -> Tensor:
        """`truth_logits` of sentences ids int64 [B, L] seen with images [B, 2, 3, S, S]."""
        return self.truth_logits(ids, mask, self.encode_image(images.transpose(0, 1).flatten(0, 1)))


class TwinAttention(CrossAttention):
    """Cross-attention to two images, each with projections of its own; one block end for both."""

    def __init__(self, config: TextConfig, image_width: int, merge: bool) -> None:
        super().__init__(config)
        self.self0 = Projections(config.width, image_width)
        self.self1 = Projections(config.width, image_width)
        self.output = TwinNorm(config, merge)

    def keys_values(self, source: Tensor) -> Pair:
        """Keys and values of both images' tokens [2B, N, S], each [2B, H, N, d]: every image under its own projections."""
        sides = list(zip((self.self0, self.self1), source.chunk(2), strict=True))
        keys = torch.cat([side.key(tokens) for side, tokens in sides])
        values = torch.cat([side.value(tokens) for side, tokens in sides])
        return split_heads(keys, self.heads), split_heads(values, self.heads)

    def forward(self, x: Tensor, source: Pair, mask: Tensor | None) -> Tensor:
        """New states [B, L, D] of x [B, L, D]; source: `keys_values`. Every token of both images is attended to."""
        keys, values = (each.chunk(2) for each in source)
        seen0 = self.attend(self.self0.query(x), (keys[0], values[0]), mask)
        seen1 = self.attend(self.self1.query(x), (keys[1], values[1]), mask)
        out: Tensor = self.output(seen0, seen1, x)
        return out


class TwinNorm(nn.Module):
    """dense0, dense1 -> their mean, or a linear layer of both -> dropout -> LayerNorm(x + residual), eps 1e-12."""

    def __init__(self, config: TextConfig, merge: bool) -> None:
        super().__init__()
        self.dense0 = nn.Linear(config.width, config.width)
        self.dense1 = nn.Linear(config.width, config.width)
        self.merge_layer = nn.Linear(2 * config.width, config.width) if merge else None
        self.LayerNorm = nn.LayerNorm(config.width, eps=1e-12)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, seen0: Tensor, seen1: Tensor, residual: Tensor) -> Tensor:
        seen0, seen1 = self.dense0(seen0), self.dense1(seen1)
        if self.merge_layer is None:
            x = (seen0 + seen1) / 2
        else:
            x = self.merge_layer(torch.cat([seen0, seen1], dim=-1))  # no activation (BLIP, code)
        out: Tensor = self.LayerNorm(self.dropout(x) + residual)
        return out


def nlvr_from_blip(model: Blip, seed: int = 0, drop_path: float = 0.1) -> BlipNlvr:
    """A BlipNlvr that starts from a pretrained BLIP or a filter; the head and the merging layers are new.

    Both cross-attentions of a layer start from the one there is. drop_path 0.1: BLIP, code, for this finetuning.
    """
    model.require("filter")
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    made = seeded(BlipNlvr, NlvrConfig(vision, model.config.text), seed)
    found = model.state_dict()
    names = {name: _TWIN.sub(r"\1\2", name) for name in made.state_dict()}
    start_from(
        made,
        {name: found[once] for name, once in names.items() if once in found},
        new=lambda name: is_head(name) or ".merge_layer." in name,
    )
    return made


_TWIN = re.compile(r"(\.crossattention\.(?:output\.)?)(self|dense)[01](?=\.)")
