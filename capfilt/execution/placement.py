"""How many workers share a cluster's nodes, and how large each may be: arithmetic, without Ray.

A worker runs on one node, so its size follows from what nodes have, never from the sum over the cluster.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Node = tuple[float, float]
"""A node: its processors and GPUs."""

_GRAIN = 10_000
"""Ray counts resources in parts of this."""


@dataclass(frozen=True)
class Size:
    """So many workers with so many processors each, and with a GPU of its own each or without."""

    workers: int
    cpus: float
    gpu: bool

    def __str__(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers:,} workers"
        cpus = "1 processor" if self.cpus == 1 else f"{self.cpus:g} processors"
        return f"{workers} with {cpus}{' and a GPU' if self.gpu else ''}{' each' if self.workers > 1 else ''}"


def seats(nodes: Iterable[Node], cpus: float, gpu: bool) -> int:
    """How many workers with so many processors each the nodes hold at once."""
    held = ((int(have / cpus + 1e-9), int(gpus)) for have, gpus in nodes)
    return sum(min(count, gpus) if gpu else count for count, gpus in held)


def room(nodes: Iterable[Node], ranks: int, gpu: bool) -> float:
    """The most processors that each of `ranks` can have, each on one node and with a GPU of its own where `gpu`.

    Returns 0 where the nodes have no room for so many. Above 1 Ray takes whole processors only.
    """
    alike = Counter(nodes)
    shares = {_share(cpus, ways) for cpus, _ in alike for ways in range(1, ranks + 1)} - {0.0}
    for share in sorted(shares, reverse=True):
        if sum(count * seats([node], share, gpu) for node, count in alike.items()) >= ranks:
            return share
    return 0.0


def crew(nodes: Iterable[Node], most: int, gpu: bool, ways: int = 1) -> Size | None:
    """The workers that share a stage's shards, at most `most`, where `ways` stages share the cluster.

    Workers with a GPU take half of the processors: stages that need none run beside them. Returns None where no node
    can hold a worker.
    """
    parts = 2 * ways if gpu else ways
    mine = [(cpus / parts, gpus) for cpus, gpus in nodes if cpus > 0]
    total = sum(int(gpus) for _, gpus in mine) // ways if gpu else int(sum(cpus for cpus, _ in mine) + 1e-9)
    workers = min(most, max(1, total))
    cpus = room(mine, workers, gpu)
    return Size(workers, cpus, gpu) if cpus else None


def _share(cpus: float, ways: int) -> float:
    """One of `ways` shares, rounded down to what Ray can count: the sum of rounded-up shares would not fit."""
    share = cpus / ways
    return float(int(share)) if share >= 1 else math.floor(share * _GRAIN + 1e-9) / _GRAIN
