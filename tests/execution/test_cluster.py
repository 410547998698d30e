"""Catches a run on a cluster that asks for more than any node has and waits for ever, is lost with a node or with a worker, or
waits without a word; and a capfilt that does not start as a Ray job.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback import UNAVAILABLE
from tests.refusals import names

ROOT = Path(__file__).resolve().parents[2]


def of_a_cluster(root, *arguments):
    """What came of runs on two nodes with two processors each, each a raylet of its own, on the loopback."""
    # Ray's own defaults suit long runs: workers of low priority, a look at nodes every three seconds.
    quick = {
        "RAY_worker_niceness": "0",
        "RAY_health_check_period_ms": "200",
        "RAY_health_check_initial_delay_ms": "0",
    }
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "of-the-cluster"}
    script = [str(ROOT / "tests" / "execution" / "cluster_run.py"), str(root), *arguments]
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "loopback.py"), sys.executable, *script],
        capture_output=True, text=True, timeout=900, cwd=ROOT,
        env={**os.environ, **quick, **token, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    if process.returncode == UNAVAILABLE:
        pytest.skip(process.stderr.strip())
    assert process.returncode == 0, process.stderr[-3000:]
    results = {}
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return of_a_cluster(tmp_path_factory.mktemp("cluster"))


def tried_again(run):
    return [line for line in run["said"] if "tried again" in line]


def test_one_shard_that_is_left_gets_a_node_and_not_the_cluster(found):
    # It asked for four processors, which neither node has.
    assert found["one_left"]["ids"] == ["0-2"]
    assert not tried_again(found["one_left"])


def test_a_killed_worker_costs_a_line_and_no_row(found):
    run = found["worker_killed"]
    assert tried_again(run) == ["rows: shard 00001 is tried again: its worker or node died"]
    assert run["ids"] == ["0-1", "1-1", "2-1"]


def test_a_killed_node_costs_a_line_per_shard_on_it_and_no_row(found):
    run = found["node_killed"]
    again = tried_again(run)
    assert len(again) == 2
    assert all(
        re.fullmatch(r"rows: shard 0000\d is tried again: its worker or node died", line) for line in again
    )
    assert run["ids"] == [f"{shard}-1" for shard in range(5)]


def test_a_piece_of_work_whose_node_is_killed_fits_itself_to_those_that_are_left(found):
    # It had the three processors of a node that is gone.
    run = found["piece_killed"]
    assert tried_again(run) == ["piece: tried again from its last state: its worker or node died"]
    assert run["figures"] == {"threads": 2}


def test_a_worker_that_waits_for_a_node_that_is_killed_fits_itself_to_those_that_are_left(found):
    run = found["waits"]
    assert names(run["said"][0], "rows", "1 worker", "3 processors")
    assert run["ids"] == ["0-2"]


def test_what_no_node_can_hold_is_refused_unless_an_autoscaler_may_add_one(found):
    refused, said = found["scaled"]
    assert names(refused, "--ranks 9", "(2, 0)")
    assert names(said, "pretrain", "9 workers", "autoscaler")


def test_capfilt_runs_as_a_ray_job(found):
    code, out, _ = found["submitted"]
    assert code == 0
    assert "duplicates" in out
    assert "7 in = " in out


@pytest.mark.slow  # Ray Train starts, and starts again
def test_ranks_that_lost_their_node_end_where_the_others_have_no_room(tmp_path):
    run = of_a_cluster(tmp_path, "ranks")["ranks_killed"]
    assert run["error"] == "RunError"
    assert names(run["message"], "piece", "2 workers", "(2, 0)", "--ranks")
