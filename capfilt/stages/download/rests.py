"""Hosts that asked to be left alone for a while (Retry-After): until when, and whether that is waited for.

That a host's URLs wait is `schedule.py`; which answers ask for it is `opener.py`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from capfilt.stages.download.settings import RETRY_AFTER_MOST
from capfilt.stages.download.urls import Fault

MAX_REMEMBERED = 50_000
"""Hosts remembered; beyond it, those whose rest is over are forgotten."""


@dataclass
class _Rest:
    until: float = 0.0
    asked: float = 0.0  # seconds, since the host last answered
    too_long: bool = False


class Rests:
    """What hosts asked for. For several threads at once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[str, _Rest] = {}
        self._lock = threading.Lock()

    def ask(self, host: str, seconds: float) -> bool:
        """The host asks for so long a rest. Returns whether to wait: not once it has asked for more than
        RETRY_AFTER_MOST without an answer between, be it all at once.
        """
        with self._lock:
            now = self._clock()
            if len(self._rests) > MAX_REMEMBERED:
                self._rests = {name: rest for name, rest in self._rests.items() if rest.until > now}
            rest = self._rests.setdefault(host, _Rest())
            # Many answers of the same moment ask for one rest.
            rest.asked += min(seconds, max(0.0, now + seconds - rest.until))
            rest.until = max(rest.until, now + seconds)
            rest.too_long = rest.asked > RETRY_AFTER_MOST
            return not rest.too_long

    def answered(self, host: str) -> None:
        """The host gave what it was asked for; a rest that it asked for meanwhile stands."""
        with self._lock:
            if rest := self._rests.get(host):
                rest.asked = 0.0

    def check(self, host: str, *, scheduled: bool) -> None:
        """Raise Fault `rate_limited` where the host must not be asked now.

        `scheduled` says that whoever asks has waited for this host as it was to be waited for.
        """
        with self._lock:
            rest = self._rests.get(host)
            left = rest.until - self._clock() if rest else 0.0
            if rest is None or left <= 0 or (scheduled and not rest.too_long):
                return
            words = f"{host} asked not to be asked for another {left:.0f} s"
            raise Fault("rate_limited", words, transient=not rest.too_long, retry_after=left, host=host)
