"""Running recipe steps for several seeds, and how means over seeds are written.

`run`, `for_seeds` and `spread` live here. The steps themselves do not (`_generated.py`, `_photographs.py`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from capfilt import recipe as recipes
from capfilt.execution.run import Executor, executor
from capfilt.recipe import Recipe, Step
from capfilt.tables.workspace import Workspace

T = TypeVar("T")


def run(steps: list[tuple[Step, Any]], place: Workspace, work: Executor) -> None:
    """Run resolved steps and print each one's account. A stage that is done already is not run again."""
    for _, summary in recipes.run_recipe("bootstrapping", steps, place, work, quiet=True):
        print(summary.line(), flush=True)
        if summary.counts is not None:
            summary.counts.check()


def run_steps(steps: Sequence[Step], place: Workspace, work: Executor) -> None:
    """`run` for steps whose options are still to be checked."""
    run(recipes.resolve(Recipe(version=1, stages=list(steps)), []), place, work)


def for_seeds(args: argparse.Namespace, count: int, one: Callable[[Workspace, int, Executor], T]) -> list[T]:
    """The results of `one` for `count` seeds, each in a workspace of its own, `--jobs` seeds at a time."""
    seeds = range(args.seed, args.seed + count)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        places = [Workspace(Path(args.workspace or scratch) / f"seed{seed}") for seed in seeds]
        if args.jobs > 1:
            threads = max(1, torch.get_num_threads() // args.jobs)
            os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
            pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
            return list(stack.enter_context(pool).map(partial(_inline, one), places, seeds))
        work = stack.enter_context(executor(args.execution))
        return [one(place, seed, work) for place, seed in zip(places, seeds, strict=True)]


def _inline(one: Callable[[Workspace, int, Executor], T], place: Workspace, seed: int) -> T:
    with executor("inline") as own:
        return one(place, seed, own)


def spread(values: Sequence[float]) -> tuple[float, float]:
    """(mean, standard deviation); the deviation of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
