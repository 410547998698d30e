"""The most memory that this process and everything it started held at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import psutil

_EVERY = 1.0  # seconds


@contextlib.contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Watch this process and its descendants inside the `with`. Yields their largest sum so far, in 10^9 bytes, as [sum].

    On Linux memory that processes share counts once (each has its proportional share); elsewhere resident sets are added
    up, which counts it as often as it is shared. Looked at once a second, so a shorter peak can be missed.
    """
    peak = [0.0]
    over = threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while True:
            held = 0
            for process in (me, *me.children(recursive=True)):
                # A process that ended meanwhile holds nothing.
                with contextlib.suppress(psutil.Error, OSError):
                    full = process.memory_full_info()
                    held += int(getattr(full, "pss", full.rss))
            peak[0] = max(peak[0], held / 1e9)
            if over.wait(_EVERY):
                return

    thread = threading.Thread(target=watch, name="capfilt-memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
