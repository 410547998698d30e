"""Catches: progress that cannot be shown (a closed pipe, a full disk), and ranks that then wait for ever for a listener; a
store for ranks that the network can reach.
"""

from __future__ import annotations

import time

import psutil
import pytest

from capfilt.execution.together import meeting_point, run_here


class Steps:
    """A stage that takes ten seconds, and says how far it is."""

    name = "steps"

    def run(self, report):
        for step in range(100):
            report(step + 1, 100, {})
            time.sleep(0.1)
        return {}


def test_an_error_from_what_shows_progress_ends_the_ranks():
    def closed(*_values):
        raise BrokenPipeError("nobody reads")

    with pytest.raises(BrokenPipeError, match="nobody reads"):
        run_here(Steps(), 2, closed)


def test_the_last_step_is_shown():
    shown = []
    assert run_here(Steps(), 1, lambda step, *_: shown.append(step)) == {}
    assert shown[-1] == 100
    assert shown == sorted(set(shown))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1"])
def test_ranks_meet_at_one_address_only(host):
    store = meeting_point(host)
    sockets = {each.laddr.port: each.laddr.ip for each in psutil.Process().net_connections("inet")}
    assert sockets[store.port] == host
