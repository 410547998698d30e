"""A checkpoint in memory, whatever its layout, and two files for values that a layout has no home for.

`capfilt.json` holds settings, the run's own words and how texts are cleaned; `leftovers.safetensors` holds tensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import capfilt
from capfilt.errors import UserError
from capfilt.models.common.config import Shape
from capfilt.models.common.weights import fill, listed, read_json, read_safetensors, write_safetensors

LEFTOVERS, SETTINGS = "leftovers.safetensors", "capfilt.json"
S = TypeVar("S", bound=Shape)
M = TypeVar("M", bound=nn.Module)

# BLIP and ALBEF, released code: tensors that their classes register besides the model.
_REASONS = {
    r"(visual_encoder|text_encoder|text_decoder|vision_proj|text_proj|cls_head)_m\..+": (
        "momentum towers: training's moving average of the model"
    ),
    r"(image|text|idx)_queue": "queue of past embeddings: training's contrast",
    r"queue_ptr|ptr_queue": "position in the queue",
}


@dataclass
class Contents:
    """A checkpoint in memory: the model in evaluation mode, and what came with it.

    leftovers: tensors under the original repository's names that the model has no place for (queues, momentum towers).
    """

    model: Any
    tokenizer: Any  # a Tokenizer; of a Clip, a BpeTokenizer
    extra: dict[str, Any] = field(default_factory=dict)
    leftovers: dict[str, Tensor] = field(default_factory=dict)


class NoHome(UserError):
    """A layout has no place for a model. `cure`: the option of its training that would have given it one; "" for none."""

    def __init__(self, why: str, cure: str = "") -> None:
        super().__init__(why)
        self.cure = cure


def reason(name: str) -> str | None:
    """Why a tensor of this name has no place in a model; None where there is no known reason."""
    return next((why for pattern, why in _REASONS.items() if re.fullmatch(pattern, name)), None)


def blank(model: Callable[[Any], M], config: Any) -> M:
    """A model of this class on the meta device: names and shapes, no values."""
    with torch.device("meta"):
        return model(config)


def assemble(path: Path, model: M, state: Mapping[str, Tensor]) -> M:
    """The blank model in evaluation mode, with `state` as its own; UserError as `weights.fill`."""
    fill(path, model, state)
    for module in model.modules():
        constants = getattr(module, "set_normalisation", None)
        if constants is not None:
            constants()
    return model.eval()


# ---------------------------------------------------------------------- settings


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted name ("vision.heads")."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    made: dict[str, Any] = {}
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        table = made
        for group in groups:
            table = table.setdefault(group, {})
        table[leaf] = value
    return made


def shaped(path: Path, kind: type[S], flat: Mapping[str, Any]) -> S:
    """The config of this class with these fields by dotted name; UserError naming the file for values that do not fit."""
    try:
        return kind.from_dict(nested(flat))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, extra) of capfilt.json; both empty where there is none."""
    if not (directory / SETTINGS).is_file():
        return {}, {}
    content = read_json(directory / SETTINGS)
    settings, extra = content.get("settings"), content.get("extra")
    if not isinstance(settings, dict) or not isinstance(extra, dict):
        raise UserError(f"{directory / SETTINGS}: fields 'settings' and 'extra' are missing; remove the file")
    return settings, extra


def write_beside(
    directory: Path,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    rest: Mapping[str, Tensor],
    cleaning: Mapping[str, str],
) -> None:
    """Writes capfilt.json, and leftovers.safetensors where there are any. cleaning: fields on how texts are cleaned."""
    content = {
        "capfilt_version": capfilt.__version__,
        "settings": dict(settings),
        "extra": dict(extra),
        **cleaning,
    }
    write_json(directory / SETTINGS, content)
    if rest:
        write_leftovers(directory, rest)


def beside(directory: Path) -> list[Path]:
    """The files of this module that are there."""
    return [directory / name for name in (SETTINGS, LEFTOVERS) if (directory / name).is_file()]


def write_leftovers(directory: Path, rest: Mapping[str, Tensor]) -> None:
    """Writes leftovers.safetensors. Tensors that share memory, which such a file cannot have, are copied."""
    write_safetensors(directory / LEFTOVERS, {name: each.clone() for name, each in rest.items()})


def read_leftovers(directory: Path, known: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The tensors of leftovers.safetensors; none without the file. UserError for a name that is not `known` and has no
    `reason`."""
    path = directory / LEFTOVERS
    rest = read_safetensors(path) if path.is_file() else {}
    unknown = sorted(name for name in rest if name not in known and reason(name) is None)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors of unknown use: {listed(unknown)}; remove the file")
    return rest


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes the object, keys in order."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
