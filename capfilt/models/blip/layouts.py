"""BLIP's layouts: transformers' directories, and the original repository's `.pth` (BLIP_Pretrain, BLIP_Decoder, BLIP_Retrieval,
BLIP_VQA, BLIP_NLVR).

A pretrained BLIP (captioner and filter sharing tensors) has no class in transformers; it is a directory of two: `captioning/`
and `retrieval/`. Written against transformers 5.23; nothing of it is imported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.tokenizer import DEC, ENC, Tokenizer
from capfilt.errors import UserError
from capfilt.models.blip.model import LARGE, Blip, BlipConfig
from capfilt.models.blip.tasks import BlipNlvr, BlipVqa, NlvrConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts import original, vocabulary
from capfilt.models.common.layouts.contents import (
    LEFTOVERS,
    Contents,
    NoHome,
    assemble,
    beside,
    nested,
    read_leftovers,
    read_settings,
    write_beside,
)
from capfilt.models.common.layouts.engine import (
    CONFIG,
    ConfigTable,
    Found,
    Layout,
    Sizes,
    Vocabulary,
    geometry,
    pixels,
    refuse_convolutions,
)
from capfilt.models.common.layouts.names import Rows, under
from capfilt.models.common.layouts.original import DECODER, ENCODER, HEADS, TOWER, bert, contrast, measured
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.models.common.weights import listed, read_json


def _texts(*, written: bool) -> Rows:
    head = "text_decoder.cls.predictions."
    return (*bert(ENCODER, ENCODER, written=written), *bert(DECODER, DECODER, head, head, written=written))


# ---------------------------------------------------------------------- transformers

TRANSFORMERS_NAMES: Rows = (
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.*", "vision_model.embeddings.patch_embedding.*"),
    ("visual_encoder.norm.*", "vision_model.post_layernorm.*"),
    *under(
        "visual_encoder.blocks",
        "vision_model.encoder.layers",
        {
            "norm1": "layer_norm1", "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection",
            "norm2": "layer_norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
        },
    ),
    *_texts(written=False),
    *HEADS,
)  # fmt: skip
# What theirs means where it is left out is not BLIP's (8 heads, not 12).
TABLE = ConfigTable(
    "BLIP",
    {
        "BlipForConditionalGeneration": (BlipConfig, {"half": "captioner"}),
        "BlipForImageTextRetrieval": (BlipConfig, {"half": "filter"}),
        "BlipForQuestionAnswering": (VqaConfig, {}),
    },
    (
        ("embed_dim", "image_text_hidden_size", 256),
        ("vision.image_size", "vision_config.image_size", 384), ("vision.patch_size", "vision_config.patch_size", 16),
        *geometry("vision.", "vision_config.", 768, 12, 12, 3072), *geometry("text.", "text_config.", 768, 12, 8, 3072),
        ("text.vocab_size", "text_config.vocab_size", 30524), ("text.pad_id", "text_config.pad_token_id", 0),
        ("text.max_positions", "text_config.max_position_embeddings", 512),
        ("text.dropout", "text_config.hidden_dropout_prob", 0.0),
        ("text.attention_dropout", "text_config.attention_probs_dropout_prob", 0.0),
    ),
    {
        "text_config.hidden_act": ("gelu",), "text_config.layer_norm_eps": (1e-12,), "text_config.is_decoder": (True,),
        # The published configs say 1e-5 (the class default) of towers that were trained with the original code's 1e-6.
        "vision_config.hidden_act": ("gelu",), "vision_config.layer_norm_eps": (1e-5, 1e-6),
        "vision_config.attention_dropout": (0.0,),
    },
)  # fmt: skip
_SEP, _DEC = ("sep_token_id", 102), ("bos_token_id", 30522)
"""Tokens that config.json names by number, and what leaving them out means."""


def _said(content: Mapping[str, Any], key: str, default: int) -> Any:
    value = (content.get("text_config") or {}).get(key)
    return default if value is None else value


def _from_config(path: Path, content: dict[str, Any], found: Any, settings: dict[str, Any]) -> Found:
    _, kind, values = TABLE.read(path, content)
    start = _said(content, *_DEC)
    if start != values["text.vocab_size"] - 2:
        raise UserError(
            f"{path}: capfilt's BLIP has no text_config.bos_token_id {start!r} (only the last but one)"
        )
    return kind, _with_drop_path(values)


def _with_drop_path(values: dict[str, Any]) -> dict[str, Any]:
    """No file says it."""
    large = (values["vision.width"], values["vision.depth"]) == (LARGE.vision.width, LARGE.vision.depth)
    return {**values, "vision.drop_path": LARGE.vision.drop_path} if large else values


def _read_vocabulary(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a config.json, which must mean the same by its ids."""
    path = directory / CONFIG
    content, tokenizer = read_json(path), vocabulary.read(directory, vocab_size)
    for key, default, own in ((*_SEP, tokenizer.sep_id), ("pad_token_id", 0, tokenizer.pad_id)):
        said = _said(content, key, default)
        if said != own:
            raise UserError(f"{path}: text_config.{key} is {said}, but {own} in the vocabulary beside it")
    return tokenizer


def _files(config: Any, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    text, size = config.text, config.image_size
    name = next(
        name
        for name, (kind, fields) in TABLE.classes.items()
        if type(config) is kind and all(getattr(config, each) == value for each, value in fields.items())
    )
    specials = ("pad_id", "unk_id", "cls_id", "sep_id", "mask_id", "dec_id", "enc_id")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {
        CONFIG: nested(
            {
                **TABLE.write(config), "architectures": [name], "model_type": "blip", "dtype": "float32",
                "initializer_range": 0.02, "label_smoothing": 0.1, "text_config.model_type": "blip_text_model",
                "text_config.encoder_hidden_size": config.vision.width, "text_config.initializer_range": 0.02,
                "text_config.bos_token_id": text.dec_id, "text_config.eos_token_id": tokenizer.sep_id,
                "text_config.sep_token_id": tokenizer.sep_id, "text_config.label_smoothing": 0.1,
                "vision_config.model_type": "blip_vision_model", "vision_config.initializer_range": 0.02,
            }
        ),
        "preprocessor_config.json": {
            **pixels(CLIP_MEAN, CLIP_STD), "image_processor_type": "BlipImageProcessor", "processor_class": "BlipProcessor",
            "do_convert_rgb": True, "size": {"height": size, "width": size},
        },
        "tokenizer_config.json": {
            **vocabulary.BERT_TOKENIZER, "bos_token": DEC, "extra_special_tokens": [ENC], "model_max_length": 512,
            "added_tokens_decoder": {
                str(index): {"content": tokenizer.token(index), **plain}
                for index in (getattr(tokenizer, each) for each in specials)
            },
        },
    }  # fmt: skip


def _refuse(config: Any, tokenizer: Any) -> None:
    refuse_convolutions(config, "transformers' BLIP")
    if isinstance(config, VqaConfig) and config.vision.width != config.text.width:
        raise NoHome(
            f"a vision.width ({config.vision.width}) other than text.width ({config.text.width}) has no home in "
            "transformers' BlipForQuestionAnswering, whose answer decoder reads states of the vision tower's width"
        )


_HALVES = {"captioner": "captioning", "filter": "retrieval"}


class _Transformers(Layout):
    """One directory, or for a model of both the two of _HALVES, which must be of one model."""

    def find(self, directory: Path, content: Mapping[str, Any] | None) -> Path | None:
        return directory if content is None and _is_pair(directory) else super().find(directory, content)

    def read_files(self, place: Path) -> list[Path]:
        if not _is_pair(place):
            return super().read_files(place)
        inner = [
            each for name in _HALVES.values() for each in super(_Transformers, self).read_files(place / name)
        ]
        return [*inner, *beside(place)]

    def told(self, place: Path, found: Mapping[str, Tensor] | None) -> tuple[Shape, dict[str, Any]]:
        if not _is_pair(place):
            return super().told(place, found)
        captioner, other = (
            super(_Transformers, self).told(place / name, None)[0] for name in _HALVES.values()
        )
        assert isinstance(captioner, BlipConfig)
        assert isinstance(other, BlipConfig)
        both = dataclasses.replace(other, half="both", prompt=captioner.prompt)
        tokens, words = captioner.max_text_tokens, captioner.max_words
        if dataclasses.replace(captioner, half="both") != dataclasses.replace(
            both, max_text_tokens=tokens, max_words=words
        ):
            raise UserError(
                f"{place}: {' and '.join(_HALVES.values())} have different geometries: they are no pair"
            )
        return both, read_settings(place)[1]

    def read(self, place: Path, image_size: int = 0) -> Contents:
        if not _is_pair(place):
            return super().read(place, image_size)
        config, extra = self.told(place, None)
        captioner, other = (
            super(_Transformers, self).read(place / name, image_size) for name in _HALVES.values()
        )
        if other.tokenizer.fingerprint != captioner.tokenizer.fingerprint:
            raise UserError(f"{place}: {' and '.join(_HALVES.values())} have different vocabularies")
        state, more = captioner.model.state_dict(), other.model.state_dict()
        differing = sorted(
            key for key in state.keys() & more.keys() if not torch.equal(state[key], more[key])
        )
        if differing:
            raise UserError(
                f"{place / _HALVES['filter']}: {listed(differing)} differ from {_HALVES['captioner']}'s: the two are no pair"
            )
        leftovers = read_leftovers(place, ("temp",))
        state |= {**more, "temperature": leftovers.pop("temp", more["temperature"])}
        config = dataclasses.replace(config, vision=other.model.config.vision)  # type: ignore[type-var]
        return Contents(assemble(place, self.blank(config), state), captioner.tokenizer, extra, leftovers)

    def write(self, directory: Path, contents: Contents, cleaning: Mapping[str, str]) -> None:
        model = contents.model
        if not (isinstance(model, Blip) and model.config.half == "both"):
            super().write(directory, contents, cleaning)
            return
        self.refusals(model.config, contents.tokenizer)
        for half, name in _HALVES.items():
            (directory / name).mkdir(parents=True)
            super().write(directory / name, Contents(model.halved(half), contents.tokenizer), cleaning)
        # The temperature is of the model of both, and lies beside both.
        (directory / _HALVES["filter"] / LEFTOVERS).unlink()
        rest = {**contents.leftovers, "temp": model.temperature}
        write_beside(directory, {}, contents.extra, rest, cleaning)


def _is_pair(directory: Path) -> bool:
    """Whether the directory is a pretrained BLIP as two transformers directories."""
    return all((directory / name / CONFIG).is_file() for name in _HALVES.values())


TRANSFORMERS = _Transformers(
    "transformers", "BLIP", {BlipConfig: Blip, VqaConfig: BlipVqa}, lambda config: TRANSFORMERS_NAMES, _from_config, _files,
    Vocabulary(vocabulary.find, _read_vocabulary, lambda directory, tokenizer: tokenizer.save(directory)),
    ("vision.drop_path", "vision.trunk_frozen", "max_text_tokens", "max_words", "prompt"), _refuse,
    # Without a file, it is where training starts (BLIP, sec. 3.2, code).
    beside={"temperature": ("temp", 0.07)}, resizes=True, model_type="blip",
)  # fmt: skip

# ---------------------------------------------------------------------- the original repository


def _from_tensors(
    path: Path, content: None, found: Mapping[str, Tensor] | None, settings: dict[str, Any]
) -> Found:
    tensors = Sizes(path, found or {})
    encoder, decoder = tensors.any(ENCODER), tensors.any(DECODER)
    values = _with_drop_path(measured(tensors, settings, ENCODER if encoder else DECODER))
    if encoder and not decoder and tensors.any("cls_head."):
        return NlvrConfig, values
    if encoder and decoder and not tensors.any("itm_head.weight"):
        return VqaConfig, values
    half = "both" if encoder and decoder else "filter" if encoder else "captioner"
    return BlipConfig, {**values, "half": half, **contrast(tensors, settings)}


ORIGINAL = original.layout(
    "BLIP", {BlipConfig: Blip, VqaConfig: BlipVqa, NlvrConfig: BlipNlvr},
    lambda config: (*TOWER, *_texts(written=True), *HEADS), _from_tensors,
    refusals=original.refuse,
    holds=lambda found: any(name.startswith((ENCODER, DECODER)) for name in found) and not original.is_albef(found),
)  # fmt: skip

LAYOUTS = (TRANSFORMERS, ORIGINAL)
