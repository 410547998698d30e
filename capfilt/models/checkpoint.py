"""A model on disk: a directory of config.json, model.safetensors and tokenizer.json. Nothing here unpickles.

Optimiser state and exact resume are capfilt.training's. Other projects' layouts are not read here.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import capfilt
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models.blip import Blip, BlipConfig
from capfilt.tables.ids import file_sha256

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
SHOWN = 5


class Saveable(Protocol):
    """What `save` needs of a tokenizer."""

    vocab_size: int

    def save(self, directory: Path) -> object:
        """Writes tokenizer.json into the directory."""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one once, under the first name it has."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def save(
    directory: str | Path, model: Blip, tokenizer: Saveable, extra: dict[str, Any] | None = None
) -> None:
    """Writes the three files, config.json last; `extra` must be JSON-able and comes back from `load` as meta["extra"].

    The config carries the digests of the other two, so a save killed half-way over an older checkpoint is refused by
    `load` rather than read as a mixture.
    """
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"a tokenizer of {tokenizer.vocab_size} tokens does not belong to a model of {model.config.vocab_size}"
        )
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".partial-") as name:
        partial = Path(name)
        weights = {key: tensor.cpu().contiguous() for key, tensor in tensors(model).items()}
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save(partial)
        content = {
            "model_type": "blip",
            "capfilt_version": capfilt.__version__,
            "config": model.config.to_dict(),
            "extra": extra or {},
            "files": {each: file_sha256(partial / each) for each in (WEIGHTS, TOKENIZER)},
        }
        (partial / CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for each in (WEIGHTS, TOKENIZER, CONFIG):
            with (partial / each).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial / each, directory / each)


def load(directory: str | Path, device: str | torch.device = "cpu") -> tuple[Blip, Tokenizer, dict[str, Any]]:
    """Returns (model in evaluation mode on `device`, tokenizer, meta): meta is config.json, `extra` as saved.

    Raises UserError, naming the file, when one is missing, damaged, or does not belong to the others.
    """
    directory = Path(directory)
    meta = read_config(directory)
    config_path, weights_path = directory / CONFIG, directory / WEIGHTS
    try:
        config = BlipConfig.from_dict(meta["config"])
    except UserError as error:
        raise UserError(f"{config_path}: {error}") from error
    for name, expected in meta["files"].items():
        if file_sha256(_existing(directory / name)) != expected:
            raise UserError(
                f"{directory / name}: changed since {CONFIG} was written; take the whole checkpoint from its source"
            )
    # On the meta device nothing is drawn or allocated: the tensors of the file become the model's own.
    with torch.device("meta"):
        model = Blip(config)
    try:
        loaded = load_file(weights_path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{weights_path}: not a readable safetensors file ({error})".splitlines()[0]
        ) from error
    check_tensors(weights_path, tensors(model), loaded)
    model.load_state_dict(loaded, strict=False, assign=True)
    model.visual_encoder.set_normalisation()
    try:
        tokenizer = Tokenizer.load(directory)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{directory / TOKENIZER}: not a tokenizer ({error})".splitlines()[0]) from error
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"{directory / TOKENIZER}: {tokenizer.vocab_size} tokens, but the model has {config.vocab_size}"
        )
    return model.to(device).eval(), tokenizer, meta


def read_config(directory: str | Path) -> dict[str, Any]:
    """config.json's content, its form checked: no weights are read. UserError where it is none of ours."""
    path = _existing(Path(directory) / CONFIG)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a JSON file ({error})") from error
    if not isinstance(content, dict) or content.get("model_type") != "blip":
        raise UserError(f"{path}: no capfilt BLIP checkpoint (model_type is not 'blip')")
    if not isinstance(content.get("config"), dict) or not isinstance(content.get("files"), dict):
        raise UserError(f"{path}: no capfilt checkpoint (fields 'config' and 'files' are missing)")
    if set(content["files"]) != {WEIGHTS, TOKENIZER}:
        raise UserError(f"{path}: 'files' must name {WEIGHTS} and {TOKENIZER}")
    return content


def fingerprint(directory: str | Path) -> str:
    """sha256 (hex) over the three files: two checkpoints with one fingerprint caption and score alike."""
    total = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, TOKENIZER):
        total.update(f"{name}:{file_sha256(_existing(Path(directory) / name))}\n".encode())
    return total.hexdigest()


def check_tensors(path: Path, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    """UserError naming `path` and listing what is missing, unexpected or of another shape; else nothing."""
    faults = []
    missing = sorted(set(expected) - set(found))
    unexpected = sorted(set(found) - set(expected))
    misshapen = [
        f"{name} {list(found[name].shape)} instead of {list(expected[name].shape)}"
        for name in sorted(set(expected) & set(found))
        if found[name].shape != expected[name].shape
    ]
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            faults.append(f"{len(names)} tensors {kind}: {', '.join(names[:SHOWN])}{more}")
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; a checkpoint is a directory of {CONFIG}, {WEIGHTS}, {TOKENIZER}"
        )
    return path
