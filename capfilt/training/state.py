"""The state of an interrupted training run: one safetensors file, published atomically, that never holds a pickle and
carries the digest of its bytes.

Weights, buffers, optimiser moments and random states are the file's tensors, everything else is JSON in its header.
What a finished model is saved as is `capfilt.models.checkpoint`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from capfilt.errors import RunError, UserError
from capfilt.models.common.ranks import ALONE, Ranks
from capfilt.models.common.weights import write_safetensors
from capfilt.tables.sealed import SEAL, UNSEALED, intact, seal_file
from capfilt.training.optim import AdamW

_HEADER, _OLDER = "capfilt_sealed_training_state", "capfilt_training_state"
"""Where the JSON stands in a file that carries its digest, and in files from before they did."""


def write(path: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
    """Replaces `path` by these tensors and JSON-able values: whole or not at all, also across a power cut."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(part, tensors, {_HEADER: json.dumps(values), SEAL: UNSEALED})
        seal_file(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except (OSError, RunError) as error:
        part.unlink(missing_ok=True)
        raise RunError(f"the training state could not be written to {path}: {error}") from error


def write_newest(
    path: Path, step: int, tensors: Mapping[str, Tensor], values: Mapping[str, Any], keep: int = 1
) -> None:
    """`write`, with the states before it kept: `path` is always the newest, and with `keep` above 1 the newest `keep`
    also stand beside it as STEM-STEP (state-00000500.safetensors), the newest under both names.

    To go back to an older one, rename it to `path`: the run then continues from there. Numbered states of later steps
    are removed, since they are of a future that is being made again.
    """
    if keep <= 1:
        write(path, tensors, values)
        return
    numbered = path.with_name(f"{path.stem}-{step:08d}{path.suffix}")
    write(numbered, tensors, values)
    link = path.with_name(path.name + ".part")
    try:
        link.unlink(missing_ok=True)
        os.link(numbered, link)
        os.replace(link, path)
    except OSError as error:
        raise RunError(f"the training state could not be written to {path}: {error}") from error
    past = [each for each in kept(path) if each.name <= numbered.name]
    for each in {*kept(path)} - {*past[-keep:]}:
        each.unlink(missing_ok=True)


def kept(path: Path) -> list[Path]:
    """The numbered states beside `path`, in order of their steps."""
    return sorted(path.parent.glob(f"{path.stem}-{'[0-9]' * 8}{path.suffix}"))


def remove(path: Path) -> None:
    """Deletes the numbered states, a torn one and, last, the newest, where there are any: the finished model is safe."""
    for each in (*kept(path), path.with_name(path.name + ".part"), path):
        each.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and values that `write` wrote.

    Raises UserError when the file is something else, or any byte of it has changed.
    """
    try:
        header = check(path)
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(header)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error


def check(path: Path) -> str:
    """The JSON of a state, none of whose bytes has changed. UserError otherwise, as `read`; tensors are not held."""
    try:
        whole = intact(path)
        if whole is False:
            raise UserError(
                f"{path}: damaged since it was written (its digest differs): restore it, or delete it to start over"
            )
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_HEADER if whole else _OLDER)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unreadable(path, error) from error
    if header is None:
        raise UserError(f"{path} is no training state: name another file, or delete it to start over")
    return str(header)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} cannot be read as a training state ({error}): delete it to start over")


def capture(module: nn.Module, optimizer: AdamW) -> dict[str, Tensor]:
    """Everything of `module` and of the optimiser; the tensors themselves, not copies."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    # keep_vars: without it, modules that share a parameter give two tensors over one memory, which safetensors refuses.
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"module.{name}"] = tensor
    tensors.update({f"optimizer.{name}": tensor for name, tensor in optimizer.state_dict().items()})
    return tensors


def restore_module(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `capture` found back into a module built alike. UserError when it is not."""
    own = module.state_dict(keep_vars=True)
    canonical: dict[int, str] = {}
    for name, tensor in own.items():
        canonical.setdefault(id(tensor), name)
    wanted = {f"module.{name}" for name in canonical.values()}
    stored = {name for name in tensors if name.startswith("module.")}
    if wanted != stored:
        raise UserError(
            f"the training state is another model's: {min(wanted ^ stored)} is in one of them only"
        )
    try:
        module.load_state_dict(
            {name: tensors[f"module.{canonical[id(tensor)]}"] for name, tensor in own.items()}
        )
    except RuntimeError as error:
        raise UserError(f"the training state is another model's: {' '.join(str(error).split())}") from error


def restore_optimizer(optimizer: AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Puts what `capture` found back into an optimiser of the same parameters."""
    prefix = "optimizer."
    optimizer.load_state_dict(
        {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
    )


def capture_random(device: torch.device, ranks: Ranks = ALONE) -> dict[str, Tensor]:
    """torch's random states, of all ranks, which ask together: rank 0's as those of a run alone."""
    tensors = {}
    for kind, mine in _random_states(device).items():
        # Through the device: not every way between ranks starts at the processor.
        for rank, each in enumerate(ranks.stack(mine.to(device)).cpu()):
            tensors[_random_name(kind, rank)] = each
    return tensors


def restore_random(
    tensors: Mapping[str, Tensor], device: torch.device, ranks: Ranks = ALONE, seed: int = 0
) -> None:
    """The inverse of `capture_random`; a rank that was not there then begins with `seed`."""
    if _random_name("cpu", ranks.rank) not in tensors:
        torch.manual_seed(seed)
        return
    torch.set_rng_state(tensors[_random_name("cpu", ranks.rank)])
    if device.type == "cuda" and _random_name("cuda", ranks.rank) in tensors:
        torch.cuda.set_rng_state(tensors[_random_name("cuda", ranks.rank)], device)


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _random_name(kind: str, rank: int) -> str:
    return f"random.{kind}.{rank}" if rank or kind == "cuda" else f"random.{kind}"
