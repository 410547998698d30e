"""transformers' BLIP directories: `BlipForConditionalGeneration`, `BlipForImageTextRetrieval`, `BlipForQuestionAnswering`.

A pretrained BLIP (captioner and filter sharing tensors) has no class there; it is a directory of two: `captioning/` and
`retrieval/`. Written against transformers 5.23; nothing of it is imported.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models import Model, family_of
from capfilt.models.blip.model import LARGE, Blip, BlipConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.models.common.weights import listed, read_json, read_pickled, read_safetensors, write_safetensors
from capfilt.models.interop import vocabulary
from capfilt.models.interop.contents import (
    LEFTOVERS,
    SETTINGS,
    Contents,
    NoHome,
    architecture,
    assemble,
    blip_of,
    halved,
    no_blip,
    read_beside,
    read_settings,
    refuse_convolutions,
    remember,
    resized,
    settings_of,
    take,
    unwrapped,
    with_settings,
    write_beside,
)
from capfilt.models.interop.keymaps import Config, blip_kind, transformers_names

CONFIG, WEIGHTS, PICKLED = "config.json", "model.safetensors", "pytorch_model.bin"
CLASSES = {
    "BlipForConditionalGeneration": "captioner",
    "BlipForImageTextRetrieval": "filter",
    "BlipForQuestionAnswering": "vqa",
}
PAIR = {"captioner": "captioning", "filter": "retrieval"}
NO_HOME = ("vision.drop_path", "vision.trunk_frozen", "max_text_tokens", "max_words", "prompt")

# What a key means that a config.json leaves out: transformers' class defaults, which are not BLIP's (8 heads, not 12).
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30524,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 30522,
    "pad_token_id": 0,
    "sep_token_id": 102,
    "is_decoder": True,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
# The published configs say 1e-5 (the class default) of towers that were trained with the original code's 1e-6.
_VISION_EPS = (1e-5, 1e-6)


def is_pair(directory: Path) -> bool:
    """Whether the directory is a pretrained BLIP as two transformers directories."""
    return all((directory / name / CONFIG).is_file() for name in PAIR.values())


def files(directory: Path) -> list[Path]:
    """Every file that `read` reads."""
    if is_pair(directory):
        inner = [each for name in PAIR.values() for each in files(directory / name)]
        return [*inner, *_beside(directory)]
    return [directory / CONFIG, *weights_files(directory), vocabulary.find(directory), *_beside(directory)]


def read_config(directory: Path, image_size: int = 0) -> tuple[Config, dict[str, Any]]:
    """(our config, `extra`) of the directory, no weights read. UserError names the field that no BLIP of ours has."""
    if is_pair(directory):
        config, _ = read_config(directory / PAIR["captioner"], image_size)
        other, _ = read_config(directory / PAIR["filter"], image_size)
        assert isinstance(config, BlipConfig)
        assert isinstance(other, BlipConfig)
        both = dataclasses.replace(other, half="both", prompt=config.prompt)
        if dataclasses.replace(config, half="both") != dataclasses.replace(
            both, max_text_tokens=config.max_text_tokens, max_words=config.max_words
        ):
            raise UserError(
                f"{directory}: {' and '.join(PAIR.values())} have different geometries: they are no pair"
            )
        return both, read_settings(directory)[1]
    path = directory / CONFIG
    config = _config(path, read_json(path), image_size)
    settings, extra = read_settings(directory)
    return with_settings(directory / SETTINGS, config, NO_HOME, settings), extra


def read(directory: Path, image_size: int = 0) -> Contents:
    """The checkpoint; `image_size` other than 0 resizes the position embedding. UserError names the file or key."""
    config, extra = read_config(directory, image_size)
    _, _, leftovers = read_beside(directory)
    temperature = leftovers.pop("temp", None)
    if is_pair(directory):
        state, path = _pair_state(directory), directory
        tokenizer, other = (_vocabulary(directory / name, config.vocab_size) for name in PAIR.values())
        if other.fingerprint != tokenizer.fingerprint:
            raise UserError(f"{directory}: {' and '.join(PAIR.values())} have different vocabularies")
    else:
        path = weights_files(directory)[0]
        state, _ = take(path, read_weights(directory), transformers_names(config))
        tokenizer = _vocabulary(directory, config.vocab_size)
    if blip_kind(config) in ("both", "filter"):
        # transformers has no home for it; without a sidecar it is where training starts (BLIP, sec. 3.2, code).
        state["temperature"] = torch.tensor(0.07) if temperature is None else temperature
    return Contents(assemble(path, config, resized(path, config, state)), tokenizer, extra, leftovers)


def write(directory: Path, contents: Contents) -> None:
    """Writes the checkpoint into an empty directory; UserError, before anything is written, where it has no home."""
    model = blip_of(contents)
    config = model.config
    refuse(config)
    rest = dict(contents.leftovers)
    if isinstance(model, Blip) and model.config.half == "both":
        for half, name in PAIR.items():
            (directory / name).mkdir(parents=True)
            _write_class(directory / name, halved(model, half), contents.tokenizer)
            write_beside(directory / name, settings_of(config, NO_HOME), {}, {}, {})
    else:
        _write_class(directory, model, contents.tokenizer)
    if isinstance(model, Blip) and model.config.half != "captioner":
        rest["temp"] = model.temperature
    whole = isinstance(model, Blip) and model.config.half == "both"
    write_beside(
        directory,
        {} if whole else settings_of(config, NO_HOME),
        contents.extra,
        rest,
        remember(model, contents.tokenizer),
    )


def refuse(config: Config, tokenizer: Any = None) -> None:
    """NoHome naming what transformers' BLIP has no place for; else nothing."""
    if family_of(config).name != "blip":
        raise no_blip(config)
    if blip_kind(config) == "nlvr":
        raise NoHome("an NLVR2 model (BlipNlvr) has no home in transformers, which has no class for it")
    if blip_kind(config) == "classifier":
        raise NoHome("a BlipClassifier has no home in transformers, which has no class for it")
    refuse_convolutions(config, "transformers' BLIP")
    if blip_kind(config) == "vqa" and config.vision.width != config.text.width:
        raise NoHome(
            f"a vision.width ({config.vision.width}) other than text.width ({config.text.width}) has no home in "
            "transformers' BlipForQuestionAnswering, whose answer decoder reads states of the vision tower's width"
        )


def config_json(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """What transformers calls our config; every field that BLIP's own value differs in from its class default is there."""
    kind = blip_kind(config)
    vision, text = config.vision, config.text
    name = next(name for name, each in CLASSES.items() if each == kind)
    return {
        "architectures": [name],
        "model_type": "blip",
        "dtype": "float32",
        "image_text_hidden_size": config.embed_dim if isinstance(config, BlipConfig) else 256,
        "initializer_range": 0.02,
        "label_smoothing": 0.1,
        "text_config": {
            "model_type": "blip_text_model",
            "vocab_size": text.vocab_size,
            "hidden_size": text.width,
            "encoder_hidden_size": vision.width,
            "intermediate_size": text.hidden,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "max_position_embeddings": text.max_positions,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "hidden_dropout_prob": text.dropout,
            "attention_probs_dropout_prob": text.attention_dropout,
            "initializer_range": 0.02,
            "bos_token_id": text.dec_id,
            "eos_token_id": tokenizer.sep_id,
            "sep_token_id": tokenizer.sep_id,
            "pad_token_id": text.pad_id,
            "is_decoder": True,
            "label_smoothing": 0.1,
        },
        "vision_config": {
            "model_type": "blip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "num_hidden_layers": vision.depth,
            "num_attention_heads": vision.heads,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
        },
    }


def _write_class(directory: Path, model: Model, tokenizer: Tokenizer) -> None:
    state = model.state_dict()
    weights = {
        theirs: state[ours].detach().cpu().contiguous().clone()
        for ours, theirs in transformers_names(model.config).items()
    }
    write_safetensors(directory / WEIGHTS, weights)
    vocabulary.write_transformers(directory, tokenizer)
    size = model.config.image_size
    processor = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    for name, content in (
        ("preprocessor_config.json", processor),
        (CONFIG, config_json(model.config, tokenizer)),
    ):
        (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _config(path: Path, content: Mapping[str, Any], image_size: int) -> Config:
    kind = CLASSES[architecture(path, content, CLASSES)]
    text = {**_TEXT_DEFAULTS, **_table(path, content, "text_config")}
    vision = {**_VISION_DEFAULTS, **_table(path, content, "vision_config")}
    fixed = {
        "text_config.hidden_act": (text["hidden_act"], ("gelu",)),
        "text_config.layer_norm_eps": (text["layer_norm_eps"], (1e-12,)),
        "text_config.is_decoder": (text["is_decoder"], (True,)),
        "text_config.bos_token_id": (text["bos_token_id"], (text["vocab_size"] - 2,)),
        "vision_config.hidden_act": (vision["hidden_act"], ("gelu",)),
        "vision_config.layer_norm_eps": (vision["layer_norm_eps"], _VISION_EPS),
        "vision_config.attention_dropout": (vision["attention_dropout"], (0,)),
    }
    wrong = [
        f"{name} {value!r} (only {wanted[-1]!r})"
        for name, (value, wanted) in fixed.items()
        if value not in wanted
    ]
    if wrong:
        raise UserError(f"{path}: capfilt's BLIP has no {listed(wrong)}")
    geometry = VISION_FIELDS | {"image_size": "image_size", "patch_size": "patch_size"}
    tower = {ours: _side(vision[theirs]) for ours, theirs in geometry.items()}
    if (tower["width"], tower["depth"]) == (LARGE.vision.width, LARGE.vision.depth):
        tower["drop_path"] = LARGE.vision.drop_path
    values: dict[str, Any] = {
        "vision": {**tower, **({"image_size": image_size} if image_size else {})},
        "text": {ours: text[theirs] for ours, theirs in TEXT_FIELDS.items()},
    }
    try:
        if kind == "vqa":
            return VqaConfig.from_dict(values)
        embed = content.get("image_text_hidden_size", 256)
        return BlipConfig.from_dict({**values, "embed_dim": embed, "half": kind})
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


_GEOMETRY = {
    "width": "hidden_size",
    "hidden": "intermediate_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
}
VISION_FIELDS = _GEOMETRY
TEXT_FIELDS = _GEOMETRY | {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "pad_id": "pad_token_id",
}


def _table(path: Path, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = content.get(name)
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {value!r}, not a table of fields")
    return dict(value or {})


def _side(value: Any) -> Any:
    """The side of a square that is written as a pair."""
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        return value[0]
    return value


def _vocabulary(directory: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a config.json, which must mean the same by its ids."""
    path = directory / CONFIG
    tokenizer = vocabulary.read(directory, vocab_size)
    text = {**_TEXT_DEFAULTS, **_table(path, read_json(path), "text_config")}
    for key, own in (("sep_token_id", tokenizer.sep_id), ("pad_token_id", tokenizer.pad_id)):
        if text[key] != own:
            raise UserError(
                f"{path}: text_config.{key} is {text[key]}, but {own} in the vocabulary beside it"
            )
    return tokenizer


def _pair_state(directory: Path) -> dict[str, Tensor]:
    """Both halves' tensors under our names; the vision tower, which both have, must be one."""
    joined: dict[str, Tensor] = {}
    for name in PAIR.values():
        path = weights_files(directory / name)[0]
        half, _ = read_config(directory / name)
        state, _ = take(path, read_weights(directory / name), transformers_names(half))
        differing = sorted(
            key for key in state.keys() & joined.keys() if not torch.equal(state[key], joined[key])
        )
        if differing:
            raise UserError(
                f"{path}: {listed(differing)} differ from {PAIR['captioner']}'s: the two are no pair"
            )
        joined |= state
    return joined


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The tensors of a directory, of one file or of shards with their index. UserError where a file holds anything else.

    An index is somebody else's: it names files of its own directory, by their bare names, and nothing outside.
    """
    index, *files = weights_files(directory)
    if not files:
        return unwrapped(index, _tensors(index))
    found: dict[str, Tensor] = {}
    for path in files:
        shard = _tensors(path)
        twice = sorted(found.keys() & shard.keys())
        if twice:
            raise UserError(
                f"{path}: {listed(twice)} stand in another shard too; take the checkpoint from its source"
            )
        found |= shard
    lost = sorted(_map(index).keys() - found.keys())
    if lost:
        raise UserError(
            f"{index}: names {len(lost)} tensors that no shard has: {listed(lost)}; the shards are not whole"
        )
    return unwrapped(index, found)


def weights_files(directory: Path) -> list[Path]:
    """The file of a directory's weights; or an index, and the shards that it names. UserError where there is none."""
    for name in (WEIGHTS, PICKLED):
        if (directory / name).is_file():
            return [directory / name]
        index = directory / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(_map(index).values()))
            outside = [
                each for each in names if Path(each).name != each or Path(each).suffix != Path(name).suffix
            ]
            if outside:
                raise UserError(f"{index}: {outside[0]!r} is no name of a {Path(name).suffix} file beside it")
            return [index, *(directory / each for each in names)]
    raise UserError(
        f"{directory / WEIGHTS}: no such file, nor {WEIGHTS}.index.json; save with transformers' save_pretrained"
    )


def _map(index: Path) -> dict[str, str]:
    """Which file of shards each tensor is in."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(each, str) for each in found.values()):
        raise UserError(f"{index}: 'weight_map' is no table of files; take the checkpoint from its source")
    return found


def _tensors(path: Path) -> Any:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_pickled(path)


def _beside(directory: Path) -> list[Path]:
    return [directory / name for name in (SETTINGS, LEFTOVERS) if (directory / name).is_file()]
