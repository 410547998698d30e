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
    """One URL to fetch. `attempt` counts from 0; `queued` says that it has waited for its host before."""

    row: int
    url: str | None
    host: str
    attempt: int = 0
    queued: bool = False


@dataclass(eq=False)
class _Host:
    flying: int = 0
    free_at: float = 0.0
    queue: deque[Errand] = field(default_factory=deque)
    waking: bool = False  # whether its next turn is among `_later`


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
        self._later: list[tuple[float, int, Errand | _Host]] = []
        self._count = 0
        self._hosts: defaultdict[str, _Host] = defaultdict(_Host)
        for host, moment in (free_at or {}).items():
            self._hosts[host].free_at = moment
        self._changed = threading.Condition()
        self.attempts = 0
        """How many fetches have ended, those included that are tried again."""

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
                self._ready.extendleft(reversed(self._due(now)))
                while self._ready:
                    errand = self._ready.popleft()
                    if self._may_go(errand, now):
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

    def rest(self, host: str, seconds: float) -> None:
        """Nobody asks the host for so long; what is in flight goes on."""
        with self._changed:
            known = self._hosts[host]
            known.free_at = max(known.free_at, self._clock() + seconds)

    def _due(self, now: float) -> list[Errand]:
        """Whose moment has come: retries, and of each host whose turn it is the next in its queue."""
        due = []
        while self._later and self._later[0][0] <= now:
            item = heapq.heappop(self._later)[2]
            if isinstance(item, Errand):
                due.append(item)
                continue
            item.waking = False
            if item.queue:
                due.append(item.queue.popleft())
        return due

    def _may_go(self, errand: Errand, now: float) -> bool:
        """Whether the errand may go at once; where not, it is in its host's queue. No turn is given before it is there."""
        if not errand.host:
            return True
        host = self._hosts[errand.host]
        full = 0 < self._concurrency <= host.flying
        goes = not full and host.free_at <= now
        if goes:
            host.flying += 1
            host.free_at = now + self._interval
        elif errand.queued or errand.attempt:
            host.queue.appendleft(errand)
        else:
            host.queue.append(errand)
            errand.queued = True
        # A host that is full goes on when one of its fetches ends.
        if host.queue and not full and not host.waking:
            host.waking = True
            self._wait(host, host.free_at)
            self._changed.notify()
        return goes

    def _wait(self, item: Errand | _Host, until: float) -> None:
        self._count += 1
        heapq.heappush(self._later, (until, self._count, item))

    def _leave(self, errand: Errand) -> None:
        self.attempts += 1
        if errand.host in self._hosts:
            host = self._hosts[errand.host]
            host.flying -= 1
            if host.queue:
                # First, so that a host's URLs keep the list's order.
                self._ready.appendleft(host.queue.popleft())
        # All of them: who waits may wait for a moment that is now another.
        self._changed.notify_all()
