"""Tensors by name: read from files, compared with what a model expects, put into it. Nothing here runs code from a file.

Which name means what in another project's layout is a family's `layouts.py`.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from capfilt.data.tokenizer import read_text
from capfilt.errors import RunError, UserError

SHOWN = 5


_MOST_HEADER = 16 * 2**20
"""Bytes of a safetensors file that name its tensors: a thousand take 100,000."""


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, a shared one once, under the first name it has."""
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; UserError naming it where it cannot be read."""
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > _MOST_HEADER:
            raise UserError(
                f"{path}: a header of {header:,} bytes, as no model has; was it downloaded whole?"
            )
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error})".splitlines()[0]) from error


def write_safetensors(
    path: Path, found: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, from whatever device, readable to whom the umask says. RunError where the disk refuses."""
    # The library's own file would be its owner's alone.
    path.touch()
    mode = path.stat().st_mode
    tensors = {name: each.detach().cpu().contiguous() for name, each in found.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise RunError(f"{path}: cannot be written ({error}); free space and run again") from error
    path.chmod(mode)


def read_pickled(path: Path, mapped: bool = False) -> Any:
    """What torch.save wrote, read with `weights_only=True`: tensors, numbers, strings and containers of them.

    `mapped` leaves the tensors in the file until they are touched. UserError for anything else a pickle may hold.
    """
    try:
        _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except RuntimeError as error:
        # Files from before torch 1.6 are no archives, and cannot be mapped.
        if mapped and "mmap" in str(error):
            return read_pickled(path)
        # Of a file that is no pickle some of these say no more than the byte they met.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not a readable torch file ({reason}); was it downloaded whole?") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: holds objects besides tensors, which are not loaded; where you trust it, save its tensors alone"
        ) from error
    except (OSError, EOFError, ValueError, KeyError, IndexError, AttributeError, zipfile.BadZipFile) as error:
        # Of a file that is no pickle some of these say no more than the byte they met.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path}: not a readable torch file ({reason}); was it downloaded whole?") from error


def _check_archive(path: Path) -> None:
    """UserError for an archive that unpacks to more than it is: torch stores its tensors as they are."""
    held = archive_members(path)
    if any(each.compress_type for each in held) or sum(each.file_size for each in held) > path.stat().st_size:
        raise UserError(
            f"{path}: a packed archive, as torch writes none; save its tensors again with torch.save"
        )


def archive_members(path: Path) -> list[zipfile.ZipInfo]:
    """The content of a torch archive; empty where the file is none. UserError for one that is broken."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path}: not a readable torch file ({error}); was it downloaded whole?") from error


def listed(names: list[str]) -> str:
    """A few of the names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more}"


def check_tensors(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """UserError naming `path` and listing what is missing, unexpected, of another shape or not finite; else nothing."""
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
            faults.append(f"{len(names)} tensors {kind}: {listed(names)}")
    broken = [name for name in sorted(set(expected) & set(found)) if not _finite(found[name])]
    if broken:
        faults.append(
            f"{len(broken)} tensors with values that are no finite numbers: {listed(broken)}; train it anew"
        )
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")


def _finite(tensor: Tensor) -> bool:
    """Whether all values are numbers: one pass, and no copy, over weights of gigabytes."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def fill(path: Path, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Makes the tensors of `state` the model's own; a shared one may come under each of its names, or under one.

    UserError naming `path` where two names of one shared tensor hold different values, or `check_tensors` objects.
    """
    first: dict[int, str] = {}
    unique: dict[str, Tensor] = {}
    rest = dict(state)
    differing = []
    for name, tensor in model.state_dict(keep_vars=True).items():
        main = first.setdefault(id(tensor), name)
        if name not in rest:
            continue
        given = rest.pop(name)
        if main not in unique:
            unique[main] = given
        elif not torch.equal(unique[main], given):
            differing.append(f"{name} and {main}")
    if differing:
        raise UserError(
            f"{path}: {len(differing)} tensors that this model shares differ: {listed(differing)}; "
            "they belong to two models"
        )
    check_tensors(path, tensors(model), {**unique, **rest})
    model.load_state_dict(
        {name: aligned(tensor) for name, tensor in unique.items()}, strict=False, assign=True
    )


ALIGNMENT = 64
"""Bytes: where torch's own tensors start, and the width of a processor's widest registers."""


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where its memory starts elsewhere than torch's own do.

    A file's tensors lie where they lie in it, and some processors' kernels add in another order there: the loaded model would
    differ from the saved one in its last digit.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@torch.no_grad()
def start_from(model: nn.Module, state: Mapping[str, Tensor], new: Callable[[str], bool]) -> None:
    """Copies `state` into the model's tensors of the same names; the rest, which must all be `new`, stay as they are.

    ValueError where a tensor is neither given nor new, or is given and has no place.
    """
    own = model.state_dict(keep_vars=True)
    lost = sorted(set(state) - set(own)) + sorted(name for name in own if name not in state and not new(name))
    if lost:
        raise ValueError(f"{len(lost)} tensors have no start or no place: {listed(lost)}")
    for name, tensor in state.items():
        own[name].copy_(tensor)


MOST_CONFIG = 2**22
"""Bytes of a config, with the names of a hundred thousand classes."""


def read_json(path: Path, most: int = MOST_CONFIG) -> dict[str, Any]:
    """The object in a JSON file of at most so many bytes; UserError naming it where it is missing or none."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = json.loads(read_text(path, most))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a JSON file ({error})".splitlines()[0]) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
