"""Runs a stage in several processes of a Ray cluster that train together: Ray Train's TorchTrainer.

Ray places the ranks, tells them of each other, and starts all of them again where one is lost; what they saved on the
workspace is what they go on from. Not here: stages in one process (`ray.py`), ranks on one machine without Ray
(`together.py`).
"""

from __future__ import annotations

import os
import shutil
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError
from capfilt.stages.base import ModelStage, Report

RESTARTS = 2
"""So often all ranks are started again after one was lost."""


def _rank(settings: dict[str, Any]) -> None:
    """What each worker runs."""
    import torch

    stage, board, threads = settings["stage"], settings["board"], settings["threads"]
    torch.set_num_threads(threads)
    try:
        figures = stage.run(lambda step, total, figures: board.post.remote(step, total, dict(figures)))
    except (UserError, RunError) as error:
        board.fail.remote(type(error), str(error))
        raise
    if int(os.environ["RANK"]) == 0:
        import ray

        ray.get(board.finish.remote(dict(figures)))  # type: ignore[attr-defined]


class _Board:
    """An actor on which ranks post how far they are, what they found, and why they failed."""

    def __init__(self) -> None:
        self.latest: tuple[int, int, dict[str, Any]] = (0, 0, {})
        self.found: dict[str, Any] | None = None
        self.failure: tuple[type[Exception], str] | None = None

    def post(self, step: int, total: int, figures: dict[str, Any]) -> None:
        self.latest = (step, total, figures)

    def finish(self, figures: dict[str, Any]) -> None:
        self.found = figures

    def fail(self, kind: type[Exception], message: str) -> None:
        self.failure = (kind, message)

    def read(self) -> tuple[tuple[int, int, dict[str, Any]], dict[str, Any] | None, Any]:
        return self.latest, self.found, self.failure


def run_on_ray(stage: ModelStage, ranks: int, cpus: float, gpu: bool, report: Report) -> Mapping[str, Any]:
    """`stage.run` in `ranks` workers of the connected cluster, with `cpus` processors each, and a GPU or none.

    Returns what rank 0 returned. Raises what a rank raised, where it is an error of ours; RunError where ranks were lost
    more than twice.
    """
    import ray as _ray

    ray: Any = _ray
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise UserError(
            f"training in {ranks} ranks on Ray needs Ray Train: pip install 'capfilt[train]' ({error})"
        ) from error

    board = ray.remote(_Board).options(num_cpus=0).remote()
    scratch = Path(stage.output) / "ray_train"
    settings = {"stage": stage, "board": board, "threads": max(1, int(cpus))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = TorchTrainer(
            _rank,
            train_loop_config=settings,
            scaling_config=ScalingConfig(
                num_workers=ranks,
                use_gpu=gpu,
                resources_per_worker={"CPU": cpus, **({"GPU": 1} if gpu else {})},
            ),
            run_config=RunConfig(
                name=stage.output.name,
                storage_path=str(scratch.resolve()),
                failure_config=FailureConfig(max_failures=RESTARTS),
            ),
        )
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(ray, board, report, ended), daemon=True)
        watcher.start()
        try:
            trainer.fit()
        except Exception as error:
            _, _, failure = ray.get(board.read.remote())
            if failure is not None:
                kind, message = failure
                raise kind(message) from None
            raise RunError(
                f"{stage.name}: ranks were lost {RESTARTS + 1} times ({str(error).splitlines()[0]}); run again to go on "
                "from the last state"
            ) from error
        finally:
            ended.set()
            watcher.join()
            shutil.rmtree(scratch, ignore_errors=True)
    _, found, _ = ray.get(board.read.remote())
    return dict(found or {})


def _watch(ray: Any, board: Any, report: Report, ended: threading.Event) -> None:
    while not ended.wait(0.5):
        (step, total, figures), _, _ = ray.get(board.read.remote())
        if step:
            report(step, total, figures)
