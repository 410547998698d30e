"""Catches: a batch of the engine's own choosing that memory cannot hold, that fills none of it, or that hangs on the day."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from capfilt.inference.capacity import CPU_BYTES, batch_that_fits, image_bytes
from capfilt.models import preset

CPU = torch.device("cpu")

PEAK = """
import dataclasses, sys, torch
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import build, preset

rows, ways = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
config = preset("blip", "small", 1200)
config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=192, depth=1))
tokenizer = Tokenizer([*SPECIALS, *(f"w{i}" for i in range(1200 - len(SPECIALS) - len(ADDED))), *ADDED])
model = build(config).eval()
pixels = torch.zeros(rows, 3, 192, 192, dtype=torch.uint8)
engine = Captioner(model, tokenizer) if ways else Filter(model, tokenizer)

def peak(count):
    if ways:
        engine.caption(pixels[:count], samples=ways, max_new_tokens=3, min_new_tokens=3, batch_size=count)
    else:
        engine.score_texts(pixels[:count], range(count), ["w1 w2 w3"] * count, batch_size=count)
    # Of this program alone: getrusage's peak begins with that of the process which started it.
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

few = peak(4)
print((peak(rows) - few) / (rows - 4), config.to_dict())
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("ways", [1, 3, 0], ids=["captions", "three captions", "scores"])
def test_the_estimate_covers_what_an_image_takes(ways):
    command = [sys.executable, "-c", PEAK, "96", str(ways)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    measured = float(said.split()[0])
    config = preset("blip", "small", 1200)
    vision = dataclasses.replace(config.vision, image_size=192, depth=1)
    estimate = image_bytes(dataclasses.replace(config, vision=vision), max(1, ways))
    assert 0.9 * measured < estimate < 5 * measured


def test_a_batch_is_a_power_of_two_within_its_limits(monkeypatch):
    large = preset("blip", "large", 30524)
    large = dataclasses.replace(large, vision=dataclasses.replace(large.vision, image_size=384))
    for config, ways in [(preset("blip", "tiny", 4096), 1), (large, 1), (large, 8)]:
        size = batch_that_fits(config, CPU, ways)
        assert size & (size - 1) == 0
        assert size == 64 or size * image_bytes(config, ways) <= CPU_BYTES < 2 * size * image_bytes(
            config, ways
        )
    assert batch_that_fits(preset("blip", "tiny", 4096), CPU) == 64

    def card(gib):
        found = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
        return torch.device("cuda")

    assert batch_that_fits(large, card(80), itemsize=2) == 512
    assert batch_that_fits(large, card(80), itemsize=2, engines=2) == 256, "each has half of the card"
    assert batch_that_fits(large, CPU, engines=2) == batch_that_fits(large, CPU)
    assert batch_that_fits(large, card(8), itemsize=2) < 128
    assert batch_that_fits(large, card(0), itemsize=2) == 1, "one is always tried"
