"""Catches: an engine that waits for pictures while nothing decodes them, batches out of order, a stopped run that goes on
decoding, an error in a thread that nobody hears of."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from capfilt.data.images import BadImage
from capfilt.stages.pixels import pictures


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
