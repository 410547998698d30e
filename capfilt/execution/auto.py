"""`--execution auto`: each stage's work where it is done soonest, in this process or on Ray.

Ray starts when the first stage needs it.

Not here: how either does it (`inline.py`, `ray.py`).
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from capfilt.execution.inline import InlineExecutor
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.tables.manifest import Manifest
from capfilt.tables.visible import say
from capfilt.training.launched import started_together

if TYPE_CHECKING:
    from capfilt.execution.ray import RayExecutor

SMALL = 60.0
"""Seconds of one worker's work up to which a stage runs in this process: Ray and its workers take 5 to 20 to begin."""


class AutoExecutor:
    """The executor that chooses between the two others, stage by stage."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._started: RayExecutor | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        why = wanted(stage, todo)
        work = self.on_ray(why) if why else InlineExecutor()
        yield from work.shards(stage, mark, todo)

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        why = wanted(stage)
        return (self.on_ray(why) if why else InlineExecutor()).model(stage, report)

    def share(self, ways: int) -> _Shared | None:
        why = _cluster() or _several(_gpus())
        if not why and _cpus() >= 2 * ways and _can():
            why = f"{ways} stages run together on {_cpus()} processors"
        return _Shared(self, ways, why) if why else None

    def on_ray(self, why: str) -> RayExecutor:
        """The executor on Ray, started now where it is not yet; `why` is said then."""
        with self._lock:
            if self._started is None:
                from capfilt.execution.ray import RayExecutor

                where = _cluster() or f"Ray starts on this machine: {why}; --execution inline does without"
                say(f"capfilt: {where}", err=True)
                self._started = self._stack.enter_context(RayExecutor())
            return self._started


class _Shared:
    """Shares of a Ray that starts with the first stage that has something to do."""

    def __init__(self, whole: AutoExecutor, ways: int, why: str) -> None:
        self._whole, self._ways, self._why = whole, ways, why
        self._lock = threading.Lock()
        self._work: RayExecutor | None = None
        self._stopped = False

    def _on_ray(self) -> RayExecutor:
        with self._lock:
            if self._work is None:
                self._work = self._whole.on_ray(self._why).share(self._ways)
                if self._stopped:
                    self._work.stop()
            return self._work

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        yield from self._on_ray().shards(stage, mark, todo)

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        return self._on_ray().model(stage, report)

    def share(self, ways: int) -> None:
        return None

    def stop(self) -> None:
        # Without the lock: a thread may hold it for as long as Ray takes to start.
        self._stopped = True
        if self._work is not None:
            self._work.stop()


def wanted(stage: ShardStage | ModelStage, todo: list[int] | None = None) -> str:
    """Why `stage` is to run on Ray, in words; "" where this process does it. `todo`: the shards that are left."""
    if started_together():
        return ""
    if _cluster() or not _can():
        return _cluster()
    if isinstance(stage, ModelStage):
        gpus = _gpus()
        with warnings.catch_warnings():
            # Whoever starts the ranks says it again.
            warnings.simplefilter("ignore")
            return _several(gpus) if gpus > 1 and stage.ranks(gpus) > 1 else ""
    todo = todo or []
    places = (_gpus() if stage.uses_gpu else 0) or _cpus()
    if min(len(todo), stage.most_workers() or len(todo), places) < 2:
        return ""
    if stage.uses_gpu and places == _gpus():
        return _several(places)
    # By three shards: some sources must be read to be counted.
    some = {todo[0], todo[len(todo) // 2], todo[-1]}
    rows = len(todo) * sum(map(stage.expected_rows, some)) // len(some)
    if 0 < rows <= SMALL * stage.rows_per_second:
        return ""
    return f"{stage.name} has {len(todo):,} shards" + (
        f" of {rows:,} rows, about, to do" if rows else " to do"
    )


def _cluster() -> str:
    address = os.environ.get("RAY_ADDRESS")
    return f"runs on the Ray cluster of RAY_ADDRESS={address}" if address else ""


def _several(gpus: int) -> str:
    return f"{gpus} GPUs" if gpus > 1 else ""


def _can() -> bool:
    return importlib.util.find_spec("ray") is not None


def _gpus() -> int:
    # Not at the top: stages that use no GPU do without torch.
    import torch

    return torch.cuda.device_count()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
