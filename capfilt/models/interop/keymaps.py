"""Which tensor has which name in which layout, and why some names have no place in a model.

Names only. Our names are the original repository's wherever a module exists in both, so its map is nearly the identity;
it is written out all the same, because a map that covers everything is what makes a leftover key an error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from capfilt.models.albef.model import AlbefConfig, alone
from capfilt.models.albef.tasks import AlbefClassifierConfig, AlbefNlvrConfig, AlbefVqaConfig, second_half
from capfilt.models.blip.model import BlipConfig
from capfilt.models.blip.tasks import NlvrConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.classifier import ClassifierConfig

Config = BlipConfig | VqaConfig | NlvrConfig | ClassifierConfig
AlbefShape = AlbefConfig | AlbefVqaConfig | AlbefClassifierConfig
"""Of an ALBEF, pretrained or finetuned."""

_TRANSFORMERS_TOWER = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embed.proj.bias": "embeddings.patch_embedding.bias",
    "norm.weight": "post_layernorm.weight",
    "norm.bias": "post_layernorm.bias",
}
_TRANSFORMERS_BLOCK = {
    "norm1": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_EMBEDDINGS = (
    "embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight",
    "embeddings.LayerNorm.weight",
    "embeddings.LayerNorm.bias",
)
_TEXT_ATTENTION = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
_TEXT_LAYER = (
    *(f"attention.{each}" for each in _TEXT_ATTENTION),
    *(f"crossattention.{each}" for each in _TEXT_ATTENTION),
    "intermediate.dense",
    "output.dense",
    "output.LayerNorm",
)
_TWIN_ATTENTION = (
    *(f"crossattention.{twin}.{each}" for twin in ("self0", "self1") for each in ("query", "key", "value")),
    *(f"crossattention.output.{each}" for each in ("dense0", "dense1", "LayerNorm")),
)
_TWIN_LAYER = (
    *(each for each in _TEXT_LAYER if not each.startswith("crossattention.")),
    *_TWIN_ATTENTION,
)
_MERGE = "crossattention.output.merge_layer"
_TRUTH_HEAD = ("cls_head.0.weight", "cls_head.0.bias", "cls_head.2.weight", "cls_head.2.bias")
_LM_HEAD = (
    "cls.predictions.bias",
    "cls.predictions.transform.dense.weight",
    "cls.predictions.transform.dense.bias",
    "cls.predictions.transform.LayerNorm.weight",
    "cls.predictions.transform.LayerNorm.bias",
)
_HEADS = tuple(
    f"{head}.{leaf}" for head in ("vision_proj", "text_proj", "itm_head") for leaf in ("weight", "bias")
)

TIED = {
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
    "text_encoder.cls.predictions.decoder.weight": "text_encoder.bert.embeddings.word_embeddings.weight",
    "text_encoder.cls.predictions.decoder.bias": "text_encoder.cls.predictions.bias",
}
"""Names (the same in both layouts; the last two are ALBEF's) of a second copy of another tensor; a model has the other one
alone."""

POSITION_IDS = (
    "text_encoder.embeddings.position_ids",
    "text_decoder.bert.embeddings.position_ids",
    "text_encoder.bert.embeddings.position_ids",
)
"""Buffers that count 0, 1, 2, ...; the original repository stores them, a model needs none."""


@dataclass(frozen=True)
class Leftover:
    """A kind of tensor that a checkpoint may hold and a model has no place for."""

    pattern: re.Pattern[str]
    reason: str


# BLIP and ALBEF, released code: what their classes register besides the model.
LEFTOVERS = (
    Leftover(
        re.compile(r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)_m\..+"),
        "momentum towers: training's moving average of the model",
    ),
    Leftover(re.compile(r"(image|text|idx)_queue"), "queue of past embeddings: training's contrast"),
    Leftover(re.compile(r"queue_ptr|ptr_queue"), "position in the queue"),
)


def reason(name: str) -> str | None:
    """Why a tensor of this name has no place in a model; None where there is no known reason."""
    return next((each.reason for each in LEFTOVERS if each.pattern.fullmatch(name)), None)


def blip_kind(config: Config) -> str:
    """ "both", "captioner", "filter", "vqa", "nlvr" or "classifier"."""
    if isinstance(config, BlipConfig):
        return config.half
    if isinstance(config, ClassifierConfig):
        return "classifier"
    return "vqa" if isinstance(config, VqaConfig) else "nlvr"


def original_names(config: Config | AlbefShape) -> dict[str, str]:
    """Our name of every tensor of the model, shared ones under each of their names -> the original repository's."""
    if isinstance(config, AlbefShape):
        return _albef_names(config)
    kind = blip_kind(config)
    names = [*_tower_names(config.vision.depth)]
    if kind == "nlvr":
        names += [*_twin_names(config.text.depth), *_TRUTH_HEAD]
        return {name: name for name in names}
    if kind != "captioner":
        names += _text_names("text_encoder.", config.text.depth)
    if kind != "filter":
        names += _text_names("text_decoder.bert.", config.text.depth)
        names += [f"text_decoder.{each}" for each in _LM_HEAD]
    if kind in ("both", "filter"):
        names += _HEADS
    mapped = {name: name for name in names}
    if kind in ("both", "filter"):
        mapped["temperature"] = "temp"
    return mapped


def transformers_names(config: Config) -> dict[str, str]:
    """Our name of every tensor that transformers' class of this kind has -> its name there; no kind "both" or "nlvr".

    The temperature is missing: transformers has no home for it.
    """
    names = {ours: ours for ours in original_names(config) if ours != "temperature"}
    for leaf, theirs in _TRANSFORMERS_TOWER.items():
        names[f"visual_encoder.{leaf}"] = f"vision_model.{theirs}"
    for index in range(config.vision.depth):
        for module, theirs in _TRANSFORMERS_BLOCK.items():
            for leaf in ("weight", "bias"):
                names[f"visual_encoder.blocks.{index}.{module}.{leaf}"] = (
                    f"vision_model.encoder.layers.{index}.{theirs}.{leaf}"
                )
    return names


def _albef_names(config: AlbefShape) -> dict[str, str]:
    """The layers of ALBEF's BERT that read text alone have no cross-attention. In pretraining the BERT is inside one with a
    language head; the class of each task has names of its own.
    """
    before, depth = alone(config.text), config.text.depth
    if isinstance(config, AlbefNlvrConfig):
        depth += second_half(config.text).depth
    unseeing = tuple(f"text_encoder.encoder.layer.{index}.cross" for index in range(before))
    text = [name for name in _text_names("text_encoder.", depth) if not name.startswith(unseeing)]
    names = {name: name for name in (*_tower_names(config.vision.depth), *text)}
    if isinstance(config, AlbefConfig):
        names |= {name: name for name in _HEADS} | {"temperature": "temp"}
        if config.words:
            names |= {name: name.replace("text_encoder.", "text_encoder.bert.", 1) for name in text}
            names |= {
                each.replace("cls.predictions.", "mlm_head."): f"text_encoder.{each}" for each in _LM_HEAD
            }
        return names
    rest = (
        [
            *_text_names("text_decoder.bert.", second_half(config.text).depth),
            *(f"text_decoder.{each}" for each in _LM_HEAD),
        ]
        if isinstance(config, AlbefVqaConfig)
        else _TRUTH_HEAD
    )
    return names | {name: name for name in rest}


def _tower_names(depth: int) -> list[str]:
    names = [f"visual_encoder.{leaf}" for leaf in _TRANSFORMERS_TOWER]
    return names + [
        f"visual_encoder.blocks.{index}.{module}.{leaf}"
        for index in range(depth)
        for module in _TRANSFORMERS_BLOCK
        for leaf in ("weight", "bias")
    ]


def _text_names(prefix: str, depth: int, layer: tuple[str, ...] = _TEXT_LAYER) -> list[str]:
    names = [prefix + each for each in _TEXT_EMBEDDINGS]
    return names + [
        f"{prefix}encoder.layer.{index}.{module}.{leaf}"
        for index in range(depth)
        for module in layer
        for leaf in ("weight", "bias")
    ]


def _twin_names(depth: int) -> list[str]:
    """The text encoder with two cross-attentions a layer; the second half of its layers has merging layers."""
    names = _text_names("text_encoder.", depth, _TWIN_LAYER)
    return names + [
        f"text_encoder.encoder.layer.{index}.{_MERGE}.{leaf}"
        for index in range(depth // 2, depth)
        for leaf in ("weight", "bias")
    ]
