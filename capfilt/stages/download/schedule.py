"""Which URL a thread fetches next: in the list's order, within what a host is to bear, failed ones later again.

A URL that has to wait (for its host, for its next attempt) holds up no thread.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(eq=False)
class Errand:
    """One URL to fetch. `attempt` counts from 0; `booked` says that its host expects it."""

    row: int
    url: str | None
    host: str
    attempt: int = 0
    booked: bool = False


@dataclass
class _Host:
    booked: int = 0
    free_at: float = 0.0
    queue: deque[Errand] = field(default_factory=deque)


class Schedule:
    """Hands out errands to threads. Every errand taken must be given back with `done` or `again`."""

    def __init__(
        self,
        errands: Iterable[Errand],
        *,
        concurrency: int = 0,
        rate: float = 0.0,
        free_at: Mapping[str, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`concurrency` fetches at once and `rate` requests per second are what one host bears; 0 for no limit.

        `free_at` is what an earlier schedule had at its end.
        """
        self._concurrency, self._interval, self._clock = concurrency, 1 / rate if rate else 0.0, clock
        self._ready = deque(errands)
        self._open = len(self._ready)
        self._later: list[tuple[float, int, Errand]] = []
        self._count = 0
        self._hosts: defaultdict[str, _Host] = defaultdict(_Host)
        for host, moment in (free_at or {}).items():
            self._hosts[host].free_at = moment
        self._changed = threading.Condition()

    def free_at(self) -> dict[str, float]:
        """When each host that must wait may be asked again, on the schedule's clock."""
        with self._changed:
            now = self._clock()
            return {name: host.free_at for name, host in self._hosts.items() if host.free_at > now}

    def take(self) -> Errand | None:
        """The next errand, waited for; None when all are done."""
        with self._changed:
            while self._open:
                now = self._clock()
                while self._later and self._later[0][0] <= now:
                    self._ready.append(heapq.heappop(self._later)[2])
                while self._ready:
                    errand = self._ready.popleft()
                    if errand.booked or self._book(errand, now):
                        return errand
                wait = self._later[0][0] - self._clock() if self._later else None
                self._changed.wait(None if wait is None else max(0.0, wait))
            return None

    def done(self, errand: Errand) -> None:
        """There is an answer."""
        with self._changed:
            self._open -= 1
            self._leave(errand)

    def again(self, errand: Errand, seconds: float) -> None:
        """Another attempt, `seconds` from now at the earliest."""
        with self._changed:
            errand.attempt += 1
            self._wait(errand, self._clock() + seconds)
            self._leave(errand)

    def _book(self, errand: Errand, now: float) -> bool:
        """Whether the errand may go at once; where not, it is queued or put off."""
        if not errand.host or not (self._concurrency or self._interval):
            errand.booked = True
            return True
        host = self._hosts[errand.host]
        if self._concurrency and host.booked >= self._concurrency:
            host.queue.append(errand)
            return False
        errand.booked = True
        host.booked += 1
        begin = max(now, host.free_at)
        host.free_at = begin + self._interval
        if begin > now:
            self._wait(errand, begin)
            return False
        return True

    def _wait(self, errand: Errand, until: float) -> None:
        self._count += 1
        heapq.heappush(self._later, (until, self._count, errand))

    def _leave(self, errand: Errand) -> None:
        errand.booked = False
        if errand.host in self._hosts:
            host = self._hosts[errand.host]
            host.booked -= 1
            if host.queue:
                # First, so that a host's URLs keep the list's order.
                self._ready.appendleft(host.queue.popleft())
        # All of them: who waits may wait for a moment that is now another.
        self._changed.notify_all()
