"""Catches: a GPU's targets held against the wrong batch, a batch that is told as it was asked for though memory halved it,
waiting that counts as computing, transformers in another precision than the engines, a benchmark of pictures that all work.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _stages
import engine
from _form import Record

from capfilt.tables.workspace import Workspace


def test_a_gpus_targets_take_each_side_at_its_best():
    sweep = engine.Sweep(
        {32: 500.0, 256: 1200.0, 512: 1100.0}, {32: 131.0, 256: 350.0}, {32: 200.0, 256: 410.0}
    )
    record = Record()
    sweep.targets("base", record)
    found = {name: (target.value, target.limit) for name, target in record.targets.items()}
    assert found == {
        "base_at_best_images_per_second": (1200.0, 1000.0),
        "base_times_transformers_called_at_32": (1200 / 131, 8.0),
        "base_times_transformers_at_its_best": (1200 / 410, 3.0),
    }
    assert not record.targets["base_times_transformers_at_its_best"].met
    alone = Record()
    engine.Sweep({64: 900.0}).targets("base", alone)
    assert list(alone.targets) == ["base_at_best_images_per_second"]


def test_only_watched_calls_are_busy(monkeypatch):
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Works:
        def passes(self, milliseconds, *, more=0):
            clock[0] += milliseconds + more
            return "done"

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    works, busy = Works(), _stages.Busy()
    busy.watch(works, "passes")
    assert works.passes(250.0) == "done"
    clock[0] += 10_000
    works.passes(500.0, more=250)
    assert busy.seconds == pytest.approx(1.0)


def test_some_pictures_are_broken(tmp_path):
    workspace = Workspace(tmp_path)
    usable = _stages.write_images(workspace, 48, 0)
    data = [
        row["bytes"]
        for shard in (0, 1)
        for row in workspace.part("images", "web").read(shard)["image"].to_pylist()
    ]
    assert sum(len(each) == 300 for each in data) == 48 - usable == 4
    _stages.write_images(Workspace(tmp_path / "few"), 8, 0)


@pytest.mark.slow
def test_quick_speaks_the_form(tmp_path):
    where = tmp_path / "engine.json"
    command = [sys.executable, engine.__file__, "--quick", "--json", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert where.is_file(), done.stderr
    found = json.loads(where.read_text())
    assert found["figures"]["tiny_batch"] == 64
    assert found["figures"]["tiny_stage_caption_batch"] == 64
    assert found["targets"]["tiny_greedy_agreement"]["met"]
