"""Bugs caught here: a signal to a training, or to all processes of its terminal, that saves nothing, saves ranks at different
steps, or is answered before the state is whole; a run that goes on from there as another run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from capfilt.training import state
from tests.loopback import UNAVAILABLE

ROOT = Path(__file__).resolve().parents[2]
STEPS = 30


@pytest.fixture(scope="module")
def curves(place):
    """Of uninterrupted runs, by their ranks; started together."""
    running = [start(place, "inline", f"whole{ranks}", ranks) for ranks in (1, 2)]
    assert [finish(process) for process in running] == [0, 0]
    return {ranks: curve(place, f"whole{ranks}") for ranks in (1, 2)}


def start(place, how, out, ranks, saving=0.0):
    """A session of its own, as a terminal's, where only the loopback exists."""
    quick = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_worker_niceness": "0"}
    environment = {
        **os.environ, **quick, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        "SLOW_SAVING": str(saving),
    }  # fmt: skip
    command = (
        str(ROOT / "tests" / "execution" / "interrupted_run.py"),
        str(place.path),
        how,
        out,
        str(ranks),
    )
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "loopback.py"), sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, start_new_session=True,
    )  # fmt: skip


def finish(process):
    _, complained = process.communicate(timeout=300)
    if process.returncode == UNAVAILABLE:
        pytest.skip(complained.strip())
    assert "Traceback" not in complained, complained[-3000:]
    return process.returncode


def until(condition, process):
    deadline = time.monotonic() + 240
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def curve(place, out):
    timings = ("images_per_second", "seconds")
    lines = map(json.loads, (place.model(out) / "log.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in timings} for line in lines]


SLOW = pytest.mark.slow
CASES = [pytest.param("inline", 1, marks=SLOW), ("inline", 2), ("ray", 1), pytest.param("ray", 2, marks=SLOW)]


@pytest.mark.parametrize(("how", "ranks"), CASES)
def test_ctrl_c_in_a_terminal_saves_where_all_are_and_a_rerun_goes_on(place, curves, how, ranks):
    out = f"{how}{ranks}"
    process = start(place, how, out, ranks, saving=2)
    log = place.model(out) / "log.jsonl"
    until(lambda: log.exists() and log.stat().st_size, process)
    # Everyone in the terminal gets it, and a launcher's own forwarding comes on top, while the state is written.
    os.killpg(process.pid, signal.SIGINT)
    until((place.model(out) / "saving").exists, process)
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process) != 0
    _, values = state.read(place.model(out) / "state.safetensors")
    assert 20 <= values["progress"]["step"] < STEPS
    assert finish(start(place, how, out, ranks)) == 0
    assert curve(place, out) == curves[ranks]


@pytest.mark.slow
@pytest.mark.parametrize(("how", "ranks"), [("inline", 2), ("ray", 1)])
def test_sigterm_to_the_process_alone_does_too(place, curves, how, ranks):
    out = f"{how}{ranks}-sigterm"
    process = start(place, how, out, ranks)
    log = place.model(out) / "log.jsonl"
    until(lambda: log.exists() and log.stat().st_size, process)
    process.send_signal(signal.SIGTERM)
    assert finish(process) != 0
    _, values = state.read(place.model(out) / "state.safetensors")
    assert 20 <= values["progress"]["step"] < STEPS
    assert finish(start(place, how, out, ranks)) == 0
    assert curve(place, out) == curves[ranks]
