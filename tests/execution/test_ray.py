"""Catches a Ray run that loses a shard with its worker, retries for ever, or turns a clear error into a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.loopback import UNAVAILABLE

HERE = Path(__file__).resolve()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    process = subprocess.run(
        [sys.executable, str(HERE.parents[1] / "loopback.py"), sys.executable, str(HERE.parent / "ray_run.py"), str(root)],
        capture_output=True, text=True, timeout=900, cwd=HERE.parents[2],
    )  # fmt: skip
    if process.returncode == UNAVAILABLE:
        pytest.skip(process.stderr.strip())
    found = {}
    for line in process.stdout.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    assert process.returncode == 0, process.stderr[-3000:]
    return found


def test_all_shards_are_committed_once(results):
    assert results["plain"]["rows"] == 300
    assert results["plain"]["now"] == 6
    assert results["again"] == {"rows": 300, "now": 0, "figures": {}}


def test_a_shard_whose_worker_is_killed_is_done_by_another(results):
    assert results["killed"]["rows"] == 300


def test_a_shard_that_kills_every_worker_ends_the_run_and_the_rest_stands(results):
    assert results["hopeless"]["error"] == "RunError"
    assert "shard 00002" in results["hopeless"]["message"]
    assert 2 not in results["hopeless"]["shards"]


def test_errors_come_through_as_one_line(results):
    assert results["bug"]["error"] == "RunError"
    assert "rows, shard 00003: ValueError: a bug" in results["bug"]["message"]
    assert results["setup"]["error"] == "UserError"
    assert results["setup"]["message"] == "the checkpoint is not there"


def test_another_ray_on_the_machine_is_left_alone(results):
    assert results["own"] == 1


def test_a_piece_of_work_has_the_node_s_processors(results):
    assert results["steps"]["figures"]["threads"] >= 1
    assert results["steps"]["now"] == 1


def test_workers_find_plug_ins_by_their_name(results):
    captions, judged, texts, values = results["plugins"]
    assert captions == {"rows": 7, "now": 2, "figures": {}}
    assert judged == {"rows": 14, "now": 2, "figures": {}}
    assert set(texts) == {"a red square", "a green square", "a blue square"}
    assert all(0 <= value <= 1 for value in values)


def test_stages_that_run_together_overlap(results):
    one, two, rows = results["together"]
    assert one["figures"] == two["figures"]
    assert one["figures"]["threads"] >= 1
    assert rows["rows"] == 300


def test_one_that_fails_stops_those_beside_it(results):
    lonely, fails = results["stopped"]
    assert fails["message"] == "the machine is on fire"
    assert lonely["message"].startswith("meets: stopped with the others")
