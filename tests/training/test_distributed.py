"""Bugs caught here: gradients, negatives, queues or figures of several ranks that are not those of the global batch; ranks
that wait for each other for ever after a signal, a bad batch or an unused parameter; a run of several ranks that resumes
as another run, or only with as many ranks.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from capfilt.training.distributed import shared_gpu
from tests.training.together import launch

DROPPED = [1, 3, 4, 8, 9, 10, 17, 22, 23, 31]
# Without dropout, and with as many rows on each rank, two ranks are to do just what one process does.
EQUAL = {
    "pretraining": {},
    "split weights": {"shard": True},
    "live candidates": {"objective": {"momentum": None, "queue_size": 0}},
    "micro-batches": {"config": {"accumulate": 3}},
    "split weights in micro-batches": {"config": {"accumulate": 2, "ema": 0.9}, "shard": True},
    "a filter, averaged": {"objective": {"objectives": ["itc", "itm"]}, "config": {"ema": 0.9}},
    "a captioner": {"objective": {"objectives": ["lm"], "momentum": None}},
    "weighted": {"weighted": True},
    "weighted micro-batches": {"weighted": True, "config": {"accumulate": 3}},
    "dropped texts": {"dropped": DROPPED},
    "dropped texts, split in micro-batches": {
        "dropped": DROPPED,
        "config": {"accumulate": 2, "ema": 0.9},
        "shard": True,
    },
    "a clip with dropped texts": {"kind": "clip", "dropped": DROPPED},
    "recomputed": {"recompute": True},
    "recomputed and split": {"recompute": True, "shard": True, "peak": 1e9},
    "a clip": {"kind": "clip"},
    "a weighted clip": {"kind": "clip", "weighted": True},
    "a clip, split": {"kind": "clip", "shard": True},
    "a vilt": {"kind": "vilt"},
    "a weighted vilt": {"kind": "vilt", "weighted": True},
    "a vilt, split and recomputed": {"kind": "vilt", "shard": True, "recompute": True},
    "an albef": {"kind": "albef", "config": {"alpha": 0.4}},
    "a weighted albef": {"kind": "albef", "config": {"alpha": 0.4}, "weighted": True},
    "an albef, split": {"kind": "albef", "shard": True},
}
STILL = {"ema": 0.9, "learning_rate": 1e-9}
"""Weights stay, so that what is normalised first is the same on however many ranks."""
OTHER = {
    "own negatives": {"objective": {"global_negatives": False}},
    "uneven": {"uneven": True},
    "dropout": {"dropout": 0.3},
    "a skipped step": {"spoilt": [1], "config": {"ema": 0.9}},
    "a skipped step, split": {"spoilt": [1], "config": {"ema": 0.9, "accumulate": 2}, "shard": True},
    "a resnet's first step": {"kind": "resnet", "config": {**STILL, "steps": 1}},
    "a resnet's skipped steps": {"kind": "resnet", "config": {**STILL, "steps": 3}, "spoilt": [1, 2]},
    "a resnet": {"kind": "resnet", "config": STILL},
    "a resnet, split and recomputed": {
        "kind": "resnet",
        "config": STILL,
        "shard": True,
        "recompute": True,
    },
}


LONGER = {"config": {"steps": 6, "save_every": 2}}
SPLIT = {**LONGER, "dropout": 0.3, "shard": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    found = {}
    for world in (1, 2):
        found[world] = tmp_path_factory.mktemp(f"ranks{world}")
        done = launch(world, found[world], {**EQUAL, **OTHER, "longer": LONGER, "split": SPLIT})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return found


def curve(path):
    timings = ("images_per_second", "seconds", "mfu")
    # Accuracies and cosines are means over ranks of what each saw, not over everyone's rows.
    by_rank = ("itm_balanced_accuracy", "image_cosine", "text_cosine", "queue_cosine")
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*timings, *by_rank)} for line in lines]


def weights(path):
    """Without biases of keys: softmax does not see them, so their gradients, and AdamW's steps, are rounding."""
    found = torch.load(path / "weights.pt", weights_only=True)
    return {name: each for name, each in found.items() if not name.endswith(("qkv.bias", "key.bias"))}


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_take_the_steps_of_one_process_with_their_batch(runs, case):
    one, two = runs[1] / case, runs[2] / case
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-5, abs=2e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-4)
    assert weights(two)["exposures"].sum() == 4 * 12


def test_a_rank_may_keep_to_its_own_negatives_while_the_queue_is_everyones(runs):
    global_, own = curve(runs[2] / "pretraining"), curve(runs[2] / "own negatives")
    # Half the candidates, half a nat less or so, where the queue is still empty.
    assert own[0]["itc"] < global_[0]["itc"] - 0.3
    assert own[0]["lm"] == pytest.approx(global_[0]["lm"], rel=1e-5)
    assert weights(runs[2] / "own negatives")["queue"].abs().sum(1).gt(0).sum() == 24
    # Alone there is no difference to make.
    assert curve(runs[1] / "own negatives") == curve(runs[1] / "pretraining")


def test_running_statistics_are_those_of_all_ranks_rows(runs):
    """Statistics of rank 0's rows alone, in the checkpoint and in the averaged one. Deeper layers' are of what each rank has
    normalised by its own rows: the same for weights that are whole and split."""
    one, two, split = (
        weights(runs[world] / case)
        for world, case in ((1, "a resnet"), (2, "a resnet"), (2, "a resnet, split and recomputed"))
    )
    names = [name for name in one if name.endswith(("running_mean", "running_var"))]
    assert {name for name in names if name.startswith("average.")}
    for name in names:
        torch.testing.assert_close(split[name], two[name], rtol=1e-4, atol=1e-6, msg=name)
    mean = "visual_encoder.stem.1.running_mean"
    torch.testing.assert_close(two[mean], one[mean], rtol=1e-4, atol=1e-6)
    mean = f"average.model.{mean}"
    torch.testing.assert_close(two[mean], one[mean], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["a skipped step", "a skipped step, split"])
def test_ranks_skip_a_step_together(runs, case):
    """One rank's gradient is not finite, where its loss is: the other one goes on with other weights, or waits for ever."""
    one, two = runs[1] / case, runs[2] / case
    assert [line["skipped_steps"] for line in curve(two)] == [0, 1, 1, 1]
    for mine, theirs in zip(curve(one), curve(two), strict=True):
        assert theirs == pytest.approx(mine, rel=2e-5, abs=2e-5)
    torch.testing.assert_close(weights(two), weights(one), rtol=0, atol=2e-4)
    assert weights(two)["exposures"].sum() == 3 * 12


def test_a_step_that_ranks_skip_leaves_their_statistics_where_they_were(runs):
    once, more = (weights(runs[2] / case) for case in ("a resnet's first step", "a resnet's skipped steps"))
    names = [name for name in once if name.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert {name for name in names if name.startswith("average.")}
    for name in names:
        assert torch.equal(more[name], once[name]), name


def test_a_rank_with_fewer_texts_hangs_nobody(runs):
    assert len(curve(runs[2] / "uneven")) == 4
    assert weights(runs[2] / "uneven")["exposures"].sum() == 4 * 12 - 5


def test_ranks_draw_dropout_of_their_own(runs):
    one, two = curve(runs[1] / "dropout"), curve(runs[2] / "dropout")
    assert two[0]["lm"] != pytest.approx(one[0]["lm"], rel=1e-6)
    assert two[0]["lm"] == pytest.approx(one[0]["lm"], rel=0.1)


def test_utilisation_is_of_all_gpus(runs):
    lines = [
        json.loads((runs[world] / "recomputed and split" / "log.jsonl").read_text().splitlines()[0])
        for world in (1, 2)
    ]
    one, two = ((line["mfu"] / line["images_per_second"]) for line in lines)
    assert two == pytest.approx(one / 2, rel=0.05)


def stopped(tmp_path, case, number, then):
    """What is left of `case` when rank 1 gets a signal in step 5 and `then` ranks go on with it."""
    case = {**case, "signal_at": 5, "of_rank": 1, "number": number}
    assert launch(2, tmp_path, {"case": case}).returncode != 0
    assert (tmp_path / "case" / "state.safetensors").exists()
    again = launch(then, tmp_path, {"case": case})
    assert again.returncode == 0, again.stderr[-4000:]
    return tmp_path / "case"


def test_a_signal_to_one_rank_stops_all_and_one_process_goes_on(runs, tmp_path):
    done, plain = stopped(tmp_path, LONGER, "SIGTERM", then=1), runs[1] / "longer"
    for mine, theirs in zip(curve(done), curve(plain), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-5)
    assert torch.equal(weights(done)["exposures"], weights(plain)["exposures"])


def test_a_killed_rank_costs_nothing_that_was_saved(runs, tmp_path):
    done, plain = stopped(tmp_path, SPLIT, "SIGKILL", then=2), runs[2] / "split"
    assert curve(done) == curve(plain)
    torch.testing.assert_close(weights(done), weights(plain), rtol=0, atol=0)


ATTEMPTS = {
    # What each of two ranks sees, and its LOCAL_RANK.
    "a GPU each": ([["a", "b"], ["a", "b"]], [0, 1]),
    "each shown its own only": ([["a"], ["b"]], [0, 1]),
    "on two machines": ([["a"], ["b"]], [0, 0]),
    "on processors": ([[], []], [0, 1]),
    "more ranks than GPUs": ([["a"], ["a"]], [0, 1]),
    "no LOCAL_RANK": ([["a", "b"], ["a", "b"]], None),
    "one LOCAL_RANK for both": ([["a", "b"], ["a", "b"]], [1, 1]),
    "a LOCAL_RANK over two machines' ranks": ([["a", "b"], ["a", "b"]], [0, 2]),
    "one without a GPU": ([["a"], []], [0, 1]),
    "the first without a GPU": ([[], ["a"]], [0, 0]),
}


def test_a_rank_without_a_gpu_of_its_own_is_refused_by_all():
    """Put on GPU 0 it shares that with another rank: half the speed, memory that runs out in the middle, or NCCL's error
    about a duplicate GPU. And a rank on processors beside one on a GPU waits for it for half an hour.
    """
    held = [socket.create_server(("127.0.0.1", 0)) for _ in ATTEMPTS]
    attempts = [
        {"gpus": gpus, "local": local, "port": each.getsockname()[1]}
        for (gpus, local), each in zip(ATTEMPTS.values(), held, strict=True)
    ]
    for each in held:
        each.close()
    script, root = Path(__file__).with_name("gpus.py"), Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(root)}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), json.dumps(attempts)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    found = []
    for each in ranks:
        out, error = each.communicate(timeout=240)
        assert each.returncode == 0, error[-3000:]
        found.append(dict(zip(ATTEMPTS, map(json.loads, out.splitlines()), strict=True)))
    first, second = found
    assert (first["a GPU each"], second["a GPU each"]) == ([0, "a", "nccl"], [1, "b", "nccl"])
    assert second["each shown its own only"] == second["on two machines"] == [1, "b", "nccl"]
    assert second["on processors"] == [1, "gloo"]
    for name in [*ATTEMPTS][4:]:
        assert first[name] == second[name], "both are told, and the same"
        assert first[name].startswith(
            "rank" if "without" in name else "ranks 0 and 1 have one GPU between them ("
        )
        assert "CUDA_VISIBLE_DEVICES=" in first[name]
    assert first["one without a GPU"].startswith("rank 1 has no GPU")
    assert first["the first without a GPU"].startswith("rank 0 has no GPU")


def test_which_ranks_share_a_gpu_is_said():
    assert shared_gpu(["a", "b", "c", "d", "b", "a"]).startswith("ranks 1 and 4 ")
    assert shared_gpu(["a", "", "c"]).startswith("rank 1 has no GPU")
    assert not shared_gpu(["a", "b"])
    assert not shared_gpu(["", ""])
