"""BLIP for statements about two images (NLVR2): a text encoder that sees both, and a head that says true or false.

Every layer of the text encoder has two cross-attentions, one per image, which start from the same weights; their
outputs are averaged in the first half of the layers and merged by a linear layer in the second (BLIP, arXiv 2201.12086,
sec. 5.4, fig. 5b, and its released code).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from capfilt.models.blip import Blip, ModelConfig
from capfilt.models.classifier import classifier_head, fused_logits
from capfilt.models.layers import Pair, split_heads
from capfilt.models.text import CrossAttention, Projections, TextConfig, TextTransformer
from capfilt.models.vision import VisionConfig, VisionTower
from capfilt.models.weights import start_from
from capfilt.tables.contracts import LABELS


@dataclass(frozen=True)
class NlvrConfig(ModelConfig):
    """Everything that decides the shape of a BlipNlvr; `to_dict`/`from_dict` go through JSON unchanged."""

    vision: VisionConfig = field(default_factory=lambda: VisionConfig(image_size=384, drop_path=0.1))
    max_text_tokens: int = 512  # BLIP, code: no limit but the model's positions
    max_words: int = 40  # BLIP, code: longest sentence


class BlipNlvr(nn.Module):
    """See the module's docstring. Ids and masks are as in `Blip`; position 0 is overwritten here as there.

    Images come in one batch of 2B, all first ones before all second ones.
    """

    labels = LABELS["nlvr"]
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

    def encode_image(self, images: Tensor) -> Tensor:
        """Image tokens [2B, N, Dv] after the final LayerNorm, [CLS] first."""
        out: Tensor = self.visual_encoder(images)
        return out

    def truth_logits(self, ids: Tensor, mask: Tensor | None, image_tokens: Tensor) -> Tensor:
        """fp32 logits [B, 2], index 1 = true, of sentences ids int64 [B, L], mask bool [B, L], seen with their images.

        image_tokens: [2B, N, Dv], those of sentence i's first image at i, of its second at B + i.
        """
        return fused_logits(self.text_encoder, self.cls_head, ids, mask, image_tokens)

    def judge(self, ids: Tensor, mask: Tensor | None, images: Tensor) -> Tensor:
        """`truth_logits` of sentences ids int64 [B, L] seen with images [B, 2, 3, S, S]."""
        return self.truth_logits(ids, mask, self.encode_image(images.transpose(0, 1).flatten(0, 1)))

    def recompute_activations(self, on: bool = True) -> None:
        """As `Blip.recompute_activations`."""
        self.visual_encoder.recompute = self.text_encoder.recompute = on


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


def build_nlvr(config: NlvrConfig, seed: int = 0) -> BlipNlvr:
    """A freshly initialised BlipNlvr: the same config and seed give the same weights, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BlipNlvr(config)


def nlvr_from_blip(model: Blip, seed: int = 0, drop_path: float = 0.1) -> BlipNlvr:
    """A BlipNlvr that starts from a pretrained BLIP or a filter; the head and the merging layers are new.

    Both cross-attentions of a layer start from the one there is. drop_path 0.1: BLIP, code, for this finetuning.
    """
    model.require("filter")
    vision = dataclasses.replace(model.config.vision, drop_path=drop_path)
    made = build_nlvr(NlvrConfig(vision, model.config.text), seed)
    found = model.state_dict()
    names = {name: _TWIN.sub(r"\1\2", name) for name in made.state_dict()}
    start_from(
        made,
        {name: found[once] for name, once in names.items() if once in found},
        new=lambda name: name.startswith("cls_head.") or ".merge_layer." in name,
    )
    return made


_TWIN = re.compile(r"(\.crossattention\.(?:output\.)?)(self|dense)[01](?=\.)")
