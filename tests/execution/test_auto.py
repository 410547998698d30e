"""Would catch: a Ray that starts for four pictures, a cluster or GPUs that are left idle, a start of Ray without a word."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt.execution import auto
from capfilt.execution.auto import AutoExecutor, wanted
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import executor
from capfilt.tables.shards import Part
from tests.execution.test_inline import Count
from tests.stages.test_base import Trained


class Rows(Count):
    def __init__(self, output, rows, shards=3, model=False, workers=None):
        super().__init__(output, shards)
        self.rows, self.model, self.workers_ = rows, model, workers
        self.uses_gpu, self.rows_per_second = model, 10.0 if model else 2000.0

    def expected_rows(self, shard):
        return self.rows

    def most_workers(self):
        return self.workers_


@pytest.fixture
def machine(monkeypatch):
    """A machine of so many processors and GPUs, with or without Ray."""

    def of(cpus=8, gpus=0, ray=True, **environment):
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(auto, "_cpus", lambda: cpus)
        monkeypatch.setattr(auto, "_gpus", lambda: gpus)
        monkeypatch.setattr(auto, "_can", lambda: ray)

    return of


SMALL, LARGE = {"rows": 40_000}, {"rows": 40_001}


@pytest.mark.parametrize(
    ("there", "stage", "why"),
    [
        ({}, SMALL, ""),
        ({}, LARGE, "count has 3 shards of 120,003 rows, about, to do"),
        ({}, {"rows": 0}, "count has 3 shards to do"),
        ({}, {**LARGE, "shards": 1}, ""),
        ({}, {**LARGE, "workers": 1}, ""),
        ({"cpus": 1}, LARGE, ""),
        ({"ray": False}, LARGE, ""),
        ({"gpus": 4}, SMALL, ""),
        ({}, {"rows": 200, "model": True}, ""),
        ({}, {"rows": 201, "model": True}, "603 rows"),
        ({"gpus": 1}, {"rows": 10**9, "model": True}, ""),
        ({"gpus": 2}, {"rows": 1, "model": True}, "2 GPUs"),
        ({"gpus": 2}, {"rows": 1, "model": True, "shards": 1}, ""),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, SMALL, "RAY_ADDRESS=10.0.0.1:6379"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "ray": False}, SMALL, "RAY_ADDRESS"),
        ({"WORLD_SIZE": "2", "RAY_ADDRESS": "10.0.0.1:6379"}, SMALL, ""),
    ],
)  # fmt: skip
def test_where_a_stage_of_shards_runs(tmp_path, machine, there, stage, why):
    machine(**there)
    made = Rows(Part(tmp_path / "part"), **stage)
    found = wanted(made, made.shards())
    assert why in found
    assert bool(why) == bool(found)


@pytest.mark.parametrize(
    ("there", "ranks", "why"),
    [
        ({}, 1, ""),
        ({"gpus": 1}, 1, ""),
        ({"gpus": 4}, 1, ""),
        ({"gpus": 4}, 4, "4 GPUs"),
        ({"gpus": 0}, 2, ""),
        ({"gpus": 4, "ray": False}, 4, ""),
        ({"RAY_ADDRESS": "auto"}, 1, "RAY_ADDRESS=auto"),
    ],
)
def test_where_one_piece_of_work_runs(tmp_path, machine, there, ranks, why):
    class Piece(Trained):
        def __init__(self):
            pass

        def ranks(self, gpus):
            return ranks

    machine(**there)
    assert why in wanted(Piece())
    assert bool(why) == bool(wanted(Piece()))


@pytest.mark.parametrize(
    ("there", "shared"),
    [
        ({"cpus": 6}, True),
        ({"cpus": 5}, False),
        ({"cpus": 1, "gpus": 2}, True),
        ({"cpus": 6, "ray": False}, False),
    ],
)
def test_where_steps_run_together(machine, there, shared):
    machine(**there)
    assert (AutoExecutor().share(3) is not None) == shared


def test_small_work_starts_no_ray_and_large_work_says_that_it_does(tmp_path):
    """In a process of its own, which no other test's Ray is in."""
    code = """
import sys
from pathlib import Path
from capfilt.execution import auto
from capfilt.execution.run import executor, run_stage
from capfilt.tables.shards import Part
from tests.execution.test_auto import Rows
where = Path(sys.argv[1])
auto._cpus = lambda: 2
with executor("auto") as work:
    run_stage(Rows(Part(where / "small"), 10), work, quiet=True)
    print("ray" in sys.modules)
    for name in ("large", "larger"):
        print(run_stage(Rows(Part(where / name), 10**6), work, quiet=True).done_now)
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120, env=clean,
    )  # fmt: skip
    assert done.stdout.split() == ["False", "3", "3"], done.stderr
    assert done.stderr.count("capfilt: Ray starts on this machine: count has 3 shards of 3,000,000 rows") == 1


def test_the_executor_of_the_name_is_the_one_made():
    assert type(executor("auto")) is AutoExecutor
    assert type(executor("inline")) is InlineExecutor
