"""Answers that are asked for once and remembered for a while: the addresses of a name, the rules of a robots.txt."""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

from capfilt.stages.download.urls import Fault

KEEP_SECONDS = 120.0
"""How long an answer, or the lack of one, is remembered."""

TRANSIENT_SECONDS = 0.4
"""How long a fault that may pass is: for the URLs that ask at once, and less than an attempt waits for the next."""

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Remembered(Generic[Key, Value]):
    """The answers to questions. Those that nobody asked for longest make place for others. For several threads at once."""

    def __init__(
        self,
        ask: Callable[[Key], Value],
        most: int,
        *,
        seconds: float = KEEP_SECONDS,
        size: Callable[[Value], int] = lambda value: 1,
        start: Callable[..., Any] = lambda work, *values: work(*values),
    ) -> None:
        """`most` bounds the sizes of all answers together; `start` calls `ask`, here or in another thread."""
        self._ask, self._most, self._seconds, self._size, self._start = ask, most, seconds, size, start
        # When it expires, its size, the answer. Futures: who comes second waits for the first.
        self._known: OrderedDict[Key, tuple[float, int, concurrent.futures.Future[Value]]] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()

    def get(self, key: Key, until: float) -> Value:
        """The answer, waited for until then (time.monotonic). Raises TimeoutError, and what `ask` raises."""
        with self._lock:
            expires, _, answer = self._known.get(key, (0.0, 0, None))
            mine = answer is None or expires < time.monotonic()
            if answer is None or mine:
                answer = concurrent.futures.Future()
                self._keep(key, math.inf, 1, answer)
            else:
                self._known.move_to_end(key)
        if mine:
            self._start(self._find, key, answer)
        if error := answer.exception(max(0.0, until - time.monotonic())):
            # One object for all who ask: its traceback would grow with each of them.
            raise error.with_traceback(None)
        return answer.result()

    def _find(self, key: Key, answer: concurrent.futures.Future[Value]) -> None:
        size, seconds = 1, self._seconds
        try:
            value = self._ask(key)
            size = self._size(value)
            answer.set_result(value)
        except BaseException as error:  # noqa: BLE001 - whoever waits for the answer raises it
            passing = isinstance(error, Fault) and error.transient
            seconds = TRANSIENT_SECONDS if passing else KEEP_SECONDS
            answer.set_exception(error)
        with self._lock:
            self._keep(key, time.monotonic() + seconds, size, answer)

    def _keep(self, key: Key, expires: float, size: int, answer: concurrent.futures.Future[Value]) -> None:
        self._held += size - self._known.pop(key, (0.0, 0, None))[1]
        self._known[key] = expires, size, answer
        while self._held > self._most and len(self._known) > 1:
            self._held -= self._known.popitem(last=False)[1][1]
