"""Bugs caught here: TensorBoard curves that are not the log's, or that keep steps a resumed run took back; a missing
package found out after hours of training; a module loaded by those who did not ask for it.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from capfilt.training import log
from tests.refusals import refused


def scalars(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return {
        name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]
    }


def test_tensorboard_has_every_figure_of_the_log_and_forgets_what_a_resumed_run_repeats(tmp_path):
    place, path = tmp_path / "tensorboard", tmp_path / "log.jsonl"
    first = log.Log(path, 0, place)
    for step in (10, 20, 30):
        first.write({"step": step, "itm": 0.5 + step, "lr": 1e-3})
    first.close()
    resumed = log.Log(path, 20, place)
    for step in (30, 40):
        resumed.write({"step": step, "itm": 1.5 + step, "lr": 1e-3})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = scalars(place)
    assert set(found) == {"itm", "lr"}
    for name, points in found.items():
        assert [step for step, _ in points] == [10, 20, 30, 40]
        assert [value for _, value in points] == pytest.approx([line[name] for line in lines])


def test_a_missing_package_is_one_line_with_the_remedy_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with refused("capfilt[tensorboard]"):
        log.Log(None, 0, tmp_path / "tensorboard")
    assert not list(tmp_path.iterdir())


def test_nobody_loads_tensorboard_who_did_not_ask(tmp_path):
    script = f"""
import sys
from pathlib import Path
from capfilt.training import log
log.Log(Path({str(tmp_path / "log.jsonl")!r}), 0).write({{"step": 1, "itm": 0.5}})
assert not any(name.split(".")[0] == "tensorboard" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)
