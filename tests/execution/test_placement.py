"""Catches workers sized by the cluster's total, which wait for ever where no node has so much, and nodes that stay idle
because workers were sized by another node; shares that do not fit because they were rounded up.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capfilt.execution.placement import Size, crew, room, seats

CPU_NODES = [(64, 0)] * 8


@pytest.mark.parametrize(
    ("nodes", "most", "gpu", "ways", "size"),
    [
        # Two nodes of two with a shard left asked for 4 processors; ten of 64 with eight left for 80.
        ([(2, 0), (2, 0)], 1, False, 1, Size(1, 2, False)),
        ([(64, 0)] * 10, 8, False, 1, Size(8, 64, False)),
        # One GPU node among eight without: workers of 36 processors, two of eight GPUs at work.
        ([(64, 8), *CPU_NODES], 1000, True, 1, Size(8, 4, True)),
        # More of the kind: a large and a small node, an odd shard, a head that takes no work, GPUs without processors.
        ([(64, 0), (4, 0)], 3, False, 1, Size(3, 21, False)),
        ([(64, 0), (4, 0)], 1000, False, 1, Size(68, 1, False)),
        ([(2, 0)] * 3, 4, False, 1, Size(4, 1, False)),
        ([(0, 0), (2, 0)], 5, False, 1, Size(2, 1, False)),
        ([(0, 8), (16, 2)], 100, True, 1, Size(2, 4, True)),
        ([(8, 1), (64, 8)], 100, True, 1, Size(9, 4, True)),
        ([(1, 8)], 100, True, 1, Size(8, 0.0625, True)),
        ([(0.5, 0)], 7, False, 1, Size(1, 0.5, False)),
        # Stages that share the cluster: a third each; of fewer GPUs than stages one each, for which they queue.
        ([(64, 8)], 100, True, 2, Size(4, 4, True)),
        ([(2, 0)], 100, False, 3, Size(1, 0.6666, False)),
        ([(8, 1)], 100, True, 3, Size(1, 1, True)),
        ([(1, 0)] * 10, 100, False, 2, Size(5, 0.5, False)),
        # Nothing that could hold a worker.
        ([(0, 0), (0, 8)], 1, True, 1, None),
        ([(0, 0)], 1, False, 1, None),
        ([], 1, False, 1, None),
        ([(64, 0)], 1, True, 1, None),
    ],
)
def test_shards_are_shared_by_workers_that_nodes_can_hold(nodes, most, gpu, ways, size):
    assert crew(nodes, most, gpu, ways) == size


NODES = st.lists(
    st.tuples(st.integers(0, 96) | st.sampled_from([0.5, 1.5, 2.25]), st.integers(0, 8)), max_size=6
)


@given(NODES, st.integers(1, 300), st.booleans(), st.integers(1, 4))
def test_the_workers_of_a_stage_fit_at_once(nodes, most, gpu, ways):
    size = crew(nodes, most, gpu, ways)
    usable = [node for node in nodes if node[0] > 0 and (node[1] >= 1 or not gpu)]
    if not usable:
        assert size is None
        return
    assert 1 <= size.workers <= most
    assert size.cpus > 0
    assert seats(nodes, size.cpus, gpu) >= size.workers
    assert size.workers * size.cpus * ways <= sum(cpus for cpus, _ in nodes) + 1e-6


def test_the_arithmetic_is_fast_on_a_large_cluster():
    start = time.process_time()
    assert crew([(64, 0)] * 1500 + [(96, 8)] * 500, 10**6, False) == Size(144_000, 1, False)
    assert crew([(64, 0)] * 1500 + [(96, 8)] * 500, 10**6, True) == Size(4000, 6, True)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("nodes", "ranks", "gpu", "cpus"),
    [
        ([(64, 8), (4, 8)], 16, True, 0.5),
        ([(64, 8), (8, 8)], 16, True, 1),
        ([(64, 8), (64, 8)], 16, True, 8),
        ([(64, 8), (16, 2)], 10, True, 8),
        ([(1, 0), (1, 0), (4, 0)], 3, False, 1),
        ([(2, 0)], 4, False, 0.5),
        ([(2, 0)], 3, False, 0.6666),  # three of Ray's 0.6667 are more than 2
        ([(64, 0), (8, 1)], 1, True, 8),  # the GPU is not on the largest node
        ([(0, 0), (32, 4)], 4, True, 8),  # a head node that takes no work
        ([(64, 4), (64, 4)], 9, True, 0),
        ([(0, 8)], 2, True, 0),
        ([(3, 2)], 2, True, 1),
    ],
)
def test_each_rank_has_what_every_node_can_give(nodes, ranks, gpu, cpus):
    assert room(nodes, ranks, gpu) == cpus


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (Size(1, 1, False), "1 worker with 1 processor"),
        (Size(2, 0.5, True), "2 workers with 0.5 processors and a GPU each"),
        (Size(1200, 8, False), "1,200 workers with 8 processors each"),
    ],
)
def test_a_size_reads_as_a_sentence(size, text):
    assert str(size) == text
