"""Catches: an engine that waits for pictures while nothing decodes them, batches out of order or cut by the file's row groups,
a stopped run that goes on decoding, an error in a thread that nobody hears of, decoding on four cores of many or on more
than a worker has."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capfilt.data.images import BadImage
from capfilt.stages.pixels import decoding_threads, pictures
from capfilt.tables.shards import IMAGE_ROW_GROUP
from capfilt.tables.workspace import Workspace
from tests.worlds import image_rows, write_images


def test_the_next_batch_is_prepared_while_one_is_worked_on(workspace):
    part = workspace.part("images", "web")
    ready = threading.Semaphore(0)

    def prepare(data):
        ready.release()
        return len(data)

    batches = pictures(part, 0, SimpleNamespace(prepare=prepare), 2)
    first = next(batches)
    # Two pictures of the batch in hand and two of the next, with nobody asking for it.
    for _ in range(4):
        assert ready.acquire(timeout=20)
    rest = list(batches)
    rows = [row["image_id"] for batch in (first, *rest) for row in batch.rows]
    assert rows == part.read(0, ["image_id"])["image_id"].to_pylist()
    assert [len(batch.rows) for batch in (first, *rest)] == [2, 2, 2]
    sizes = [image for batch in (first, *rest) for image in batch.images]
    stored = [image["bytes"] for image in part.read(0, ["image"])["image"].to_pylist() if image]
    assert sizes == [len(each) for each in stored]
    assert rest[-1].failures[-1] == "no_image"
    assert rest[-1].place == [0, -1]


def test_who_stops_half_way_is_not_kept_waiting(workspace):
    started = []

    def slow(data):
        started.append(data)
        time.sleep(0.2)
        return 0

    batches = pictures(workspace.part("images", "web"), 0, SimpleNamespace(prepare=slow), 3)
    next(batches)
    begun = time.perf_counter()
    batches.close()
    assert time.perf_counter() - begun < 0.5
    time.sleep(0.5)
    assert len(started) <= 6


def test_a_fault_of_the_code_is_raised_and_one_of_the_picture_is_not(workspace):
    part = workspace.part("images", "web")

    def broken(data):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(pictures(part, 0, SimpleNamespace(prepare=broken), 2))

    def bad(data):
        raise BadImage("too_small", "3 pixels")

    failures = [
        failure for batch in pictures(part, 0, SimpleNamespace(prepare=bad), 4) for failure in batch.failures
    ]
    assert failures == ["too_small"] * 5 + ["no_image"]


def test_a_batch_is_put_together_before_it_is_asked_for(workspace):
    part = workspace.part("images", "web")
    gathered = threading.Semaphore(0)

    def gather(images):
        gathered.release()
        assert threading.current_thread() is not threading.main_thread()
        return torch.stack(images)

    plugin = SimpleNamespace(prepare=lambda data: torch.tensor([len(data)]), gather=gather)
    batches = pictures(part, 0, plugin, 2)
    first = next(batches)
    assert first.images.shape == (2, 1)
    assert len(first.decoded) == 2
    for _ in range(2):
        assert gathered.acquire(timeout=10), "the next batch's is called while this one is in hand"
    assert [len(batch.images) for batch in batches] == [2, 1]
    assert [len(batch.images) for batch in pictures(part, 0, plugin, 5)] == [5, 0], (
        "nothing is put together of none"
    )


@pytest.mark.parametrize("batch_size", [7, 64, IMAGE_ROW_GROUP, 128, 512])
def test_a_batch_goes_on_over_the_end_of_a_row_group(tmp_path, batch_size):
    count = 2 * IMAGE_ROW_GROUP + 30
    (row,) = image_rows("web", 1)
    rows = [row | {"image_id": f"{number:032x}"} for number in range(count)]
    part = write_images(Workspace(tmp_path).part("images", "web"), [rows])
    assert part.open(0).num_row_groups == 3
    batches = list(pictures(part, 0, SimpleNamespace(prepare=len), batch_size))
    full, rest = divmod(count, batch_size)
    assert [len(batch.images) for batch in batches] == [batch_size] * full + [rest] * bool(rest)
    assert [row["image_id"] for batch in batches for row in batch.rows] == [row["image_id"] for row in rows]


def test_a_gpu_has_pictures_made_ready_on_the_cores_of_its_worker(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 24)
    assert decoding_threads() == 4, "the engine computes on the others"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert decoding_threads() == 22
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    assert decoding_threads() == 12
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert decoding_threads() == 4
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5})
    assert decoding_threads() == 2


SHRINKING = """
import os, threading, torch
from PIL import Image
from capfilt.data.transforms import to_uint8

torch.set_num_threads(4)
found = []

def counted(work):
    def counting():
        before = len(os.listdir("/proc/self/task"))
        work()
        found.append(len(os.listdir("/proc/self/task")) - before)
    thread = threading.Thread(target=counting)
    thread.start()
    thread.join()

counted(lambda: to_uint8(Image.new("RGB", (1600, 1200)), 384))
counted(lambda: torch.zeros(4000, 1000).add(1.0))
assert found[1] > 0, "this would not show threads if there were any"
print(found[0])
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or "AVX" not in torch.backends.cpu.get_cpu_capability(),
    reason="threads are counted in /proc, and the single-threaded filter is written for AVX2",
)
def test_a_picture_is_shrunk_by_one_thread():
    done = subprocess.run([sys.executable, "-c", SHRINKING], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "0", done.stderr
