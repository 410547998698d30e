"""The tensors of somebody else's files: one file, or shards with their index; safetensors, or pickled and `weights_only`.

A trainer's wrapping is taken off, and a warning says what was left out. Nothing here runs code from a file.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from capfilt.errors import UserError
from capfilt.models.common.weights import archive_members, listed, read_json, read_pickled, read_safetensors

WEIGHTS, PICKLED = "model.safetensors", "pytorch_model.bin"
"""What transformers calls the file in a directory."""
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
"""Keys under which trainers save a model's tensors: BLIP's, ALBEF's and LAVIS's code, Lightning and open_clip, plain PyTorch,
DeepSpeed."""


def read_tensors(place: Path, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a file, or of a transformers directory. UserError where there is anything else.

    mapped: pickled tensors stay in the file until they are touched. An index is somebody else's: it names files of its own
    directory, by their bare names, and nothing outside.
    """
    index, *files = weights_files(place)
    if not files:
        return unwrapped(index, _tensors(index, mapped))
    found: dict[str, Tensor] = {}
    for path in files:
        shard = _tensors(path, mapped)
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


def weights_files(place: Path) -> list[Path]:
    """The file of the weights, which `place` may be; or an index, and the shards that it names. UserError for none."""
    if place.is_file():
        return [place]
    for name in (WEIGHTS, PICKLED):
        if (place / name).is_file():
            return [place / name]
        index = place / f"{name}.index.json"
        if index.is_file():
            names = sorted(set(_map(index).values()))
            outside = [
                each for each in names if Path(each).name != each or Path(each).suffix != Path(name).suffix
            ]
            if outside:
                raise UserError(f"{index}: {outside[0]!r} is no name of a {Path(name).suffix} file beside it")
            return [index, *(place / each for each in names)]
    raise UserError(
        f"{place / WEIGHTS}: no such file, nor {WEIGHTS}.index.json; save with transformers' save_pretrained"
    )


def _map(index: Path) -> dict[str, str]:
    """Which file of shards each tensor is in."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(each, str) for each in found.values()):
        raise UserError(f"{index}: 'weight_map' is no table of files; take the checkpoint from its source")
    return found


def _tensors(path: Path, mapped: bool) -> Any:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    # TorchScript: torch's own archives have no constants.
    if any(each.filename.endswith("/constants.pkl") for each in archive_members(path)):
        raise UserError(
            f"{path}: a TorchScript archive, as OpenAI's downloads are: it holds a program, which is not run. Where you "
            "trust it, save its tensors alone: torch.save(torch.jit.load(path).state_dict(), 'clip.pt')"
        )
    return read_pickled(path, mapped)


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
