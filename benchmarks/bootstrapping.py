"""The paper's ablation (BLIP, table 1 and table 2) on the generated world: what the captioner and the filter each add.

For every seed one world, one pretrained model, one captioner, one filter; captions by nucleus sampling and by beam
search; then models trained from scratch with the same number of steps on

    none            human pairs and every web text
    filter          human pairs and the web texts the filter keeps
    captioner       human pairs, every web text and every synthetic text
    both            human pairs and the web and synthetic texts the filter keeps (nucleus)
    both, beam      the same with captions written by beam search

All of it through the stages, as recipes run them. The figures are means over seeds, `+-` the standard deviation; `noise`
is the share of synthetic texts that the filter drops, as in the paper's table 2. `--markdown` prints the README's table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _form import Record, main

from capfilt import recipe as recipes
from capfilt.execution.run import Executor, executor
from capfilt.quickstart.run import SIZES, Size, open_world
from capfilt.recipe import Step
from capfilt.tables.workspace import Workspace

METRICS = ("tr@1", "ir@1", "cider")
ROWS = ("none", "filter", "captioner", "both", "both, beam")
BOOTSTRAP = ("ingest", "download", "pretrain", "finetune-captioner", "finetune-filter")


def arms(train: dict[str, Any], evaluate: dict[str, Any], seed: int) -> list[Step]:
    """The steps after the three models stand: captions twice, three rules twice, five models, five results."""
    steps = []
    for name, decoding in (("nucleus", {"method": "nucleus"}), ("beam", {"method": "beam", "num_beams": 3})):
        steps += [
            (
                "caption",
                f"caption-{name}",
                {"images": "web", "out": name, "batch_size": 100, "seed": seed, **decoding},
            ),
            ("score", f"score-{name}", {"images": "web", "captions": [name], "out": name, "batch_size": 100}),
        ]
    rules = {
        "filter": ("nucleus", {"sources": ["web"]}),
        "captioner": ("nucleus", {"sources": ["web", "synthetic"], "threshold": 0.0}),
        "both": ("nucleus", {}),
        "both-beam": ("beam", {}),
    }
    for rule, (name, options) in rules.items():
        choice = {"images": "web", "captions": [name], "scores": name, "out": rule, **options}
        steps.append(("select", f"select-{rule}", choice))
    for row in ROWS:
        model = checkpoint_of(row)
        data = {"web": ["web"]} if row == "none" else {"web": [], "pairs": [row.replace(", ", "-")]}
        steps.append(("retrain-blip", f"retrain-{model}", {**train, **data, "out": model}))
        steps.append(("evaluate", f"evaluate-{model}", {**evaluate, "model": model}))
    return [Step(stage=stage, name=label, options=options) for stage, label, options in steps]


def checkpoint_of(row: str) -> str:
    """The name of the model trained on a row's data; `filter` and `captioner` are taken by the models of step 2."""
    return "on-" + row.replace(", ", "-")


def run_seed(place: Workspace, seed: int, size: str, work: Executor | None) -> dict[str, dict[str, float]]:
    """Run everything for one seed, inline where there is no executor. Returns the metrics of each row."""
    if work is None:
        with executor("inline") as own:
            return run_seed(place, seed, size, own)
    chosen: Size = SIZES[size]
    with open_world(place, chosen, size, seed) as settings:
        _, content = recipes.load_recipe("quickstart")
        given = [f"{name}={value}" for name, value in {**settings, **chosen.settings, "seed": seed}.items()]
        options = {step.label: values for step, values in recipes.resolve(content, given)}
        first = [(step, options[step.label]) for step in content.stages if step.label in BOOTSTRAP]
        run(first, place, work)
    train = {k: v for k, v in vars(options["retrain-raw"]).items() if k not in ("out", "web", "pairs")}
    evaluate = {k: v for k, v in vars(options["evaluate-raw"]).items() if k not in ("out", "model")}
    content = recipes.Recipe(version=1, stages=arms(train, evaluate, seed))
    run(recipes.resolve(content, []), place, work)
    found = {}
    for row in ROWS:
        metrics = json.loads((place.path / "runs" / f"{checkpoint_of(row)}.json").read_bytes())["metrics"]
        found[row] = {name: metrics[name] for name in METRICS}
    for row, rule in (("both", "both"), ("both, beam", "both-beam")):
        found[row]["noise"] = dropped_share(place, rule)
    return found


def run(steps: list[tuple[Step, Any]], place: Workspace, work: Executor) -> None:
    """Run steps and say what each came to."""
    for _, summary in recipes.run_recipe("bootstrapping", steps, place, work, quiet=True):
        print(summary.line(), flush=True)
        if summary.counts is not None:
            summary.counts.check()


def dropped_share(place: Workspace, rule: str) -> float:
    """The share of synthetic texts that the rule drops, in percent."""
    verdicts = [
        row for table in place.part("verdicts", rule).tables(["source", "keep"]) for row in table.to_pylist()
    ]
    synthetic = [row["keep"] for row in verdicts if row["source"] == "synthetic"]
    return 100.0 * (1 - sum(synthetic) / max(1, len(synthetic)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds")
    parser.add_argument("--workspace", default="", help="keep the workspaces here (and continue them)")
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.add_argument(
        "--jobs", type=int, default=1, help="seeds run at a time, inline, a thread or more each"
    )
    parser.add_argument("--markdown", action="store_true", help="also print the table as Markdown")


def measure(args: argparse.Namespace, record: Record) -> None:
    """All seeds, then means and spreads."""
    seeds = 1 if args.quick else args.seeds
    size = "miniature" if args.quick else "full"
    with tempfile.TemporaryDirectory() as scratch:
        places = [
            Workspace(Path(args.workspace or scratch) / f"seed{seed}")
            for seed in range(args.seed, args.seed + seeds)
        ]
        with ExitStack() as stack:
            each: Callable[..., Iterator[dict[str, dict[str, float]]]] = map
            work: Executor | None = None
            if args.jobs > 1:
                threads = max(1, torch.get_num_threads() // args.jobs)
                os.environ["OMP_NUM_THREADS"] = str(threads)  # read by the workers when they import torch
                pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
                each = stack.enter_context(pool).map
            else:
                work = stack.enter_context(executor(args.execution))
            found = list(each(partial(run_seed, size=size, work=work), places, itertools.count(args.seed)))
    lines = ["| trained on | TR@1 | IR@1 | CIDEr | noise |", "|---|---|---|---|---|"]
    for row in ROWS:
        cells = []
        for name in (*METRICS, "noise"):
            values = [each[row][name] for each in found if name in each[row]]
            if not values:
                cells.append("")
                continue
            mean, spread = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
            record.figure(f"{row} {name}", mean)
            record.figure(f"{row} {name} spread", spread)
            cells.append(f"{mean:.1f} +- {spread:.1f}" + ("%" if name == "noise" else ""))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    if args.markdown:
        print("\n".join(lines))
    # At the quick size nothing is learned: what can be asked there is that every arm ran and was measured.
    record.target("arms measured", len(ROWS) * len(found), "==", len(ROWS) * seeds)
    if not args.quick:
        for name in METRICS:
            for other in ("none", "filter", "captioner"):
                gain = record.figures[f"both {name}"] - record.figures[f"{other} {name}"]
                record.target(f"both - {other}, {name}", gain, ">", 0)


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
