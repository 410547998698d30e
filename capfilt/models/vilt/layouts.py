"""ViLT's layout: transformers' directories of the bare model, masked words, retrieval, questions and pairs of pictures.

A model with both heads opens as transformers' ViltForMaskedLM and as its ViltForImageAndTextRetrieval; the row of the ITM head
that neither has stays beside them, under the released code's name. Written against transformers 5.23, which is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.tokenizer import ADDED, Tokenizer
from capfilt.errors import UserError
from capfilt.models.common.layouts import vocabulary
from capfilt.models.common.layouts.engine import (
    CONFIG,
    ConfigTable,
    Found,
    Layout,
    Vocabulary,
    geometry,
    pixels,
    refuse_trunk,
)
from capfilt.models.common.layouts.names import TYPED, VIT_BLOCK, Change, Rows, longer, under
from capfilt.models.vilt.model import EPS, Vilt, ViltConfig
from capfilt.models.vilt.tasks import ViltClassifier, ViltClassifierConfig
from capfilt.tables.contracts import LABELS

BARE, MASKED, RETRIEVAL = "ViltModel", "ViltForMaskedLM", "ViltForImageAndTextRetrieval"
QUESTIONS, PAIRS = "ViltForQuestionAnswering", "ViltForImagesAndTextClassification"
HAS = {"both": MASKED, "words": MASKED, "match": RETRIEVAL, "none": BARE}
NEVER = -100.0
"""Bias of [DEC] and [ENC] in a head of masked words that does not know them: they are never named."""

# What theirs means where it is left out: transformers' class defaults. [DEC] and [ENC], which no ViLT reads, stay here.
TABLE = ConfigTable(
    "ViLT",
    {
        BARE: (ViltConfig, {"has": "none"}),
        MASKED: (ViltConfig, {"has": "words"}),
        RETRIEVAL: (ViltConfig, {"has": "match"}),
        QUESTIONS: (ViltClassifierConfig, {"pictures": 1}),
        PAIRS: (ViltClassifierConfig, {}),
    },
    (
        ("vision.image_size", "image_size", 384), ("vision.patch_size", "patch_size", 32),
        ("text.vocab_size", "vocab_size", 30522), ("text.max_positions", "max_position_embeddings", 40),
        ("text.pad_id", "pad_token_id", 0), *geometry("", "", 768, 12, 12, 3072), ("dropout", "hidden_dropout_prob", 0.0),
        ("tied", "tie_word_embeddings", True), ("pictures", "num_images", -1),
    ),
    {
        "hidden_act": ("gelu",), "attention_probs_dropout_prob": (0.0,), "layer_norm_eps": (EPS,), "num_channels": (3,),
        "qkv_bias": (True,),
    },
)  # fmt: skip


def _config(config: ViltConfig) -> dict[str, Any]:
    said = {
        **TABLE.write(config), "architectures": [_class_of(config)], "model_type": "vilt", "dtype": "float32",
        "vocab_size": config.vocab_size - len(ADDED), "type_vocab_size": 2, "modality_type_vocab_size": 2,
    }  # fmt: skip
    if isinstance(config, ViltClassifierConfig):
        said["modality_type_vocab_size"] = 1 + config.pictures
        said["num_images"] = config.pictures if config.pictures > 1 else -1
        said["id2label"] = {str(index): name for index, name in enumerate(config.classes)}
        said["label2id"] = {name: index for index, name in enumerate(config.classes)}
    return said


def _class_of(config: ViltConfig) -> str:
    if isinstance(config, ViltClassifierConfig):
        return QUESTIONS if config.pictures == 1 else PAIRS
    return HAS[config.has]


def _from_config(
    path: Path, content: dict[str, Any], found: Mapping[str, Tensor] | None, settings: dict[str, Any]
) -> Found:
    """Without the tensors, `has` is what the class has, and `tied` is transformers' default."""
    name, kind, values = TABLE.read(path, content)
    pictures = values.get("pictures", 1)
    types = 2 if content.get("modality_type_vocab_size") is None else content["modality_type_vocab_size"]
    if types != 1 + pictures:
        raise UserError(
            f"{path}: capfilt's ViLT has no modality_type_vocab_size {types!r} for {pictures} pictures"
        )
    values["text.vocab_size"] += len(ADDED)
    values["tied"] = values["tied"] is True
    if kind is ViltClassifierConfig:
        labels = content.get("id2label") or {}
        classes = [str(labels.get(str(index), f"LABEL_{index}")) for index in range(max(2, len(labels)))]
        if name == PAIRS and [each.lower() for each in classes] == list(LABELS["nlvr"]):
            classes = list(LABELS["nlvr"])
        return kind, {**values, "task": "vqa" if name == QUESTIONS else "nlvr", "classes": classes}
    if found is not None:
        words = values["has"] == "words" or "mlm_score.transform.dense.weight" in found
        match = values["has"] == "match" or "rank_output.weight" in found
        values["has"] = {(1, 1): "both", (1, 0): "words", (0, 1): "match"}.get((words, match), "none")
        own, shared = (found.get(each) for each in ("mlm_score.decoder.weight", f"{_base(name)}{_WORDS}"))
        if words and shared is not None:
            values["tied"] = own is None or (values["tied"] and torch.equal(own, shared))
    return kind, values


def _base(name: str) -> str:
    return "" if name == BARE else "vilt."


_WORDS = "embeddings.text_embeddings.word_embeddings.weight"


def _ranked(found: Mapping[str, Tensor], wanted: Tensor) -> Tensor:
    """One number that ranks is the match row over a row of zeros: as a logit and as a probability."""
    (name, rank), *whole = found.items()
    made = whole[0][1] if whole else torch.cat([torch.zeros_like(rank), rank])
    if not torch.equal(made[1:], rank):
        raise ValueError(f"{name} is not the match row of {whole[0][0]}, as it is")
    return made


def _names(config: ViltConfig) -> Rows:
    base, texts = _base(_class_of(config)), "embeddings.text_embeddings"
    unread = longer(len(ADDED), 0.0)
    # Of tied words a file may have a copy.
    copied = ",mlm_score.decoder.weight?" if config.tied and config.has in ("both", "words") else ""
    return (
        ("visual_encoder.cls_token", f"{base}embeddings.cls_token"),
        ("visual_encoder.pos_embed", f"{base}embeddings.position_embeddings"),
        ("visual_encoder.patch_embed.*", f"{base}embeddings.patch_embeddings.projection.*"),
        ("modality", f"{base}embeddings.token_type_embeddings.weight"),
        ("text_embeddings.word_embeddings.weight", f"{{{base}{_WORDS}{copied}}}", unread),
        (
            "text_embeddings.position_embeddings.weight",
            f"{base}{texts}.{{position_embeddings.weight,token_type_embeddings.weight,position_ids?}}",
            TYPED,
        ),
        ("text_embeddings.LayerNorm.*", f"{base}{texts}.LayerNorm.*"),
        *under("blocks", f"{base}encoder.layer", VIT_BLOCK),
        ("norm.*", f"{base}layernorm.*"),
        ("pooler.*", f"{base}pooler.dense.*"),
        # Older files have the bias under another name, or under both.
        ("mlm_head.bias", "mlm_score.{decoder.bias+,bias?}", longer(len(ADDED), NEVER)),
        ("mlm_head.**", "mlm_score.**"),
        ("mlm_words", "mlm_score.decoder.weight", unread),
        # The released code's name: transformers has no class for the head of ITM, only for the row of it that ranks.
        (
            "itm_head.*",
            "{rank_output,itm_score.fc+}.*",
            Change(_ranked, lambda tensor, count: [tensor[1:], tensor]),
        ),
        ("cls_head.**", "classifier.**"),
    )  # fmt: skip


def _files(config: ViltConfig, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    return {
        CONFIG: _config(config),
        # Released code: the shorter side made 384, the longer at most 640; capfilt itself shows a model squares.
        "preprocessor_config.json": {
            **pixels((0.5,) * 3, (0.5,) * 3), "image_processor_type": "ViltImageProcessor", "do_pad": True,
            "size": {"shortest_edge": config.image_size}, "size_divisor": config.vision.patch_size,
        },
        "tokenizer_config.json": {**vocabulary.BERT_TOKENIZER, "model_max_length": config.text.max_positions},
    }  # fmt: skip


TRANSFORMERS = Layout(
    "transformers", "ViLT", {ViltConfig: Vilt, ViltClassifierConfig: ViltClassifier}, _names, _from_config, _files,
    Vocabulary(vocabulary.find, vocabulary.read, vocabulary.write), ("task", "max_text_tokens", "max_words"),
    lambda config, tokenizer: refuse_trunk(config, "transformers"), model_type="vilt",
)  # fmt: skip

LAYOUTS = (TRANSFORMERS,)
