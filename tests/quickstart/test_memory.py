"""The bug: a peak that misses what children hold, so that a run of many processes seems to fit where it does not."""

from __future__ import annotations

import subprocess
import sys
import time

from capfilt.quickstart.memory import PeakMemory

HOLD = "held = bytearray(b'x' * {size}); print('ready', flush=True); input()"


def test_what_children_hold_together_is_counted():
    with PeakMemory() as before:
        pass
    with PeakMemory() as peak:
        children = [
            subprocess.Popen(
                [sys.executable, "-c", HOLD.format(size=150_000_000)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 20
        while peak.gb < before.gb + 0.3 and time.monotonic() < deadline:
            time.sleep(0.1)
        for child in children:
            child.communicate(b"\n")
    assert before.gb > 0.005
    assert before.gb + 0.3 <= peak.gb < before.gb + 0.4


def test_a_watch_that_is_over_watches_no_more():
    with PeakMemory() as peak:
        pass
    held = peak.gb
    more = bytearray(b"x" * 50_000_000)
    time.sleep(1.2)
    assert peak.gb == held
    assert len(more) == 50_000_000
