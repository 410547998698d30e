"""Run as one of several processes by what compares ranks with one process: argv is the test module that has CASES, rank,
world, port, directory."""

from __future__ import annotations

import importlib
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from capfilt.models.common.ranks import ALONE, Ranks

ROWS = 8


def gradients_of_two_ranks(module: str, directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By the name of each of the module's CASES: the loss and gradients of two ranks that share its batch of ROWS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", __name__, module, str(rank), "2", str(port), str(directory)],
            cwd=Path(__file__).resolve().parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert all(process.returncode == 0 for process in started), said
    return {file.stem: torch.load(file, weights_only=True) for file in sorted(directory.glob("*.pt"))}


def gradients(case, ranks: Ranks = ALONE, rows: slice = slice(ROWS)) -> dict[str, torch.Tensor]:
    """The loss and gradients of these rows of a case, which is (trainer of ranks, batch of rows)."""
    trained, batch_of = case
    torch.manual_seed(2)
    module = trained(ranks)
    made = module.losses(batch_of(rows))
    made["loss"].backward()
    named = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
    return {"loss": made["loss"].detach(), **named}


def write_gradients(cases: dict, rank: int, world: int, directory: Path) -> None:
    for name, case in cases.items():
        # Ranks of unequal size.
        rows = slice(0, 5) if rank == 0 else slice(5, ROWS)
        found = gradients(case, Ranks(rank, world, dist.group.WORLD), rows)
        for tensor in found.values():
            dist.all_reduce(tensor)
            tensor /= world
        if rank == 0:
            torch.save(found, directory / f"{name}.pt")


if __name__ == "__main__":
    rank, world, port = map(int, sys.argv[2:5])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    # In a function: a global that still holds the group when the interpreter ends is destroyed too late, and gloo's
    # threads then abort the process.
    write_gradients(importlib.import_module(sys.argv[1]).CASES, rank, world, Path(sys.argv[5]))
    dist.destroy_process_group()
