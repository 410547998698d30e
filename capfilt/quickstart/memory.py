"""The most memory that this process and everything it started held at once."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType
from typing import Self

import psutil

_EVERY = 1.0  # seconds


class PeakMemory:
    """While open, watches this process and its descendants; `gb` is their largest sum so far, in 10^9 bytes.

    On Linux memory that processes share counts once (each has its proportional share); elsewhere resident sets are added
    up, which counts it as often as it is shared. Looked at once a second, so a shorter peak can be missed.
    """

    def __init__(self) -> None:
        self.gb = 0.0
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._sample, name="capfilt-memory", daemon=True)

    def __enter__(self) -> Self:
        self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._watch.join()

    def _sample(self) -> None:
        me = psutil.Process()
        while True:
            held = 0
            for process in (me, *me.children(recursive=True)):
                # One that ended meanwhile holds nothing.
                with contextlib.suppress(psutil.Error, OSError):
                    held += _held(process)
            self.gb = max(self.gb, held / 1e9)
            if self._over.wait(_EVERY):
                return


def _held(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", full.rss))
