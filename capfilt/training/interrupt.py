"""SIGTERM and SIGINT during training: remembered, answered between two steps, and passed on.

Not here: what is saved before the signal is passed on (`loop.py`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """A signal arrived and the step in progress is done."""


class Interrupt:
    """The first signal that arrived, or None, in `number`. Not `alone`, a run stops only where all ranks agreed to."""

    def __init__(self, alone: bool = True) -> None:
        self.number: int | None = None
        self._alone = alone
        self._agreed = False

    def agree(self, stop: bool) -> None:
        """Takes note of what all ranks found in this step: a signal that came since is answered in the next."""
        self._agreed = stop
        if stop and self.number is None:
            self.number = signal.SIGTERM

    def check(self) -> None:
        """Raises Interrupted where the run is to stop; called when everything is whole."""
        if self._agreed or (self._alone and self.number is not None):
            raise Interrupted

    @contextmanager
    def listening(self, wanted: bool) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT are remembered and a second one ends the run at once; outside they are as before.

        Where one arrived it is raised again on leaving: to whoever sent it, and to whatever the caller does about
        signals, nothing was swallowed. Does nothing where not `wanted`, and in threads, where Python has no handlers.
        """
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, _frame: FrameType | None) -> None:
            if self.number is not None:
                raise KeyboardInterrupt
            self.number = number

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except Interrupted:
            pass
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.number is not None:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt
