"""Catches: ranks that ask every node for the cluster's average of processors, and wait for ever where one has fewer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from capfilt.errors import UserError
from capfilt.execution import ray as execution


@pytest.mark.parametrize(
    ("nodes", "ranks", "gpu", "cpus"),
    [
        ([(64, 8), (4, 8)], 16, True, 0.5),
        ([(64, 8), (8, 8)], 16, True, 1),
        ([(64, 8), (64, 8)], 16, True, 8),
        ([(64, 8), (16, 2)], 10, True, 8),
        ([(1, 0), (1, 0), (4, 0)], 3, False, 1),
        ([(2, 0)], 4, False, 0.5),
        ([(0, 0), (32, 4)], 4, True, 8),  # a head node that takes no work
        ([(64, 4), (64, 4)], 9, True, 0),
        ([(0, 8)], 2, True, 0),
        ([(3, 2)], 2, True, 1),
    ],
)
def test_each_rank_has_what_every_node_can_give(nodes, ranks, gpu, cpus):
    assert execution.room(nodes, ranks, gpu) == cpus


def test_ranks_that_no_cluster_can_hold_are_refused_at_once(monkeypatch):
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}},
        {"Alive": False, "Resources": {"GPU": 8.0}},
    ]
    monkeypatch.setattr(
        execution,
        "ray",
        SimpleNamespace(nodes=lambda: nodes, cluster_resources=lambda: {"CPU": 8.0, "GPU": 2.0}),
    )
    stage = SimpleNamespace(name="pretrain", ranks=lambda _gpus: 4)
    with pytest.raises(UserError, match=r"--ranks 4: the cluster's nodes have no room .* GPUs: 8 and 2$"):
        execution.RayExecutor().model(stage, lambda *_: None)
