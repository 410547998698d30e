"""Probabilities of found and of synthetic texts on the generated world, against its truth.

Captioner and filter are the quickstart's. Its held-out human pictures calibrate the filter, and the captioner writes for them
as it does for the web (`calibrate --calibration-captions`).

    error       expected calibration error against the truth, in ten bins
    precision   share of true texts among those of a probability of at least the number behind it
    before      share of true texts among all of that kind

A synthetic text is true where all that it says is; `complete` asks that it names every object too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import fmean

import pyarrow.parquet as pq
from _form import Record, main
from _generated import bootstrapped
from _photographs import step
from _recipes import for_seeds, run_steps

from capfilt.calibration.ranking import roc_auc
from capfilt.calibration.share import calibration_error
from capfilt.execution.run import Executor
from capfilt.quickstart import truth
from capfilt.quickstart.world import Scene
from capfilt.tables.calibrations import read
from capfilt.tables.workspace import Workspace

THRESHOLDS = (0.5, 0.7)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--seeds", type=int, default=3, help="how many worlds")
    parser.add_argument("--workspace", default="", help="keep the workspaces here (and continue them)")
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.set_defaults(jobs=1)


def run_one(place: Workspace, seed: int, work: Executor, size: str) -> dict[str, float]:
    """The figures of one world."""
    options = bootstrapped(place, seed, work, size)
    caption = vars(options["caption"])
    judge = {
        "images": "web", "captions": ["captioner"], "filter": ["filter"], "calibration": "held",
        "calibration_captions": ["captioner-held"],
    }  # fmt: skip
    run_steps(
        [
            step("subset", "held", {"images": "human", "dataset": "held", "splits": ["test"]}),
            step("caption", "caption-web", caption),
            step("caption", "caption-held", {**caption, "images": "held", "out": "captioner-held"}),
            step("calibrate", "calibrate", judge),
        ],
        place,
        work,
    )
    facts = {row["url"]: row for row in pq.read_table(place.path / "world" / "truth.parquet").to_pylist()}
    pages = {
        row["image_id"]: facts[row["url"]]
        for table in place.part("images", "web").tables(["image_id", "url"])
        for row in table.to_pylist()
    }
    written = {
        row["text_id"]: row["text"]
        for table in place.part("captions", "captioner").tables(["text_id", "text"])
        for row in table.to_pylist()
    }
    found: list[tuple[float, bool]] = []
    synthetic: list[tuple[float, bool]] = []
    complete: list[tuple[float, bool]] = []
    for table in place.part("scores", "calibrated").tables(["text_id", "image_id", "match_probability"]):
        for row in table.to_pylist():
            p, page = row["match_probability"], pages[row["image_id"]]
            if p is None:
                continue
            if row["text_id"] not in written:
                found.append((p, truth.KINDS[page["kind"]].true))
                continue
            text, scene = written[row["text_id"]], Scene.from_json(page["scene"])
            synthetic.append((p, truth.is_true(text, scene)))
            complete.append((p, truth.is_complete_and_true(text, scene)))
    figures: dict[str, float] = {}
    for name, texts in (("found", found), ("synthetic", synthetic), ("complete", complete)):
        figures |= _figures(name, texts) if texts else {}
    calibration = read(place.part("scores", "calibrated"))
    assert calibration is not None
    return {
        **figures,
        "share": calibration["share"],
        "synthetic auc near": calibration["synthetic"]["auc_near"],
    }


def _figures(name: str, texts: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """Of texts with a probability, which are true or not."""
    ps, true = zip(*texts, strict=True)
    made = {
        f"{name} texts": float(len(texts)),
        f"{name} before": fmean(true),
        f"{name} area": roc_auc(ps, true),
        f"{name} error": calibration_error(ps, true),
    }
    for threshold in THRESHOLDS:
        kept = [good for p, good in texts if p >= threshold]
        made[f"{name} kept {threshold}"] = len(kept) / len(texts)
        if kept:
            made[f"{name} precision {threshold}"] = fmean(kept)
    return made


def measure(args: argparse.Namespace, record: Record) -> None:
    """Means over the worlds."""
    seeds = 1 if args.quick else args.seeds
    every = for_seeds(args, seeds, partial(run_one, size="small" if args.quick else "full"))
    for name in every[0]:
        values = [each[name] for each in every if name in each]
        if name == "synthetic error" and not args.quick:
            record.target(name, fmean(values), "<=", 0.1)
        else:
            record.figure(name, fmean(values))
    record.target("worlds measured", len(every), "==", seeds)


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
