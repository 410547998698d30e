"""A model on disk: a directory of config.json, model.safetensors and tokenizer.json. Nothing here unpickles.

Whatever reads a checkpoint comes through here; other projects' layouts are recognised and handed to `layouts`.
Optimiser state and exact resume are capfilt.training's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

import capfilt
from capfilt.data.tokenizer import Encodes, Tokenizer
from capfilt.errors import MissingInput, UserError
from capfilt.models import Model, kind_named, kind_of, kinds, layouts
from capfilt.models.blip.model import Blip
from capfilt.models.common.config import Shape
from capfilt.models.common.layouts.contents import LEFTOVERS, Contents, assemble, blank
from capfilt.models.common.weights import (
    check_tensors,
    read_json,
    read_safetensors,
    tensors,
    write_safetensors,
)
from capfilt.models.family import Kind
from capfilt.tables.ids import file_sha256
from capfilt.tables.publish import sync_directory
from capfilt.tables.sealed import SEAL, UNSEALED, intact, seal_file

__all__ = ["check_tensors", "fingerprint", "layout_of", "load", "open_any", "read_config", "save", "tensors"]

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
BESIDE = ("log.jsonl", "answers.json", LEFTOVERS)
"""Files that a checkpoint may have too, and whose digests its config then holds."""
_FIELDS = {"model_type", "capfilt_version", "config", "extra", "cleaning", "files", SEAL}
_TORN = (".partial-*", ".tmp*", "*.part", ".*.tmp")
"""Files that a process killed while it writes leaves in a checkpoint's directory; nothing reads them."""

_BEFORE = {"vilt": {"max_words": 30}, "vilt_classifier": {"max_words": 50}}
"""Values of kinds from before they were saved, where their default has changed since."""


def save(
    directory: str | Path, model: Model, tokenizer: Encodes, extra: dict[str, Any] | None = None
) -> None:
    """Writes the three files (no tokenizer.json for a model without a text side), config.json last.

    `extra` must be JSON-able and comes back from `load` as meta["extra"].

    The config carries the digests of the other two, of those of BESIDE that are there, and its own, so that `load` refuses a
    file that changed since, and a save killed half-way over an older checkpoint rather than reading a mixture.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"a tokenizer of {tokenizer.vocab_size} tokens does not belong to a model of {model.config.vocab_size}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        partial = Path(name)
        write_safetensors(partial / WEIGHTS, tensors(model))
        tokenizer.save(partial)
        files = [partial / WEIGHTS, partial / TOKENIZER, *(directory / name for name in BESIDE)]
        content = {
            "model_type": kind_of(model).name,
            "capfilt_version": capfilt.__version__,
            "config": model.config.to_dict(),
            "extra": extra or {},
            **layouts.remember(model, tokenizer),
            "files": {each.name: file_sha256(each) for each in files if each.is_file()},
            SEAL: UNSEALED,
        }
        (partial / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        seal_file(partial / CONFIG)
        config, *rest = _files(kind_of(model))
        for each in (*rest, config):
            with (partial / each).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial / each, directory / each)
        sync_directory(directory)


def load(
    path: str | Path, device: str | torch.device = "cpu", image_size: int = 0
) -> tuple[Blip, Tokenizer, dict[str, Any]]:
    """Returns (model in evaluation mode on `device`, tokenizer, meta): meta as from `read_config`, `extra` as saved.

    `path` is a directory that `save` wrote, a transformers BLIP directory, or a `.pth` of the original repository with
    its vocabulary beside it. `image_size` other than 0 resizes the position embedding. Raises UserError, naming the
    file, when one is missing, damaged, or does not belong to the others.
    """
    contents, meta = open_any(path, image_size)
    if not isinstance(contents.model, Blip):
        raise UserError(
            f"{path}: {kind_of(contents.model).what}; captioning, scoring and training need another checkpoint"
        )
    return contents.model.to(device), contents.tokenizer, meta


def open_any(path: str | Path, image_size: int = 0) -> tuple[Contents, dict[str, Any]]:
    """(everything the checkpoint holds, meta), on the processor; as `load`, for every class of model there is."""
    layout, place = layouts.locate(path)
    if layout is not None:
        contents = layouts.read(layout, place, image_size)
        return contents, _meta(layout.name, contents.model.config, contents.extra)
    contents, meta = _read(place)
    if image_size and image_size != contents.model.config.image_size:
        resize = getattr(contents.model, "resize_image", None)
        if resize is None:
            raise UserError(f"{place}: {kind_of(contents.model).one} keeps the image size it was saved with")
        resize(image_size)
    return contents, meta


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json's content, its form checked: no weights are loaded. UserError where it is no BLIP that can be read.

    A checkpoint in another layout is described in the same form; its `files` are none.
    """
    layout, place = layouts.locate(path)
    if layout is not None:
        return _meta(layout.name, *layouts.read_config(layout, place))
    return _read_config(place)


def shape_of(path: str | Path) -> Shape:
    """The config of the model at `path`; no weights are loaded."""
    meta = read_config(path)
    shape: Shape = kind_named(str(meta["model_type"])).config.from_dict(meta["config"])
    return shape


def fingerprint(path: str | Path) -> str:
    """sha256 (hex) over the files it is read from: two checkpoints with one fingerprint caption and score alike."""
    layout, place = layouts.locate(path)
    if layout is not None:
        return layouts.fingerprint(layout, place)
    total = hashlib.sha256()
    listed = read_json(_existing(place / CONFIG)).get("files")
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        # Of a model without a text side there is no tokenizer.
        if name != TOKENIZER or not isinstance(listed, dict) or name in listed:
            total.update(f"{name}:{file_sha256(_existing(place / name))}\n".encode())
    return total.hexdigest()


def check(path: str | Path, full: bool = False) -> None:
    """UserError naming the file of a checkpoint that is not as it was written; `full` reads every byte of it."""
    meta = read_config(path)
    if full and meta["files"]:
        _verify(Path(path), meta)


def torn(directory: Path) -> list[Path]:
    """Files that killed processes left in a checkpoint's directory, and in those of its live and best weights."""
    places = (directory, directory / "best", directory / "live")
    return sorted({each for place in places for pattern in _TORN for each in place.glob(pattern)})


def sweep(directory: Path) -> None:
    """Deletes what `torn` finds: for who writes the checkpoint anew, and is alone in doing so."""
    for each in torn(directory):
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        else:
            each.unlink(missing_ok=True)


def layout_of(path: str | Path) -> str:
    """The name of a checkpoint's layout, one of `layouts.names`. UserError where there is none."""
    layout, _ = layouts.locate(path)
    return layout.name if layout else layouts.CAPFILT


def origin(path: str | Path, given: str) -> dict[str, dict[str, str]]:
    """What the checkpoint's fingerprint stands for, for those who write it down: how it was given, and its layout."""
    return {fingerprint(path): {"given": given, "layout": layout_of(path)}}


def _meta(layout: str, config: Shape, extra: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": kind_of(config).name, "config": config.to_dict(), "extra": extra, "files": {}, "layout": layout
    }  # fmt: skip


def _read(directory: Path) -> tuple[Contents, dict[str, Any]]:
    meta = _read_config(directory)
    config_path, weights_path = directory / CONFIG, directory / WEIGHTS
    kind = kind_named(meta["model_type"])
    try:
        config = kind.config.from_dict({**_BEFORE.get(kind.name, {}), **meta["config"]})
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from error
    _verify(directory, meta)
    model = assemble(weights_path, blank(kind.model, config), read_safetensors(weights_path))
    try:
        tokenizer = kind.tokenizer.load(directory)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{directory / TOKENIZER}: not a tokenizer ({error})".splitlines()[0]) from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{directory / TOKENIZER}: {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}"
        )
    rest = read_safetensors(directory / LEFTOVERS) if (directory / LEFTOVERS).is_file() else {}
    extra = meta.get("extra", {})
    cleaning = layouts.cleaning_of(model, extra, layouts.remembered(config_path, meta))
    return Contents(model, tokenizer.cleaned_as(cleaning), extra, rest), meta


def _verify(directory: Path, meta: dict[str, Any]) -> None:
    for name, expected in meta["files"].items():
        # No model needs what lies beside it: it may be gone, but not another.
        if name in BESIDE and not (directory / name).exists():
            continue
        if file_sha256(_existing(directory / name)) != expected:
            raise UserError(
                f"{directory / name}: changed since {CONFIG} was written; take the whole checkpoint from its source"
            )


def _read_config(directory: Path) -> dict[str, Any]:
    path = _existing(directory / CONFIG)
    content = read_json(path)
    if content.get("model_type") not in [kind.name for kind in kinds()]:
        names = ", ".join(kind.name for kind in kinds())
        raise UserError(f"{path}: no BLIP checkpoint (model_type is none of {names})")
    # Files from before there was a seal have none; with one, a changed byte in its name would make such a file.
    if (SEAL in content and not intact(path)) or not set(content) <= _FIELDS:
        raise UserError(f"{path}: changed since it was written; take the whole checkpoint from its source")
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{path}: no capfilt checkpoint (fields 'config' and 'files' are missing)")
    needed = _files(kind_named(content["model_type"]))[1:]
    if not {*needed} <= set(content["files"]) <= {*needed, *BESIDE}:
        raise UserError(f"{path}: 'files' must name {' and '.join(needed)}")
    return content


def _files(kind: Kind) -> tuple[str, ...]:
    """The files that a checkpoint must have, config.json first; without a text side, no tokenizer."""
    return (CONFIG, WEIGHTS, *((TOKENIZER,) if kind.tokenizer_name else ()))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise MissingInput(
            f"{path}: no such file; a checkpoint is a directory of {CONFIG}, {WEIGHTS}, {TOKENIZER}"
        )
    return path
