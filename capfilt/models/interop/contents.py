"""What a checkpoint holds, whatever its layout, and the steps every layout shares: accounting for keys, filling a model,
what travels beside a layout that has no home for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import capfilt
from capfilt.data.cleaning import BLIP, CLEANINGS, CLIP, CLIP_UNREPAIRED
from capfilt.data.tokenizer import Encodes
from capfilt.errors import UserError
from capfilt.models import Model, build, family_of, kind_of
from capfilt.models.blip.model import Blip
from capfilt.models.common.config import Shape
from capfilt.models.common.vision import resize_position_embedding
from capfilt.models.common.weights import (
    fill,
    listed,
    read_json,
    read_safetensors,
    write_safetensors,
)
from capfilt.models.interop.keymaps import POSITION_IDS, TIED, reason

LEFTOVERS, SETTINGS = "leftovers.safetensors", "capfilt.json"
S = TypeVar("S", bound=Shape)


@dataclass
class Contents:
    """A checkpoint in memory: the model in evaluation mode, and what came with it.

    leftovers: tensors under the original repository's names that the model has no place for (queues, momentum towers).
    """

    model: Model
    tokenizer: Any  # a Tokenizer; of a Clip, a BpeTokenizer
    extra: dict[str, Any] = field(default_factory=dict)
    leftovers: dict[str, Tensor] = field(default_factory=dict)


class NoHome(UserError):
    """A layout has no place for a model. `cure`: the option of its training that would have given it one; "" for none."""

    def __init__(self, why: str, cure: str = "") -> None:
        super().__init__(why)
        self.cure = cure


def blip_of(contents: Contents) -> Model:
    """The model, for a layout of BLIPs. UserError where it is none."""
    if family_of(contents.model).name != "blip":
        raise no_blip(contents.model)
    return contents.model


def no_blip(model_or_config: object) -> NoHome:
    """The error for what is no BLIP, in a layout of BLIPs."""
    return NoHome(f"{kind_of(model_or_config).one} has no home in a layout of BLIPs")


WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which trainers save a model's tensors: BLIP's, ALBEF's and LAVIS's code, Lightning and open_clip, plain PyTorch,
DeepSpeed."""


def unwrapped(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors in what a file holds: itself, or what lies under one of WRAPPERS, without a prefix that all names share.

    A prefix is what DistributedDataParallel and torch.compile put before every name. A warning says what was not read.
    UserError where there is no dictionary of tensors.
    """
    key = next(
        (key for key in WRAPPERS if isinstance(content, dict) and isinstance(content.get(key), dict)), ""
    )
    state = content[key] if key else content
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(each, Tensor) for name, each in state.items())
    ):
        raise UserError(
            f"{path}: no dictionary of tensors, nor one under {' or '.join(WRAPPERS)}; give a checkpoint that holds a model"
        )
    beside = sorted(str(each) for each in content if each != key) if key else []
    expanded = sorted(name for name, each in state.items() if each.nbytes > each.untyped_storage().nbytes())
    if expanded:
        raise UserError(
            f"{path}: {listed(expanded)} are larger than what the file holds of them; it is no trainer's"
        )
    ignored = [f"the keys {listed(beside)}"] if beside else []
    first, last = (name.split(".")[:-1] for name in (min(state), max(state)))
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    prefix = "".join(f"{part}." for part, _ in shared)
    if prefix:
        state = {name.removeprefix(prefix): each for name, each in state.items()}
        ignored.append(f"the prefix {prefix} of every name")
    if ignored:
        # From this line, whoever reads the file: a warning of one text and place is shown once.
        warnings.warn(f"{path}: ignored {' and '.join(ignored)}", RuntimeWarning, stacklevel=1)
    return state


def take(
    path: Path, found: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(tensors under our names, leftovers under theirs) of `found`; floats become fp32, which loses nothing.

    names: ours -> theirs. Every key must be in the map, a copy of a tied tensor, a buffer of positions, or have a known
    `keymaps.reason`; UserError lists keys that are not, and names that are missing.
    """
    rest = dict(found)
    missing = sorted(theirs for theirs in set(names.values()) if theirs not in rest)
    if missing:
        raise UserError(f"{path}: {len(missing)} tensors missing: {listed(missing)}; the file is not whole")
    state = {}
    for ours, theirs in names.items():
        tensor = rest[theirs]
        state[ours] = tensor.float() if tensor.is_floating_point() else tensor
    for theirs in set(names.values()):
        del rest[theirs]
    for copied, main in TIED.items():
        copy = rest.pop(copied, None)
        if copy is not None and (main not in found or not torch.equal(copy, found[main])):
            raise UserError(f"{path}: {copied} is not {main}, which it is tied to in every BLIP")
    for buffer in POSITION_IDS:
        counted = rest.pop(buffer, None)
        if counted is not None and not torch.equal(counted.flatten(), torch.arange(counted.numel())):
            raise UserError(
                f"{path}: {buffer} does not count 0, 1, 2, ...: no BLIP reads positions in that order"
            )
    leftovers = {name: rest.pop(name) for name in sorted(rest) if reason(name)}
    if rest:
        raise UserError(
            f"{path}: {len(rest)} tensors that no BLIP of this kind has: {listed(sorted(rest))}; "
            "remove them from the file if they are not needed"
        )
    return state, leftovers


def assemble(path: Path, config: Shape, state: dict[str, Tensor]) -> Model:
    """A model of `config` in evaluation mode that owns `state`; UserError as `weights.fill`."""
    with torch.device("meta"):
        model = build(config)
    fill(path, model, state)
    for module in model.modules():
        constants = getattr(module, "set_normalisation", None)
        if constants is not None:
            constants()
    return model.eval()


def resized(path: Path, config: Shape, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the position embedding at the config's grid: the one tensor that may have another shape in a file."""
    name = "visual_encoder.pos_embed"
    try:
        return {**state, name: resize_position_embedding(state[name], config.vision.grid)}
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def halved(model: Blip, half: str) -> Blip:
    """The captioner or the filter inside a model of both, its tensors the same objects; UserError where it has none."""
    model.require(half)
    if model.config.half == half:
        return model
    config = dataclasses.replace(model.config, half=half)
    with torch.device("meta"):
        wanted = Blip(config).state_dict().keys()
    made = assemble(Path(half), config, {k: v for k, v in model.state_dict().items() if k in wanted})
    assert isinstance(made, Blip)
    return made


# What has no home in a layout goes into two files beside it.


def settings_of(config: Shape, names: tuple[str, ...]) -> dict[str, Any]:
    """The named fields of the config ("vision.heads"), those it has."""
    flat = flatten(config)
    return {name: flat[name] for name in names if name in flat}


def with_settings(path: Path, config: S, names: tuple[str, ...], settings: Mapping[str, Any]) -> S:
    """`config` with those of `settings` that are in `names`; UserError for others, and for values that do not fit."""
    stray = sorted(set(settings) - set(names))
    if stray:
        raise UserError(
            f"{path}: fields {listed(stray)} are decided by the checkpoint itself; remove them there"
        )
    values = config.to_dict()
    for name, value in settings.items():
        group, _, leaf = name.rpartition(".")
        (values[group] if group else values)[leaf] = value
    try:
        return type(config).from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def flatten(config: Shape) -> dict[str, Any]:
    """The config's fields by dotted name."""
    flat: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        flat |= (
            {f"{name}.{leaf}": each for leaf, each in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
    return flat


def write_beside(
    directory: Path,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    rest: Mapping[str, Tensor],
    cleaning: Mapping[str, str],
) -> None:
    """Writes capfilt.json, and leftovers.safetensors where there are any. cleaning: what `remember` gives."""
    content = {
        "capfilt_version": capfilt.__version__,
        "settings": dict(settings),
        "extra": dict(extra),
        **cleaning,
    }
    (directory / SETTINGS).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if rest:
        write_leftovers(directory, rest)


def write_leftovers(directory: Path, rest: Mapping[str, Tensor]) -> None:
    """Writes leftovers.safetensors. Tensors that share memory, which such a file cannot have, are copied."""
    write_safetensors(directory / LEFTOVERS, {name: each.clone() for name, each in rest.items()})


def read_beside(directory: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """(settings, extra, leftovers) of the directory; all empty where a checkpoint was not written by capfilt."""
    settings, extra = read_settings(directory)
    path = directory / LEFTOVERS
    rest = read_safetensors(path) if path.is_file() else {}
    unknown = sorted(name for name in rest if name != "temp" and reason(name) is None)
    if unknown:
        raise UserError(f"{path}: {len(unknown)} tensors of unknown use: {listed(unknown)}; remove the file")
    return settings, extra, rest


def remember(model: Model, tokenizer: Encodes) -> dict[str, str]:
    """The fields by which a checkpoint tells how its texts are cleaned: none where there has been but one way."""
    return {} if kind_of(model).cleaning == BLIP else {"cleaning": tokenizer.cleaning}


def read_cleaning(directory: Path) -> str | None:
    """How texts are to be cleaned, as capfilt.json says; None where it does not, or is not there."""
    path = directory / SETTINGS
    return remembered(path, read_json(path)) if path.is_file() else None


def remembered(path: Path, content: Mapping[str, Any]) -> str | None:
    """The `cleaning` that a file's content names, None where it names none; UserError for one that is unknown here."""
    name = content.get("cleaning")
    if name is None or (isinstance(name, str) and name in CLEANINGS):
        return name
    raise UserError(f"{path}: cleaning {name!r} is unknown: {', '.join(CLEANINGS)} are known")


def cleaning_of(model: Model, extra: Mapping[str, Any], name: str | None) -> str:
    """How texts are cleaned for a checkpoint that remembers `name`.

    One from before it was remembered is cleaned as its family's released code does, or if capfilt trained it (`extra` has the
    stage), as capfilt did then: all families' texts by BLIP's rule, CLIP's unrepaired.
    """
    kind = kind_of(model)
    if name is not None or "stage" not in extra:
        return name or kind.cleaning
    return CLIP_UNREPAIRED if kind.cleaning == CLIP else BLIP


def read_settings(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(settings, extra) of capfilt.json; both empty where there is none."""
    if not (directory / SETTINGS).is_file():
        return {}, {}
    content = read_json(directory / SETTINGS)
    settings, extra = content.get("settings"), content.get("extra")
    if not isinstance(settings, dict) or not isinstance(extra, dict):
        raise UserError(f"{directory / SETTINGS}: fields 'settings' and 'extra' are missing; remove the file")
    return settings, extra


def architecture(path: Path, content: Mapping[str, Any], classes: Collection[str]) -> str:
    """The first of a config's `architectures` that is one of `classes`. UserError naming the file where none is."""
    named = content.get("architectures")
    found = (
        (each for each in named if isinstance(each, str) and each in classes)
        if isinstance(named, list)
        else ()
    )
    kind = next(iter(found), None)
    if kind is None:
        raise UserError(f"{path}: architectures {named!r} is none of {', '.join(classes)}")
    return kind


def refuse_trunk(config: Shape, layout: str) -> None:
    """UserError where pictures are seen through a pretrained trunk, which has no home in `layout`."""
    if config.vision.trunk:
        raise NoHome(
            f"vision.trunk {config.vision.trunk!r} has no home in {layout}, whose tower is a ViT",
            "a --preset other than trunk",
        )


def refuse_convolutions(config: Shape, layout: str) -> None:
    """UserError where the vision tower is none of the published ViTs, which alone have a home in `layout`."""
    refuse_trunk(config, layout)
    if config.vision.stem != "patch":
        raise NoHome(
            f"vision.stem {config.vision.stem!r} has no home in {layout}: only 'patch' has", "--stem patch"
        )
