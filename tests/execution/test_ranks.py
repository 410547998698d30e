"""Catches a training in several ranks that is another one wherever it runs, writes twice, is lost with one rank, or turns a
clear error into a traceback.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from capfilt.tables.ids import file_sha256
from tests.loopback import UNAVAILABLE

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
FINETUNE = (
    "finetune", "filter", "--init", "filter", "--human", "human", "--steps", "5", "--batch-size", "4",
    "--no-augment", "--save-every", "2", "--queue-size", "8", "--out", "torchrun",
)  # fmt: skip


def isolated(*command, check=True):
    """A command where only the loopback exists."""
    # Ray's own defaults suit long runs: workers of low priority, a look at them every two seconds.
    quick = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.1", "RAY_worker_niceness": "0"}
    environment = {**os.environ, **quick, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "loopback.py"), sys.executable, *command],
        capture_output=True, text=True, timeout=600, cwd=ROOT, env=environment,
    )  # fmt: skip
    if done.returncode == UNAVAILABLE:
        pytest.skip(done.stderr.strip())
    assert not check or done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def found(place):
    return attempts(place, "inline", "whole", "fails", "odd") | attempts(
        place, "ray", "whole", "killed", "crowded"
    )


def attempts(place, how, *runs):
    results = {}
    script = str(ROOT / "tests" / "execution" / "ranks_run.py")
    for line in isolated(script, str(place.path), how, *runs).stdout.splitlines():
        if line.startswith("{"):
            results |= json.loads(line)
    return results


def weights(place, name):
    return file_sha256(place.model(name) / "model.safetensors")


@pytest.mark.parametrize("how", ["inline", "ray"])
def test_two_ranks_write_one_checkpoint(place, found, how):
    assert found[f"{how}-whole"]["steps"] == 5
    directory = place.model(f"{how}-whole")
    assert [json.loads(line)["step"] for line in (directory / "log.jsonl").read_text().splitlines()] == [5]
    assert sorted(path.name for path in directory.iterdir()) == [
        "config.json", "exposures.parquet", "log.jsonl", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


@pytest.mark.parametrize("how", ["inline", "ray"])
def test_ranks_listen_on_the_loopback_only(place, found, how):
    """torch's store listens on every address of the machine, whatever address it is given."""
    assert found[f"{how}-whole"]["steps"] == 5
    heard = [
        ip
        for rank in (0, 1)
        for ip in (place.path / "models" / f"{how}-whole.{rank}.sockets").read_text().splitlines()
    ]
    assert heard
    assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}


def test_ranks_are_the_same_wherever_they_run(place, found):
    assert weights(place, "ray-whole") == weights(place, "inline-whole")


def test_a_killed_rank_is_started_again_by_ray_and_nothing_differs(place, found):
    assert found["ray-killed"]["steps"] == 5
    assert (place.path / "ray.killed").exists()
    assert weights(place, "ray-killed") == weights(place, "ray-whole")


def test_errors_of_a_rank_come_through_as_they_were(found):
    assert found["inline-fails"] == {"error": "RunError", "message": "the disk is on fire"}


def test_ranks_wait_for_room_on_a_cluster_and_not_for_ever(found):
    assert found["ray-crowded"]["error"] == "RunError"
    said = "waited 2 s for 2 workers with 1 processor each to begin; free now, in all (processors, GPUs): (0, 0); run again"
    assert said in found["ray-crowded"]["message"]


@pytest.mark.slow  # Ray starts all ranks once more before it gives up
def test_errors_of_a_rank_on_ray_come_through_too(place):
    assert attempts(place, "ray", "fails")["ray-fails"] == {
        "error": "RunError",
        "message": "the disk is on fire",
    }


def test_a_batch_that_ranks_cannot_share_is_refused(found):
    assert found["inline-odd"]["error"] == "UserError"
    assert "--batch-size 5: 2 ranks" in found["inline-odd"]["message"]


def test_under_torchrun_one_of_them_speaks(place, found):
    command = ("-m", *TORCHRUN, "-m", "capfilt", *FINETUNE, "-w", str(place.path), "--execution")
    done = isolated(*command, "inline")
    assert done.stdout.count("finetune-filter") == 1, done.stdout
    assert weights(place, "torchrun") == weights(place, "inline-whole")
    assert "give --execution inline" in isolated(*command, "ray", check=False).stderr
