"""Fixtures shared by every room's tests."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real data beside the checkout; a test that needs it is skipped where it is absent."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (path / "clean" / "captions.json").is_file():
        pytest.skip("real data is absent: no ../shared/data/clean/captions.json beside the checkout")
    return path
