"""Fixtures shared by every room's tests, and the switches that keep libraries quiet, offline and single-threaded."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

# Here rather than in fixtures: torch, ray and transformers read these once, when they are first imported.
for _name, _value in {
    "RAY_USAGE_STATS_ENABLED": "0",
    "NO_ALBUMENTATIONS_UPDATE": "1",
    "WANDB_MODE": "disabled",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # One thread: sums come out in one order on every machine, and tiny models are fastest that way.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(_name, _value)

# A busy machine is no failure of what is tested.
hypothesis.settings.register_profile("no_deadline", deadline=None)
hypothesis.settings.load_profile("no_deadline")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data beside the checkout; a test that needs it is skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "clean" / "captions.json").is_file():
        pytest.skip("real data is absent: no ../shared/data/clean/captions.json beside the checkout")
    return path
