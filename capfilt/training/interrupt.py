"""SIGTERM and SIGINT during training: remembered, answered between two steps, and passed on.

Not here: what is saved before the signal is passed on (`loop.py`), who starts ranks and waits for them
(`capfilt.execution`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REPEAT = 5.0
"""Seconds in which the same signal counts once: a terminal sends Ctrl-C to everyone, and launchers forward it."""

PATIENCE = 600.0
"""Seconds that whoever started ranks waits for them to save: a large state takes minutes."""


class Interrupted(KeyboardInterrupt):
    """A stop was asked for, and the step in progress is done."""


class Interrupt:
    """The first signal that arrived, or None, in `number`. Not `alone`, a run stops only where all ranks agreed to."""

    def __init__(self, alone: bool = True) -> None:
        self.number: int | None = None
        self._arrived = 0.0
        self._alone = alone
        self._asked = False
        self._agreed = False

    def ask(self) -> None:
        """A stop without a signal."""
        self._asked = True

    @property
    def wanted(self) -> bool:
        """Whether this process is to stop, for all that it knows."""
        return self._asked or self.number is not None

    def agree(self, stop: bool) -> None:
        """Takes note of what all ranks found in this step: a signal that came since is answered in the next."""
        self._agreed = stop

    def check(self) -> None:
        """Raises Interrupted where the run is to stop; called when everything is whole."""
        if self._agreed or (self._alone and self.wanted):
            raise Interrupted

    @contextmanager
    def listening(self, wanted: bool) -> Iterator[None]:
        """Inside, SIGTERM and SIGINT are remembered; a second one ends the run at once, where it is no repetition of the
        first within `REPEAT`. Outside they are as before.

        Where one arrived it is raised again on leaving: to whoever sent it, and to whatever the caller does about
        signals, nothing was swallowed. Does nothing where not `wanted`, and in threads, where Python has no handlers.
        """
        if not wanted or threading.current_thread() is not threading.main_thread():
            yield
            return

        def remember(number: int, _frame: FrameType | None) -> None:
            if self.number is None:
                self.number, self._arrived = number, time.monotonic()
            elif number != self.number or time.monotonic() - self._arrived > REPEAT:
                raise KeyboardInterrupt

        before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        except Interrupted:
            if self.number is None:
                raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.number is not None:
            signal.raise_signal(self.number)
            raise KeyboardInterrupt
