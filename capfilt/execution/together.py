"""Runs a stage in several processes of this machine that train together, through torchrun's own launcher.

Not here: ranks on a Ray cluster (`ray_train.py`), what the ranks do (`capfilt.training.distributed`).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
from collections.abc import Mapping
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from capfilt.errors import RunError, UserError
from capfilt.stages.base import ModelStage, Report


def run_here(stage: ModelStage, ranks: int, report: Report) -> Mapping[str, Any]:
    """`stage.run` in `ranks` processes; what the first of them returns.

    Raises what a rank raised, where it is an error of ours; RunError where one of them was lost.
    """
    # A rank's processors are its share of them, unless whoever started this said otherwise.
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, _cpus() // ranks))}
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=f"capfilt-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": 300},
        # A rank that is lost would be lost again: what it saved is there for the next run.
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    # What went wrong is said once, below.
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    posts = multiprocessing.get_context("spawn").SimpleQueue()
    failures: list[tuple[type[Exception], str]] = []
    reader = threading.Thread(target=_read, args=(posts, report, failures), daemon=True)
    reader.start()
    before = dict(os.environ)
    os.environ.update(threads)
    try:
        found: dict[int, Mapping[str, Any]] = elastic_launch(config, _run)(stage, posts)
    except SignalException:
        # The launcher passed it on to the ranks, which saved their state and ended.
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        posts.put(None)
        reader.join()
        if failures:
            kind, message = failures[0]
            raise kind(message) from None
        rank, failure = error.get_first_failure()
        raise RunError(
            f"{stage.name}: rank {rank} of {ranks} was lost ({failure.message.splitlines()[0]}); run again to go on from "
            "the last state"
        ) from error
    finally:
        os.environ.clear()
        os.environ.update(before)
    posts.put(None)
    reader.join()
    return found[0]


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(posts: Any, report: Report, failures: list[tuple[type[Exception], str]]) -> None:
    while (post := posts.get()) is not None:
        if isinstance(post[0], int):
            report(*post)
        else:
            failures.append(post)


def _run(stage: ModelStage, posts: Any) -> Mapping[str, Any]:
    try:
        return stage.run(lambda step, total, figures: posts.put((step, total, dict(figures))))
    except (UserError, RunError) as error:
        posts.put((type(error), str(error)))
        raise
