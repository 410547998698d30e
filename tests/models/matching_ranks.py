"""Run by test_matching.py as one of several processes: argv is rank, world, port, directory."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from capfilt.models.common.ranks import Ranks
from tests.models.test_matching import batch_of, trained


def write_losses(rank: int, world: int, directory: Path) -> None:
    module = trained(Ranks(rank, world, dist.group.WORLD))
    torch.manual_seed(rank)
    # Ranks of unequal size.
    made = module.losses(batch_of(slice(0, 5) if rank == 0 else slice(5, 8)))
    found = {name: made[name].detach() for name in ("loss", "itm", "wpa", "mlm")}
    for tensor in found.values():
        dist.all_reduce(tensor)
        tensor /= world
    if rank == 0:
        torch.save(found, directory / "losses.pt")


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # In a function: a global that still holds the group when the interpreter ends is destroyed too late, and gloo's
    # threads then abort the process.
    write_losses(rank, world, Path(sys.argv[4]))
    dist.destroy_process_group()
