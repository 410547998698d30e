"""The paper's ablation (BLIP, table 1 and table 2) on the generated world: what the captioner and the filter each add.

Its steps, its rows and its table live here. Real photographs do not (`_photographs.py`).
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import Any

from _form import Record
from _recipes import for_seeds, run, run_steps, spread

from capfilt import recipe as recipes
from capfilt.execution.run import Executor
from capfilt.quickstart.run import SIZES, Size, open_world
from capfilt.recipe import Step
from capfilt.tables.workspace import Workspace

METRICS = ("tr@1", "ir@1", "cider")
ROWS = ("none", "filter", "captioner", "both", "both, beam")
BOOTSTRAP = ("ingest", "download", "pretrain", "finetune-captioner", "finetune-filter")


def arms(
    train: dict[str, Any], evaluate: dict[str, Any], seed: int, keep_fraction: float = 0.0
) -> list[Step]:
    """The steps after the three models stand: captions twice, four rules, five models, five results.

    keep_fraction: of the rules that keep what the filter does; 0: by the threshold.
    """
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
    share = {"keep_fraction": keep_fraction} if keep_fraction else {}
    rules: dict[str, tuple[str, dict[str, Any]]] = {
        "filter": ("nucleus", {"sources": ["web"], **share}),
        "captioner": ("nucleus", {"sources": ["web", "synthetic"], "threshold": 0.0}),
        "both": ("nucleus", share),
        "both-beam": ("beam", share),
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


def bootstrapped(place: Workspace, seed: int, work: Executor, size: str) -> dict[str, Any]:
    """The quickstart's steps until captioner and filter stand. Returns the options of all of its steps."""
    chosen: Size = SIZES[size]
    with open_world(place, chosen, size, seed) as settings:
        _, content = recipes.load_recipe("quickstart")
        given = [f"{name}={value}" for name, value in {**settings, **chosen.settings, "seed": seed}.items()]
        options = {step.label: values for step, values in recipes.resolve(content, given)}
        first = [(step, options[step.label]) for step in content.stages if step.label in BOOTSTRAP]
        run(first, place, work)
    return options


def run_seed(place: Workspace, seed: int, work: Executor, size: str) -> dict[str, dict[str, float]]:
    """Run everything for one seed. Returns the metrics of each row."""
    options = bootstrapped(place, seed, work, size)
    train = {k: v for k, v in vars(options["retrain-raw"]).items() if k not in ("out", "web", "pairs")}
    evaluate = {k: v for k, v in vars(options["evaluate-raw"]).items() if k not in ("out", "model")}
    run_steps(arms(train, evaluate, seed, options["select"].keep_fraction), place, work)
    found = {}
    for row in ROWS:
        metrics = json.loads((place.path / "runs" / f"{checkpoint_of(row)}.json").read_bytes())["metrics"]
        found[row] = {name: metrics[name] for name in METRICS}
    for row, rule in (("both", "both"), ("both, beam", "both-beam")):
        found[row]["noise"] = dropped_share(place, rule)
    return found


def dropped_share(place: Workspace, rule: str) -> float:
    """The share of synthetic texts that the rule drops, in percent."""
    verdicts = [
        row for table in place.part("verdicts", rule).tables(["source", "keep"]) for row in table.to_pylist()
    ]
    synthetic = [row["keep"] for row in verdicts if row["source"] == "synthetic"]
    return 100.0 * (1 - sum(synthetic) / max(1, len(synthetic)))


def measure(args: argparse.Namespace, record: Record) -> None:
    """All seeds, then means and spreads."""
    seeds = 1 if args.quick else args.seeds
    found = for_seeds(args, seeds, partial(run_seed, size="miniature" if args.quick else "full"))
    lines = ["| trained on | TR@1 | IR@1 | CIDEr | noise |", "|---|---|---|---|---|"]
    for row in ROWS:
        cells = []
        for name in (*METRICS, "noise"):
            values = [each[row][name] for each in found if name in each[row]]
            if not values:
                cells.append("")
                continue
            mean, deviation = spread(values)
            record.figure(f"{row} {name}", mean)
            record.figure(f"{row} {name} spread", deviation)
            cells.append(f"{mean:.1f} +- {deviation:.1f}" + ("%" if name == "noise" else ""))
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
