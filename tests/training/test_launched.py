"""Catches a process alone that waits for others, and ranks that take themselves for the first: all of them would write."""

from __future__ import annotations

import pytest

from capfilt.training.launched import launched_rank, local_rank, started_together


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (False, 0, 0)),
        # A rank that some other launcher left behind, of a world of one.
        ({"RANK": "3", "LOCAL_RANK": "2"}, (False, 0, 0)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "1"}, (False, 0, 0)),
        ({"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1"}, (True, 5, 1)),
        ({"WORLD_SIZE": "2"}, (True, 0, 0)),
    ],
)
def test_the_environment_says_who_this_process_is(monkeypatch, environment, expected):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (started_together(), launched_rank(), local_rank()) == expected
