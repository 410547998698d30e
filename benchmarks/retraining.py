"""Every model that `retrain` knows, on raw and on curated pairs of the generated world, judged by the tasks it can do.

For every seed one world and one curated corpus, made by BLIP's bootstrapping (`bootstrapping.py`, its row `both`); then each
model twice from nothing, with the same options and the same number of steps: on human pairs and every web text (raw), and on
human pairs and the web and synthetic texts that the filter keeps (curated). The tasks: retrieval over the 500 held-out images
with five captions each (ranks by embeddings, or by matching every pair where a model has none), telling a caption from one with
a single fact changed (`choice`, 50 by chance), and captioning. The figures are means over seeds, `+-` the standard deviation.
`--markdown` prints the table of the documentation.

`--photographs DIR` instead: the same on the workspace that `capfilt run photographs` made, every seed on the same pairs.
Curated are that recipe's pairs, drawn by their probability. Every model sees through the recipe's frozen ImageNet trunk, and is
asked for 300 images of Flickr8k's test split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from _form import Record, main
from _generated import arms, bootstrapped
from _recipes import run_steps, spread

from capfilt import recipe as recipes
from capfilt.execution.run import Executor, executor
from capfilt.quickstart.language import one_attribute_off, state, write
from capfilt.quickstart.run import SIZES
from capfilt.quickstart.truth import is_true
from capfilt.quickstart.web import build_human
from capfilt.recipe import Step
from capfilt.stages.registry import stage_command
from capfilt.tables.workspace import Workspace

PHOTOGRAPHS: Mapping[str, Mapping[str, Any]] = {
    "raw": {"web": ["web", "alt"]},
    "curated": {"web": [], "pairs": ["curated-web", "curated-alt"]},
}
CORPORA: Mapping[str, Mapping[str, Any]] = {
    "raw": {"web": ["web"]},
    "curated": {"web": [], "pairs": ["both"]},
}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "blip": {},
    "clip": {},
    # A single stream sits at its prior for long: more words to name, a higher rate and more steps get it off.
    "vilt": {"learning_rate": 1.5e-3, "mask_share": 0.4},
    "albef": {},
}
"""What each model's training has of its own; everything else is the quickstart's."""
LONGER = {"vilt": 1.4}
"""How many times the quickstart's steps a model is trained for, where that is not 1; on both corpora alike."""
SEEING: Mapping[str, Mapping[str, Any]] = {**MODELS, "vilt": {"mask_share": 0.4}}
LONGER_SEEING = {"vilt": 5}
"""The same for photographs."""
METRICS = ("tr@1", "ir@1", "choice_itc", "choice_itm", "cider")
TIMES_CHANCE = 5.0
"""What R@1 must be of a random order's, both ways."""


def corpus_of(place: Workspace, seed: int, size: str, work: Executor) -> dict[str, Any]:
    """Makes the world and its curated pairs where they are not there yet. Returns the quickstart's options of training."""
    options = bootstrapped(place, seed, work, size)
    wanted = ("caption-nucleus", "score-nucleus", "select-both")
    run_steps(
        [step for step in arms({}, {}, seed, options["select"].keep_fraction) if step.label in wanted],
        place,
        work,
    )
    return vars(options["retrain-raw"])


def write_choices(path: Path, seed: int, images: int) -> Path:
    """For each held-out image a true caption and the same with one fact changed that makes it false, as JSON Lines."""
    lines = []
    for image in build_human(seed, {"test": images}, 1):
        rng = np.random.default_rng((seed, 10_000, image.id))
        for _ in range(100):
            true = state(image.scene, rng)
            wrong, changed = one_attribute_off(true, rng)
            if not is_true(wrong, image.scene):
                break
        record = {"id": image.id, "image": image.file_name, "caption": write(true, rng), "split": "test"}
        record |= {"negative_caption": write(wrong, rng), "category": changed}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def compared(
    models: list[str],
    train: Mapping[str, Any],
    corpora: Mapping[str, Mapping[str, Any]],
    evaluate: Mapping[str, Any],
    own: Mapping[str, Mapping[str, Any]] = MODELS,
    longer: Mapping[str, float] = LONGER,
    seed: int | None = None,
    precision: str = "auto",
) -> list[Step]:
    """Of each model two checkpoints and two results; `seed` in place of the one that `train` has, and then in their names."""
    left_out = ("out", "web", "pairs", "verdicts")
    common = {name: value for name, value in train.items() if name not in left_out} | {"precision": precision}
    steps = []
    for model in models:
        captions = ["captioning"] if model == "blip" else []
        for corpus, data in corpora.items():
            name = f"{model}-{corpus}"
            options = {**common, **own[model], **data, "out": name}
            options["steps"] = round(common["steps"] * longer.get(model, 1))
            if seed is not None:
                name = f"{name}-seed{seed}"
                options |= {"seed": seed, "out": name}
            # What the quickstart's BLIP has and this model has not (queue, momentum, hardness) is no option of it.
            known = stage_command(f"retrain-{model}").options.__dataclass_fields__
            options = {each: value for each, value in options.items() if each in known}
            steps.append(Step(stage=f"retrain-{model}", name=f"retrain-{name}", options=options))
            judged = {
                "model": name,
                "out": name,
                "split": "test",
                "rerank": 0,
                "method": "greedy",
                "batch_size": 100,
                "precision": precision,
            }
            judged |= {**evaluate, "tasks": [*evaluate["tasks"], *captions]}
            steps.append(Step(stage="evaluate", name=f"evaluate-{name}", options=judged))
    return steps


def generated(
    place: Workspace, seed: int, size: str, models: list[str], precision: str, work: Executor
) -> list[Step]:
    """What is to be run on the generated world of this seed, which is made where it is not there yet."""
    train = corpus_of(place, seed, size, work)
    choices = write_choices(place.path / "world" / "choices.jsonl", seed, SIZES[size].human["test"])
    options = {"source_path": str(choices), "images": ["human"], "dataset": "changed"}
    evaluate = {"images": "human", "examples": ["changed"], "tasks": ["retrieval", "choice"]}
    return [
        Step(stage="examples", name="choices", options=options),
        *compared(models, train, CORPORA, evaluate, precision=precision),
    ]


def photographed(models: list[str], seed: int, precision: str) -> list[Step]:
    """What is to be run on the photographs: the pairs are the same for every seed, a model's start and its batches are not."""
    _, content = recipes.load_recipe("photographs")
    options = {step.label: values for step, values in recipes.resolve(content, ["data=."])}
    evaluate = {"images": "clean", "tasks": ["retrieval"], "limit": 300}
    train = vars(options["retrain-raw"])
    return compared(models, train, PHOTOGRAPHS, evaluate, SEEING, LONGER_SEEING, seed, precision)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument(
        "--seeds", type=int, default=3, help="how many worlds, or starts on the same photographs"
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), choices=list(MODELS), help="which models"
    )
    parser.add_argument(
        "--workspace", default="", help="keep the workspaces here, and go on from bootstrapping.py's"
    )
    parser.add_argument(
        "--photographs", default="", metavar="DIR", help="the workspace of the recipe photographs"
    )
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.add_argument("--precision", default="auto", help="of training and evaluation: auto, fp32 or bf16")
    parser.add_argument("--markdown", action="store_true", help="also print the table as Markdown")


def measure(args: argparse.Namespace, record: Record) -> None:
    """All seeds and models, then means and spreads."""
    seeds = range(args.seed, args.seed + (1 if args.quick else args.seeds))
    size = "miniature" if args.quick else "full"
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as scratch, executor(args.execution) as work:
        for seed in seeds:
            if args.photographs:
                place = Workspace(Path(args.photographs))
                steps = photographed(args.models, seed, args.precision)
            else:
                place = Workspace(Path(args.workspace or scratch) / f"seed{seed}")
                steps = generated(place, seed, size, args.models, args.precision, work)
            run_steps(steps, place, work)
            for name in (step.label.removeprefix("evaluate-") for step in steps if step.stage == "evaluate"):
                result = json.loads((place.path / "runs" / f"{name}.json").read_bytes())
                found.setdefault(name.removesuffix(f"-seed{seed}"), []).append(result)
    lines = [f"| model | trained on | {' | '.join(METRICS)} |", "|---|---|" + "---|" * len(METRICS)]
    for name, each in found.items():
        cells = []
        for metric in METRICS:
            values = [one["metrics"][metric] for one in each if metric in one["metrics"]]
            if not values:
                cells.append("")
                continue
            mean, deviation = spread(values)
            record.figure(f"{name} {metric}", mean)
            record.figure(f"{name} {metric} spread", deviation)
            cells.append(f"{mean:.1f} +- {deviation:.1f}")
        model, _, corpus = name.partition("-")
        lines.append(f"| {model} | {corpus} | {' | '.join(cells)} |")
    if args.markdown:
        print("\n".join(lines))
    record.target("arms measured", sum(map(len, found.values())), "==", 2 * len(args.models) * len(seeds))
    if not args.quick:
        for name, each in found.items():
            for metric in ("tr@1", "ir@1"):
                times = record.figures[f"{name} {metric}"] / each[0]["baselines"][metric]
                record.target(f"{name} {metric}, times chance", times, ">=", TIMES_CHANCE)


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
