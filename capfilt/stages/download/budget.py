"""How many bytes of bodies a child holds at once: received, waiting to be decoded, being decoded."""

from __future__ import annotations

import threading
import time

MOST_BYTES = 256_000_000
"""Of all bodies of a child; beyond it, one more may go on."""

STEP_BYTES = 1 << 18
"""What a body books first; then as much again as it has."""


class Budget:
    """Bytes that are shared out. Never exceeded but by one share at a time, so that shares that wait for one another end."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self.most = most
        self.used = 0
        self.changed = threading.Condition()
        self.over: Share | None = None


class Share:
    """What one body has booked of a budget, until `close`."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self.size = 0

    def grow(self, size: int) -> float:
        """Book `size` bytes more, waited for. Returns the seconds waited."""
        budget, start = self._budget, time.monotonic()
        with budget.changed:
            budget.changed.wait_for(
                lambda: budget.used + size <= budget.most or budget.over is None or budget.over is self
            )
            budget.used += size
            self.size += size
            if budget.used > budget.most:
                budget.over = self
        return time.monotonic() - start

    def close(self) -> None:
        """Give everything back."""
        budget = self._budget
        with budget.changed:
            budget.used -= self.size
            self.size = 0
            if budget.over is self:
                budget.over = None
            budget.changed.notify_all()
