"""Run by test_contrast.py as one of several processes: argv is rank, world, port, directory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from capfilt.models.ranks import Ranks
from tests.models.test_contrast import batch_of, trained


def write_gradients(rank: int, world: int, directory: Path) -> None:
    for loss in ("softmax", "sigmoid"):
        module = trained(loss, Ranks(rank, world, dist.group.WORLD))
        # Ranks of unequal size.
        rows = slice(0, 5) if rank == 0 else slice(5, 8)
        made = module.losses(batch_of(rows))
        made["loss"].backward()
        found = {"loss": made["loss"].detach()}
        for name, parameter in module.named_parameters():
            found[name] = parameter.grad.clone()
        for tensor in found.values():
            dist.all_reduce(tensor)
            tensor /= world
        if rank == 0:
            torch.save(found, directory / f"{loss}.pt")


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # In a function: a global that still holds the group when the interpreter ends is destroyed too late, and gloo's
    # threads then abort the process.
    write_gradients(rank, world, Path(sys.argv[4]))
    dist.destroy_process_group()
