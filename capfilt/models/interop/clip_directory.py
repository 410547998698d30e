"""A transformers directory of a CLIPModel, read and written: config.json, weights, and the tokenizer that travels along.

What is in it under which name is `clip_layouts.py`'s.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from capfilt.data.bpe import BpeTokenizer
from capfilt.errors import UserError
from capfilt.models.clip.model import Clip, ClipConfig
from capfilt.models.common.vision import CLIP_MEAN, CLIP_STD
from capfilt.models.common.weights import read_json, write_safetensors
from capfilt.models.interop.clip_layouts import (
    TRANSFORMERS,
    exported,
    filled,
    from_transformers_config,
    transformers_config,
)
from capfilt.models.interop.contents import (
    SETTINGS,
    Contents,
    read_settings,
    refuse_trunk,
    remember,
    settings_of,
    with_settings,
    write_beside,
)
from capfilt.models.interop.transformers_layout import read_weights, weights_files

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TOKENIZER, MERGES = "tokenizer.json", ("merges.txt", "bpe_simple_vocab_16e6.txt")
NO_HOME = ("max_text_tokens", "max_words")


def files(directory: Path) -> list[Path]:
    """Every file that `read` reads."""
    found = [directory / CONFIG, *weights_files(directory), *tokenizer_files(directory)]
    return [*found, directory / SETTINGS] if (directory / SETTINGS).is_file() else found


def read_config(directory: Path) -> tuple[ClipConfig, dict[str, Any]]:
    """(our config, `extra`), no weights read."""
    path = directory / CONFIG
    settings, extra = read_settings(directory)
    config = from_transformers_config(path, read_json(path))
    return with_settings(directory / SETTINGS, config, NO_HOME, settings), extra


def read(directory: Path, image_size: int = 0) -> Contents:
    """The checkpoint; `image_size` other than 0 resizes the position embedding."""
    config, extra = read_config(directory)
    path = weights_files(directory)[0]
    model = filled(path, config, TRANSFORMERS, read_weights(directory))
    tokenizer = tokenizer_of(directory, config)
    if image_size and image_size != config.image_size:
        model.resize_image(image_size)
    return Contents(model, tokenizer, extra)


def refuse(config: ClipConfig, tokenizer: Any = None) -> None:
    """NoHome naming what transformers' CLIP has no place for; else nothing."""
    refuse_trunk(config, "transformers")
    transformers_config(config)


def write(directory: Path, contents: Contents) -> None:
    """Writes the checkpoint into an empty directory; UserError, before anything is written, where it has no home."""
    model, tokenizer = contents.model, contents.tokenizer
    assert isinstance(model, Clip)
    config = transformers_config(model.config)
    weights = {name: each.cpu().clone() for name, each in exported(model, TRANSFORMERS).items()}
    write_safetensors(directory / WEIGHTS, weights)
    tokenizer.save(directory)
    size = model.config.image_size
    # CLIP, released code: the shorter side made n, then the middle; capfilt itself shows a model whole pictures.
    processor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
        "size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD),
    }  # fmt: skip
    start, end = tokenizer.specials
    said = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end,
        "model_max_length": model.config.text.context,
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


def tokenizer_of(directory: Path, config: ClipConfig) -> BpeTokenizer:
    """The tokenizer that lies beside a CLIP. UserError where there is none, or another model's."""
    (path,) = tokenizer_files(directory)
    tokenizer = BpeTokenizer.load(path) if path.name == TOKENIZER else BpeTokenizer.from_merges(path)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}")
    return tokenizer


def tokenizer_files(directory: Path) -> list[Path]:
    """The one file that the tokenizer is read from. UserError where there is none."""
    for name in (TOKENIZER, *MERGES):
        if (directory / name).is_file():
            return [directory / name]
    raise UserError(
        f"{directory}: neither {TOKENIZER} nor {' nor '.join(MERGES)}; take one from where the weights come from"
    )
