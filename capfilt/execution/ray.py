"""Runs a stage on Ray: shards by a pool of workers, a stage that is one piece of work in a task of its own.

A shard goes to a worker that has begun, never to one that waits for room, so what is in flight is bounded by the pool and
a run goes on with whatever part of the pool has room. A worker that dies is replaced and its shard tried again.
"""

from __future__ import annotations

import math
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from ray.exceptions import RayTaskError

from capfilt.errors import RunError, UserError
from capfilt.execution.board import attend, new_board, run_and_post
from capfilt.execution.cluster import (
    LOST,
    Connection,
    NoRoom,
    Wait,
    autoscaled,
    death,
    described,
    nodes,
    ray,
)
from capfilt.execution.commit import process_and_commit
from capfilt.execution.placement import Node, Size, crew, room
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.tables.manifest import Manifest
from capfilt.tables.visible import say

PLACEMENT = 600.0
"""Seconds that ranks may wait for room on the cluster, which other jobs may have taken."""

ATTEMPTS = 3
"""How many workers may die on one shard, or on one piece of work, before the run stops."""


class _Worker:
    """An actor: one stage set up once, then shard after shard."""

    def __init__(self, stage: ShardStage) -> None:
        self.stage = stage
        self.ready = False

    def begin(self) -> None:
        """Returns once the worker has a place and has started."""

    def work(self, mark: str, shard: int) -> Manifest:
        if not self.ready:
            # Not in the constructor: an error there reaches the driver as a dead actor, without its type.
            self.stage.setup()
            self.ready = True
        return process_and_commit(self.stage, mark, shard)


def _threads(cpus: float) -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}}


def _options(size: Size) -> dict[str, Any]:
    """The options with which Ray is asked for one of the workers."""
    return {"num_cpus": size.cpus, "num_gpus": int(size.gpu), "runtime_env": _threads(size.cpus)}


def _reraise(error: RayTaskError, what: str) -> NoReturn:
    cause = error.cause
    if isinstance(cause, UserError | RunError):
        raise cause from None
    raise RunError(f"{what}: {type(cause).__name__}: {cause}") from error


class RayExecutor(Connection):
    """The executor on a Ray cluster."""

    def __init__(self, ways: int = 1) -> None:
        super().__init__()
        self._ways = ways
        self._stopped = threading.Event()

    def share(self, ways: int) -> RayExecutor:
        """For stages from several threads; a piece of work still takes a whole GPU where there is one."""
        return RayExecutor(ways)

    def stop(self) -> None:
        """End what runs: every thread gets a RunError."""
        self._stopped.set()

    def _check(self, stage: ShardStage | ModelStage) -> None:
        if self._stopped.is_set():
            raise RunError(
                f"{stage.name}: stopped with the others; what was committed is valid, run again to go on"
            )

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        size = self._crew(stage, len(todo), stage.uses_gpu and _gpus(nodes()) > 0)
        stage.workers = size.workers
        reference = ray.put(stage)
        actor = ray.remote(_Worker)
        queue = list(reversed(todo))
        attempts: Counter[int] = Counter()
        stillborn = 0
        waiting: dict[Any, Any] = {}
        working: dict[Any, tuple[int, Any]] = {}
        wait = Wait(stage.name)

        def hire(count: int) -> None:
            nonlocal wait
            if not waiting:
                wait = Wait(stage.name)
            for _ in range(count):
                worker = actor.options(**_options(size)).remote(reference)
                waiting[worker.begin.remote()] = worker

        hire(size.workers)
        try:
            while queue or working:
                ready, _ = ray.wait([*working, *waiting], num_returns=1, timeout=0.5)
                self._check(stage)
                if not ready:
                    try:
                        if waiting:
                            wait.look(replace(size, workers=len(waiting)))
                    except NoRoom:
                        for worker in waiting.values():
                            ray.kill(worker)
                        count = len(waiting)
                        waiting.clear()
                        size = self._crew(stage, count, size.gpu, RunError)
                        hire(size.workers)
                    continue
                shard, worker = working.pop(ready[0], (None, None))
                worker = worker or waiting.pop(ready[0])
                try:
                    manifest = ray.get(ready[0])
                except RayTaskError as error:
                    _reraise(error, stage.name if shard is None else f"{stage.name}, shard {shard:05d}")
                except LOST as error:
                    # It may only be out of reach, and would keep its room.
                    ray.kill(worker)
                    if shard is None:
                        stillborn += 1
                        what, deaths = "before they began", stillborn
                    else:
                        attempts[shard] += 1
                        what, deaths = f"on shard {shard:05d}", attempts[shard]
                    if deaths >= ATTEMPTS:
                        raise RunError(
                            f"{stage.name}: {ATTEMPTS} workers died {what} ({death(error)}); what was committed is valid, run "
                            "again to go on"
                        ) from error
                    if shard is not None:
                        say(f"{stage.name}: shard {shard:05d} is tried again: {death(error)}", err=True)
                        queue.append(shard)
                    if len(waiting) < len(queue):
                        hire(1)
                    continue
                if shard is None:
                    stillborn = 0
                else:
                    yield manifest
                if queue:
                    shard = queue.pop()
                    working[worker.work.remote(mark, shard)] = (shard, worker)
                else:
                    ray.kill(worker)
        finally:
            for worker in [*waiting.values(), *(worker for _, worker in working.values())]:
                ray.kill(worker)

    def _crew(
        self, stage: ShardStage, shards: int, gpu: bool, failure: type[UserError | RunError] = UserError
    ) -> Size:
        """The workers that share so many shards."""
        most = min(shards, stage.most_workers() or shards)
        return _placed(stage.name, crew(nodes(), most, gpu, self._ways), Size(1, 1.0, gpu), failure)

    def _together(
        self, name: str, workers: int, gpu: bool, failure: type[UserError | RunError] = UserError
    ) -> Size:
        """The largest size of so many workers that run at the same time."""
        cpus = room([(cpus / self._ways, gpus) for cpus, gpus in nodes()], workers, gpu)
        return _placed(name, Size(workers, cpus, gpu) if cpus else None, Size(workers, 1.0, gpu), failure)

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        gpus = _gpus(nodes())
        ranks = stage.ranks(gpus // self._ways)
        if ranks > 1:
            # Ray Train takes seconds to import, which a stage in one process should not wait for.
            from capfilt.execution.ray_train import missing, run_on_ray

            lacking = missing()
            if not lacking:
                size = self._together(f"--ranks {ranks}", ranks, gpus > 0)
                # Beside others of its kind, a piece of work may wait for its turn as long as they take; nodes take their time.
                patience = PLACEMENT if self._ways == 1 and not autoscaled() else math.inf
                return run_on_ray(stage, size, report, lambda: self._check(stage), patience)
            if stage.ranks(1) > 1:
                raise UserError(f"--ranks {ranks} on Ray needs Ray Train: {lacking}")
            warnings.warn(f"{stage.name} trains on 1 of {gpus} GPUs: {lacking}", RuntimeWarning, stacklevel=2)
        deaths = 0
        size = self._together(stage.name, 1, gpus > 0)
        while True:
            try:
                return self._piece(stage, size, report)
            except NoRoom:
                pass
            except LOST as error:
                deaths += 1
                if deaths >= ATTEMPTS:
                    raise RunError(
                        f"{stage.name}: its worker died {ATTEMPTS} times ({death(error)}); run again to go on from its last "
                        "state"
                    ) from error
                say(f"{stage.name}: tried again from its last state: {death(error)}", err=True)
            size = self._together(stage.name, 1, size.gpu, RunError)

    def _piece(self, stage: ModelStage, size: Size, report: Report) -> Mapping[str, Any]:
        """Runs the stage once. Raises one of LOST where its worker dies, NoRoom where no node is left for it."""
        board = new_board()
        task = ray.remote(run_and_post).options(**_options(size), max_retries=0).remote(stage, board)
        wait = Wait(stage.name)
        begun = False

        def check() -> None:
            nonlocal begun
            begun = begun or ray.get(board.begun.remote())
            if not begun:
                wait.look(size)
            self._check(stage)

        try:
            attend(stage, board, report, lambda seconds: bool(ray.wait([task], timeout=seconds)[0]), check)
            figures = ray.get(task)
        except RayTaskError as error:
            _reraise(error, stage.name)
        except (KeyboardInterrupt, SystemExit, RunError, NoRoom):  # Ray makes an exit of SIGTERM
            ray.cancel(task, force=True)
            raise
        if figures is None:
            raise KeyboardInterrupt
        return dict(figures)


def _gpus(there: list[Node]) -> int:
    """How many GPUs can be used: a worker takes a share of its node's processors too."""
    return sum(int(gpus) for cpus, gpus in there if cpus > 0)


def _placed(what: str, found: Size | None, asked: Size, failure: type[UserError | RunError]) -> Size:
    """The size that was found; where none was, what an autoscaler is asked for, or an error."""
    if found is not None or autoscaled():
        return found or asked
    workers = "a worker" if asked.workers == 1 else f"{asked.workers:,} workers"
    raise failure(
        f"{what}: the cluster has no room for {workers} with a share of a processor{' and a GPU' if asked.gpu else ''}"
        f"{' each' if asked.workers > 1 else ''}; {described(nodes())}"
    )
