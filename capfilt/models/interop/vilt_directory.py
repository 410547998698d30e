"""transformers' ViLT directories, read and written: the bare model, masked words, retrieval, questions, pairs of pictures.

Every key has its place or is an error that lists it. Written against transformers 5.23; nothing of it is imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.tokenizer import ADDED, CLS, MASK, PAD, SEP, UNK
from capfilt.errors import UserError
from capfilt.models.common.config import Shape
from capfilt.models.common.weights import listed, read_json, write_safetensors
from capfilt.models.interop import vocabulary
from capfilt.models.interop.contents import (
    SETTINGS,
    Contents,
    architecture,
    assemble,
    read_settings,
    refuse_trunk,
    remember,
    settings_of,
    with_settings,
    write_beside,
)
from capfilt.models.interop.transformers_layout import read_weights, weights_files
from capfilt.models.vilt.model import EPS, Vilt, ViltConfig
from capfilt.models.vilt.tasks import ViltClassifier, ViltClassifierConfig
from capfilt.tables.contracts import LABELS

CONFIG, WEIGHTS = "config.json", "model.safetensors"
BARE, MASKED, RETRIEVAL = "ViltModel", "ViltForMaskedLM", "ViltForImageAndTextRetrieval"
QUESTIONS, PAIRS = "ViltForQuestionAnswering", "ViltForImagesAndTextClassification"
CLASSES = (BARE, MASKED, RETRIEVAL, QUESTIONS, PAIRS)
NO_HOME = ("task", "max_text_tokens", "max_words")

# What a key means that a config.json leaves out: transformers' class defaults.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522, "type_vocab_size": 2, "modality_type_vocab_size": 2, "max_position_embeddings": 40,
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "hidden_act": "gelu", "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "layer_norm_eps": 1e-12,
    "image_size": 384, "patch_size": 32, "num_channels": 3, "qkv_bias": True, "num_images": -1, "pad_token_id": 0,
}  # fmt: skip
_FIXED = {
    "hidden_act": "gelu", "attention_probs_dropout_prob": 0.0, "layer_norm_eps": EPS, "num_channels": 3, "qkv_bias": True,
}  # fmt: skip
_EMBEDDINGS = {
    "visual_encoder.cls_token": "embeddings.cls_token",
    "visual_encoder.pos_embed": "embeddings.position_embeddings",
    "visual_encoder.patch_embed.weight": "embeddings.patch_embeddings.projection.weight",
    "visual_encoder.patch_embed.bias": "embeddings.patch_embeddings.projection.bias",
    "modality": "embeddings.token_type_embeddings.weight",
    "text_embeddings.word_embeddings.weight": "embeddings.text_embeddings.word_embeddings.weight",
    "text_embeddings.position_embeddings.weight": "embeddings.text_embeddings.position_embeddings.weight",
    "text_embeddings.LayerNorm.weight": "embeddings.text_embeddings.LayerNorm.weight",
    "text_embeddings.LayerNorm.bias": "embeddings.text_embeddings.LayerNorm.bias",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_WORDS = {
    "mlm_head.transform.dense.weight": "mlm_score.transform.dense.weight",
    "mlm_head.transform.dense.bias": "mlm_score.transform.dense.bias",
    "mlm_head.transform.LayerNorm.weight": "mlm_score.transform.LayerNorm.weight",
    "mlm_head.transform.LayerNorm.bias": "mlm_score.transform.LayerNorm.bias",
    "mlm_head.bias": "mlm_score.decoder.bias",
    "mlm_words": "mlm_score.decoder.weight",
}
_MATCH = {"itm_head.weight": "itm_score.fc.weight", "itm_head.bias": "itm_score.fc.bias"}
"""The released code's names: transformers has no class for the head of ITM, only for the one of its two rows that ranks."""
_RANK = {"itm_head.weight": "rank_output.weight", "itm_head.bias": "rank_output.bias"}
_TOKEN_TYPES = "embeddings.text_embeddings.token_type_embeddings.weight"
_POSITION_IDS = "embeddings.text_embeddings.position_ids"
_VOCABULARY = ("text_embeddings.word_embeddings.weight", "mlm_words", "mlm_head.bias")
_NEVER = -100.0
"""Bias of [DEC] and [ENC] in a head of masked words that does not know them: they are never named."""


def files(directory: Path) -> list[Path]:
    """Every file that `read` reads."""
    found = [directory / CONFIG, *weights_files(directory), vocabulary.find(directory)]
    return [*found, directory / SETTINGS] if (directory / SETTINGS).is_file() else found


def read_config(directory: Path) -> tuple[Shape, dict[str, Any]]:
    """(our config, `extra`), no weights read: `has` is what the class has, `tied` transformers' default.

    UserError names the field that no ViLT of ours has.
    """
    path = directory / CONFIG
    settings, extra = read_settings(directory)
    config = with_settings(directory / SETTINGS, _config(path, read_json(path)), NO_HOME, settings)
    return config, extra


def read(directory: Path, image_size: int = 0) -> Contents:
    """The checkpoint; `image_size` other than 0 interpolates the positions once and for all. UserError names file or key."""
    config, extra = read_config(directory)
    assert isinstance(config, ViltConfig)
    path = weights_files(directory)[0]
    config, state = _taken(path, config, read_weights(directory))
    model = assemble(path, config, state)
    assert isinstance(model, Vilt | ViltClassifier)
    if image_size and image_size != config.image_size:
        model.resize_image(image_size)
    return Contents(model, vocabulary.read(directory, config.vocab_size), extra)


def refuse(config: Shape, tokenizer: Any = None) -> None:
    """NoHome naming what transformers' ViLT has no place for; else nothing."""
    refuse_trunk(config, "transformers")


def write(directory: Path, contents: Contents) -> None:
    """Writes the checkpoint into an empty directory.

    One with both heads opens as transformers' ViltForMaskedLM and as its ViltForImageAndTextRetrieval; the row of the ITM
    head that neither has stays beside them, under the released code's name.
    """
    model, tokenizer = contents.model, contents.tokenizer
    assert isinstance(model, Vilt | ViltClassifier)
    refuse(model.config)
    config = config_json(model.config)
    write_safetensors(directory / WEIGHTS, _given(model))
    vocabulary.write_vocabulary(directory, tokenizer)
    said = {
        "tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": PAD, "unk_token": UNK, "cls_token": CLS,
        "sep_token": SEP, "mask_token": MASK, "model_max_length": model.config.text.max_positions,
    }  # fmt: skip
    # Released code: the shorter side made 384, the longer at most 640; capfilt itself shows a model squares.
    processor = {
        "image_processor_type": "ViltImageProcessor", "do_resize": True, "size": {"shortest_edge": model.config.image_size},
        "size_divisor": model.config.vision.patch_size, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pad": True,
    }  # fmt: skip
    for name, content in (
        ("preprocessor_config.json", processor),
        ("tokenizer_config.json", said),
        (CONFIG, config),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    said_of_texts = remember(model, contents.tokenizer)
    write_beside(
        directory, settings_of(model.config, NO_HOME), contents.extra, contents.leftovers, said_of_texts
    )


def config_json(config: ViltConfig) -> dict[str, Any]:
    """What transformers calls our config; [DEC] and [ENC], which no ViLT reads, stay here."""
    said: dict[str, Any] = {
        **_DEFAULTS, "architectures": [_class_of(config)], "model_type": "vilt", "dtype": "float32",
        "vocab_size": config.vocab_size - len(ADDED), "max_position_embeddings": config.text.max_positions,
        "hidden_size": config.width, "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
        "intermediate_size": config.hidden, "hidden_dropout_prob": config.dropout, "image_size": config.image_size,
        "patch_size": config.vision.patch_size, "pad_token_id": config.text.pad_id, "tie_word_embeddings": config.tied,
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
    return {"both": MASKED, "words": MASKED, "match": RETRIEVAL, "none": BARE}[config.has]


def _config(path: Path, content: Mapping[str, Any]) -> ViltConfig:
    kind = architecture(path, content, CLASSES)
    said = {**_DEFAULTS, **{name: value for name, value in content.items() if value is not None}}
    wrong = [f"{name} {said[name]!r} (only {only!r})" for name, only in _FIXED.items() if said[name] != only]
    pictures = said["num_images"] if kind == PAIRS else 1
    if said["modality_type_vocab_size"] != 1 + pictures:
        wrong.append(f"modality_type_vocab_size {said['modality_type_vocab_size']!r} for {pictures} pictures")
    if wrong:
        raise UserError(f"{path}: capfilt's ViLT has no {listed(wrong)}")
    values: dict[str, Any] = {
        "vision": {"image_size": said["image_size"], "patch_size": said["patch_size"]},
        "text": {
            "vocab_size": said["vocab_size"] + len(ADDED),
            "max_positions": said["max_position_embeddings"],
            "pad_id": said["pad_token_id"],
        },
        "width": said["hidden_size"],
        "depth": said["num_hidden_layers"],
        "heads": said["num_attention_heads"],
        "hidden": said["intermediate_size"],
        "dropout": said["hidden_dropout_prob"],
        "tied": said.get("tie_word_embeddings", True) is True,
    }
    try:
        if kind not in (QUESTIONS, PAIRS):
            has = {MASKED: "words", RETRIEVAL: "match", BARE: "none"}[kind]
            return ViltConfig.from_dict({**values, "has": has})
        labels = said.get("id2label") or {}
        classes = [str(labels.get(str(index), f"LABEL_{index}")) for index in range(max(2, len(labels)))]
        if kind == PAIRS and [each.lower() for each in classes] == list(LABELS["nlvr"]):
            classes = list(LABELS["nlvr"])
        own = {"task": "vqa" if kind == QUESTIONS else "nlvr", "classes": classes, "pictures": pictures}
        return ViltClassifierConfig.from_dict({**values, **own})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _names(config: ViltConfig) -> dict[str, str]:
    """Our name of every tensor but fused ones and heads -> transformers', without its prefix."""
    names = {**_EMBEDDINGS, **{f"norm.{leaf}": f"layernorm.{leaf}" for leaf in ("weight", "bias")}}
    names |= {f"pooler.{leaf}": f"pooler.dense.{leaf}" for leaf in ("weight", "bias")}
    return names | {
        f"blocks.{index}.{ours}.{leaf}": f"encoder.layer.{index}.{theirs}.{leaf}"
        for index in range(config.depth)
        for ours, theirs in _BLOCK.items()
        for leaf in ("weight", "bias")
    }


def _fused(config: ViltConfig) -> dict[str, tuple[str, ...]]:
    """Our name of every projection of three in one -> the names of its three."""
    return {
        f"blocks.{index}.attn.qkv.{leaf}": tuple(
            f"encoder.layer.{index}.attention.attention.{each}.{leaf}" for each in _QKV
        )
        for index in range(config.depth)
        for leaf in ("weight", "bias")
    }


def _taken(
    path: Path, config: ViltConfig, found: Mapping[str, Tensor]
) -> tuple[ViltConfig, dict[str, Tensor]]:
    """(config with the heads that are really there, tensors under our names)."""
    bare = _class_of(config) == BARE and not isinstance(config, ViltClassifierConfig)
    prefix = "" if bare else "vilt."
    rest = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
    lost: list[str] = []

    def give(name: str) -> Tensor:
        if name not in rest:
            lost.append(name)
            return torch.empty(0)
        return rest.pop(name)

    state = {ours: give(prefix + theirs) for ours, theirs in _names(config).items()}
    for ours, theirs in _fused(config).items():
        state[ours] = torch.cat([give(prefix + each) for each in theirs])
    # Every token of a text is of its first type, so that row is part of its position.
    types = give(prefix + _TOKEN_TYPES)
    if not lost:
        state["text_embeddings.position_embeddings.weight"] += types[0]
    counted = rest.pop(prefix + _POSITION_IDS, torch.arange(0))
    if not torch.equal(counted.flatten(), torch.arange(counted.numel())):
        raise UserError(f"{path}: {_POSITION_IDS} does not count 0, 1, 2, ...")
    if isinstance(config, ViltClassifierConfig):
        for leaf in ("weight", "bias"):
            state |= {f"cls_head.{part}.{leaf}": give(f"classifier.{part}.{leaf}") for part in (0, 1, 3)}
    else:
        config = _heads(path, config, rest, state, give)
    if lost:
        raise UserError(f"{path}: {len(lost)} tensors missing: {listed(sorted(lost))}; the file is not whole")
    if rest:
        raise UserError(
            f"{path}: {len(rest)} tensors that no ViLT of this kind has: {listed(sorted(rest))}; "
            "remove them from the file if they are not needed"
        )
    for ours in set(_VOCABULARY) & set(state):
        added = state[ours].new_full(
            (len(ADDED), *state[ours].shape[1:]), _NEVER if ours == "mlm_head.bias" else 0.0
        )
        state[ours] = torch.cat([state[ours], added])
    return config, state


def _heads(
    path: Path, config: ViltConfig, rest: dict[str, Tensor], state: dict[str, Tensor], give: Any
) -> ViltConfig:
    """Moves the heads from `rest` to `state`; the config that says which there are."""
    words = config.has == "words" or "mlm_score.transform.dense.weight" in rest
    match = config.has == "match" or "rank_output.weight" in rest
    if words:
        # Older files have the bias under another name, or under both.
        older = rest.pop("mlm_score.bias", None)
        if older is not None and not torch.equal(rest.setdefault("mlm_score.decoder.bias", older), older):
            raise UserError(f"{path}: mlm_score.bias and mlm_score.decoder.bias, which are one, differ")
        own = rest.get("mlm_score.decoder.weight")
        shared = state["text_embeddings.word_embeddings.weight"]
        tied = own is None or (config.tied and torch.equal(own, shared))
        state |= {ours: give(theirs) for ours, theirs in _WORDS.items() if not (tied and ours == "mlm_words")}
        rest.pop("mlm_score.decoder.weight", None)
        config = replace(config, tied=tied)
    if match:
        rank = {ours: give(theirs) for ours, theirs in _RANK.items()}
        for ours, theirs in _MATCH.items():
            # One number that ranks is the match row over a row of zeros: as a logit and as a probability.
            whole = rest.pop(theirs, torch.cat([torch.zeros_like(rank[ours]), rank[ours]]))
            if not torch.equal(whole[1:], rank[ours]):
                raise UserError(f"{path}: {_RANK[ours]} is not the match row of {theirs}")
            state[ours] = whole
    return replace(config, has={(1, 1): "both", (1, 0): "words", (0, 1): "match"}.get((words, match), "none"))


def _given(model: Vilt | ViltClassifier) -> dict[str, Tensor]:
    """The model's tensors under transformers' names."""
    config = model.config
    state = {name: each.detach().cpu() for name, each in model.state_dict().items()}
    for ours in set(_VOCABULARY) & set(state):
        state[ours] = state[ours][: -len(ADDED)]
    prefix = "" if _class_of(config) == BARE else "vilt."
    made = {prefix + theirs: state.pop(ours) for ours, theirs in _names(config).items()}
    for ours, theirs in _fused(config).items():
        made |= zip((prefix + each for each in theirs), state.pop(ours).chunk(len(_QKV)), strict=True)
    made[prefix + _TOKEN_TYPES] = torch.zeros(_DEFAULTS["type_vocab_size"], config.width)
    for ours, tensor in state.items():
        if ours in _RANK:
            made[_RANK[ours]], made[_MATCH[ours]] = tensor[1:], tensor
        else:
            made[_WORDS.get(ours, ours.replace("cls_head.", "classifier."))] = tensor
    return {name: each.contiguous().clone() for name, each in made.items()}
