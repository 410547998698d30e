"""Progress on standard error: a bar with rates in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

LINE_EVERY = 15.0
"""Seconds between lines where standard error is not a terminal."""


class _Bars:
    """The bars on the terminal, one for each stage that runs: a terminal has room for one display only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._display: Progress | None = None
        self._count = 0

    def join(self) -> Progress:
        with self._lock:
            if self._display is None:
                self._display = Progress(
                    SpinnerColumn(),
                    TextColumn("[bold]{task.description:<22}"),
                    BarColumn(bar_width=24),
                    TaskProgressColumn(),
                    TextColumn("{task.fields[text]}"),
                    TimeRemainingColumn(),
                    console=Console(stderr=True),
                    transient=True,
                )
                self._display.start()
            self._count += 1
            return self._display

    def leave(self, task: TaskID) -> None:
        with self._lock:
            assert self._display is not None
            self._display.remove_task(task)
            self._count -= 1
            if not self._count:
                self._display.stop()
                self._display = None


_BARS = _Bars()


class StageProgress:
    """One stage's progress; a context manager. `update` may be called as often as one likes, stages may run together."""

    def __init__(self, name: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.name, self.total, self.unit = name, total, unit
        self._start = time.monotonic()
        self._rows = 0
        self._last_line = self._start
        self._quiet = quiet
        self._bar: Progress | None = None
        self._shown = not quiet and sys.stderr.isatty()

    def __enter__(self) -> Self:
        if self._shown:
            self._bar = _BARS.join()
            self._task = self._bar.add_task(self.name, total=self.total or None, text="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            _BARS.leave(self._task)
            self._bar = None

    def update(
        self,
        done: int,
        *,
        total: int | None = None,
        rows: int | None = None,
        figures: Mapping[str, Any] | None = None,
    ) -> None:
        """`done` units of `total` are done; `rows` is the number of rows behind them, for the rate."""
        now = time.monotonic()
        self.total = self.total if total is None else total
        amount, unit = (done, self.unit) if rows is None else (rows, "rows")
        rate = amount / max(now - self._start, 1e-9)
        text = f"{done:,}/{self.total:,} {self.unit}  {rate:,.1f} {unit}/s"
        if figures:
            text += "  " + "  ".join(f"{key} {_number(value)}" for key, value in list(figures.items())[:4])
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=self.total or None, text=text)
        elif not self._quiet and now - self._last_line > LINE_EVERY:
            self._last_line = now
            print(f"{self.name}: {text}", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """A line on standard error about what a run waits for or tries again, above the bars where there are some."""
    print(text, file=sys.stderr, flush=True)


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
