"""Runs a stage on Ray: a cluster that stands (RAY_ADDRESS), or a local one started and stopped for the user.

The only module that imports Ray. Shards are handed out one at a time to a fixed pool of workers, so that what is in
flight is bounded by the pool; a worker that dies is replaced and its shard tried again.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

# Before the import: Ray reads it once.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray as _ray
from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError

from capfilt.errors import RunError, UserError
from capfilt.execution.run import process_and_commit
from capfilt.stages.base import ModelStage, Report, ShardStage
from capfilt.tables.shards import Manifest
from capfilt.training.interrupt import PATIENCE, Interrupt, Interrupted

# Ray's stubs know the types of remote functions but not those of actors' methods.
ray: Any = _ray

PLACEMENT = 600.0
"""Seconds that ranks may wait for room on the cluster, which other jobs may have taken."""

SHARD_ATTEMPTS = 3
"""How many workers may die on one shard before the run stops."""


class _Worker:
    """An actor: one stage set up once, then shard after shard."""

    def __init__(self, stage: ShardStage) -> None:
        self.stage = stage
        self.ready = False

    def work(self, mark: str, shard: int) -> Manifest:
        if not self.ready:
            # Not in the constructor: an error there reaches the driver as a dead actor, without its type.
            self.stage.setup()
            self.ready = True
        return process_and_commit(self.stage, mark, shard)


class Board:
    """An actor without a processor, on which a piece of work posts how far it is, what came out, and why it failed."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self.result: dict[str, Any] | None = None
        self.failure: Exception | None = None
        self.asked = False
        self.began = False

    def begin(self) -> None:
        self.began = True

    def begun(self) -> bool:
        return self.began

    def ask(self) -> None:
        """Has the next post answered by True: stop."""
        self.asked = True

    def post(self, step: int, total: int, figures: dict[str, Any]) -> bool:
        self.latest = (step, total, figures)
        return self.asked

    def finish(self, result: dict[str, Any]) -> None:
        self.result = result

    def fail(self, failure: Exception) -> None:
        self.failure = failure

    def read(self) -> tuple[int, int, dict[str, Any]]:
        return self.latest

    def end(self) -> tuple[dict[str, Any] | None, Exception | None]:
        return self.result, self.failure


def run_and_post(stage: ModelStage, board: Any) -> Mapping[str, Any] | None:
    """Runs the stage, telling the board now and then how far it is; None where it was asked to stop."""
    last = 0.0

    def report(step: int, total: int, figures: Mapping[str, Any]) -> bool:
        nonlocal last
        if time.monotonic() - last <= 0.5:
            return False
        last = time.monotonic()
        return bool(ray.get(board.post.remote(step, total, dict(figures))))

    try:
        return stage.run(report)
    except Interrupted:
        return None


def attend(
    stage: ModelStage, board: Any, report: Report, ended: Callable[[float], bool], check: Callable[[], None]
) -> None:
    """Returns when `ended`, which waits for so many seconds, says so, and reports until then.

    A first signal, or an error from `check`, asks a stage that saves to stop, and is raised when it has, or `PATIENCE` is
    over; a stage that does not, or has done nothing yet, and a second signal end it at once.
    """
    interrupt = Interrupt()
    stop: Exception | None = None
    asked = 0.0
    with interrupt.listening(True):
        while not ended(0.5):
            step, total, figures = ray.get(board.read.remote())
            if step:
                report(step, total, figures)
            try:
                check()
            except RunError as error:
                stop = error
            if interrupt.number is None and stop is None:
                continue
            if not (step and stage.saves()) or (asked and time.monotonic() - asked > PATIENCE):
                break
            if not asked:
                asked = time.monotonic()
                ray.get(board.ask.remote())
    if stop is not None:
        raise stop


def _share(cpus: float, ways: int) -> float:
    """One of `ways` shares; Ray takes a fraction below 1, and above it whole processors only."""
    share = cpus / ways
    return float(int(share)) if share >= 1 else share


def room(nodes: list[tuple[float, float]], ranks: int, gpu: bool) -> float:
    """The most processors that each of `ranks` can have where nodes have so many (processors, GPUs), each rank on one node
    and with a GPU of its own where `gpu`; 0 where they have no room for so many. As Ray counts: whole above 1.
    """
    shares = {_share(cpus, ways) for cpus, _ in nodes for ways in range(1, ranks + 1)} - {0.0}
    for share in sorted(shares, reverse=True):
        held = ((int(cpus / share + 1e-9), gpus) for cpus, gpus in nodes)
        if sum(min(count, int(gpus)) if gpu else count for count, gpus in held) >= ranks:
            return share
    return 0.0


def _threads(cpus: float) -> dict[str, Any]:
    return {"env_vars": {"OMP_NUM_THREADS": str(max(1, int(cpus)))}}


def _reraise(error: RayTaskError, what: str) -> None:
    cause = error.cause
    if isinstance(cause, UserError | RunError):
        raise cause from None
    raise RunError(f"{what}: {type(cause).__name__}: {cause}") from error


class RayExecutor:
    """The executor on a Ray cluster."""

    def __init__(self, address: str | None = None, ways: int = 1) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS") or None
        self._started = False
        self._ways = ways
        self._stopped = threading.Event()

    def share(self, ways: int) -> RayExecutor:
        """For stages from several threads; a piece of work still takes a whole GPU where there is one."""
        return RayExecutor(self.address, ways)

    def stop(self) -> None:
        """End what runs: every thread gets a RunError."""
        self._stopped.set()

    def _check(self, stage: ShardStage | ModelStage) -> None:
        if self._stopped.is_set():
            raise RunError(
                f"{stage.name}: stopped with the others; what was committed is valid, run again to go on"
            )

    def __enter__(self) -> Self:
        if not ray.is_initialized():
            options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
            if self.address is None:
                options |= {"include_dashboard": False, "num_cpus": os.cpu_count()}
            try:
                # "local": asked for no address, Ray would join whatever cluster it finds running on this machine.
                ray.init(address=self.address or "local", **options)
            except ConnectionError as error:
                raise UserError(
                    f"no Ray cluster answers at {self.address}: {str(error).splitlines()[0]}"
                ) from error
            self._started = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started:
            ray.shutdown()

    def shards(self, stage: ShardStage, mark: str, todo: list[int]) -> Iterator[Manifest]:
        resources = ray.cluster_resources()
        cpus = _share(resources.get("CPU", 1), self._ways)
        gpus = int(resources.get("GPU", 0))
        if stage.uses_gpu and gpus:
            size = min(max(1, gpus // self._ways), len(todo))
            options: dict[str, Any] = {"num_cpus": _share(cpus, 2 * size), "num_gpus": 1}
        else:
            size = max(1, min(int(cpus), len(todo)))
            options = {"num_cpus": _share(cpus, size)}
        size = min(size, stage.most_workers() or size)
        options["runtime_env"] = _threads(options["num_cpus"])
        actor = ray.remote(_Worker).options(**options)
        stage.workers = size
        stage_reference = ray.put(stage)

        queue = list(reversed(todo))
        attempts = dict.fromkeys(todo, 0)
        workers = [actor.remote(stage_reference) for _ in range(size)]
        running: dict[Any, tuple[int, Any]] = {}
        try:
            for worker in workers:
                if queue:
                    shard = queue.pop()
                    running[worker.work.remote(mark, shard)] = (shard, worker)
            while running:
                ready, _ = ray.wait(list(running), num_returns=1, timeout=0.5)
                self._check(stage)
                if not ready:
                    continue
                shard, worker = running.pop(ready[0])
                try:
                    yield ray.get(ready[0])
                except RayTaskError as error:
                    _reraise(error, f"{stage.name}, shard {shard:05d}")
                except (RayActorError, WorkerCrashedError) as error:
                    attempts[shard] += 1
                    if attempts[shard] >= SHARD_ATTEMPTS:
                        raise RunError(
                            f"{stage.name}: {SHARD_ATTEMPTS} workers died on shard {shard:05d} "
                            f"({str(error).splitlines()[0]}); what was committed is valid, run again to go on"
                        ) from error
                    queue.append(shard)
                    worker = actor.remote(stage_reference)
                if queue:
                    shard = queue.pop()
                    running[worker.work.remote(mark, shard)] = (shard, worker)
                else:
                    ray.kill(worker)
        finally:
            for _, worker in running.values():
                ray.kill(worker)

    def model(self, stage: ModelStage, report: Report) -> Mapping[str, Any]:
        resources = ray.cluster_resources()
        # One piece of work runs on one node: ask for the largest node's processors, not the cluster's.
        largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
        cpus = _share(largest, self._ways)
        gpus = int(resources.get("GPU", 0)) // self._ways
        ranks = stage.ranks(gpus)
        if ranks > 1:
            # Ray Train takes seconds to import, which a stage in one process should not wait for.
            from capfilt.execution.ray_train import missing, run_on_ray

            lacking = missing()
            if not lacking:
                nodes = [
                    (each["Resources"].get("CPU", 0) / self._ways, each["Resources"].get("GPU", 0))
                    for each in ray.nodes()
                    if each["Alive"]
                ]
                cpus = room(nodes, ranks, gpus > 0)
                if not cpus:
                    there = ", ".join(f"{cpu:g} and {gpu:g}" for cpu, gpu in nodes)
                    raise UserError(
                        f"--ranks {ranks}: the cluster's nodes have no room for so many, each with a processor or a share of "
                        f"one{' and a GPU' if gpus else ''}; they have, in processors and GPUs: {there}"
                    )
                # Beside others of its kind, a piece of work may wait for its turn as long as they take.
                patience = PLACEMENT if self._ways == 1 else math.inf
                return run_on_ray(stage, ranks, cpus, gpus > 0, report, lambda: self._check(stage), patience)
            if stage.ranks(1) > 1:
                raise UserError(f"--ranks {ranks} on Ray needs Ray Train: {lacking}")
            warnings.warn(f"{stage.name} trains on 1 of {gpus} GPUs: {lacking}", RuntimeWarning, stacklevel=2)
        gpus = 1 if resources.get("GPU", 0) >= 1 else 0
        board = ray.remote(Board).options(num_cpus=0).remote()
        task = (
            ray.remote(run_and_post)
            .options(
                num_cpus=cpus,
                num_gpus=gpus,
                max_retries=2,
                runtime_env=_threads(cpus),
            )
            .remote(stage, board)
        )
        try:
            attend(
                stage, board, report, lambda seconds: bool(ray.wait([task], timeout=seconds)[0]),
                lambda: self._check(stage),
            )  # fmt: skip
            figures = ray.get(task)
            if figures is None:
                raise KeyboardInterrupt
            return dict(figures)
        except RayTaskError as error:
            _reraise(error, stage.name)
            raise AssertionError from error
        except WorkerCrashedError as error:
            raise RunError(
                f"{stage.name}: its worker died three times; run again to go on from its last state"
            ) from error
        except (KeyboardInterrupt, SystemExit, RunError):  # Ray makes an exit of SIGTERM
            ray.cancel(task, force=True)
            raise
