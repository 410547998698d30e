"""People's ratings of texts (Flickr8k-Expert) against a judge that saw a fifth of the training images: Kendall's tau-c.

With --data DIR, a folder with clean/ and tasks/itm_expert/data.jsonl: the draw of bootstrapping.py's seed, a locked-tower CLIP
trained on its human pairs, and a calibration on its calibration images. The rated pairs are judged as a corpus of their own. A
picture's own captions are left out, and no caption of a judged picture is read: they are of the test split.

    fused       match_probability; the other lines are its signals one by one
    words       the length of the text, which no picture decides
    people      the first rating of each pair, by the mean of its others: a ceiling

Every figure is tau-c with single ratings; 0 is chance. Intervals are over images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from _form import Record, main
from _photographs import FAMILIES, QUICK, Protocol, by_text, parts, step, taken
from _recipes import for_seeds, run_steps

from capfilt.errors import UserError
from capfilt.execution.run import Executor
from capfilt.formats.examples.row import own_captions
from capfilt.stages.calibrate.judging import COSINE, HUB, NEAR_PICTURES, NEAR_TEXTS, WORDS
from capfilt.tables.publish import replace
from capfilt.tables.workspace import Workspace
from capfilt.tasks.filter_quality import kendall_tau_c_interval

COLUMNS = {
    "fused": "match_probability",
    "cosine": COSINE,
    "hub": HUB,
    "pictures": NEAR_PICTURES,
    "texts": NEAR_TEXTS,
    "words": WORDS,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with clean/ and tasks/")
    parser.add_argument("--seeds", type=int, default=1, help="how many draws of the human images")
    parser.add_argument("--workspace", default="", help="keep the workspace here (and continue it)")
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.set_defaults(jobs=1)


def rated(data: Path) -> list[dict[str, Any]]:
    """The rated pairs that are not a picture's own caption."""
    path = data / "tasks" / "itm_expert" / "data.jsonl"
    if not path.is_file():
        raise UserError(
            f"--data {data}: has no tasks/itm_expert/data.jsonl; name the folder that holds tasks/"
        )
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line, own in zip(lines, own_captions(lines), strict=True) if not own]


def run_one(place: Workspace, seed: int, work: Executor, data: Path, quick: bool) -> dict[str, Any]:
    """Judge, calibration and judged ratings of a draw: each rating's score by signal, the rating and its picture."""
    lines = rated(data)
    names = {name: number for number, name in enumerate(dict.fromkeys(line["image"] for line in lines))}
    coco = {
        "images": [{"id": number, "file_name": name, "split": "test"} for name, number in names.items()],
        "annotations": [
            {"id": number, "image_id": names[line["image"]], "caption": line["caption"]}
            for number, line in enumerate(lines)
        ],
    }
    captions = taken(data, place.path, quick)
    replace(place.path / "rated.json", json.dumps(coco).encode())
    family = FAMILIES["locked"]
    settings = Protocol(str(data), "locked", 0.4 if quick else 0.2, 0.6, 0.0, 0.0, (), (), quick)
    steps, rate = QUICK[0] if quick else (400, 5e-4)
    train = {**family.train, **(family.quick if quick else {}), "human": ["human"], "seed": seed}
    source = {
        "source_path": str(place.path / "rated.json"),
        "images": str(data),
        "format": "coco",
        "source": "web",
    }
    given = {
        "images": "rated",
        "filter": ["judge"],
        "calibration": "calibration",
        "neighbours": ["human"],
        "out": "rated",
    }
    run_steps(
        [
            *parts(settings, captions, seed),
            step("retrain-locked", "judge", {**train, "steps": steps, "learning_rate": rate, "out": "judge"}),
            step("ingest", "rated", {**source, "dataset": "rated", "shard_size": 100_000}),
            step("calibrate", "calibrate", given),
        ],
        place,
        work,
    )
    found = by_text(place, "rated", "rated", list(COLUMNS.values()))
    kept = [line for line in lines if (line["image"], line["caption"]) in found]
    repeats = [len(line["ratings"]) for line in kept]
    scores = np.array([found[line["image"], line["caption"]] for line in kept])
    first, others = [line["ratings"][0] for line in kept], [np.mean(line["ratings"][1:]) for line in kept]
    people = kendall_tau_c_interval(first, others, [names[line["image"]] for line in kept], seed=seed)
    return {
        "scores": np.repeat(scores, repeats, axis=0),
        "ratings": np.array([rating for line in kept for rating in line["ratings"]], dtype=float),
        "images": np.repeat([names[line["image"]] for line in kept], repeats),
        "pairs": len(kept),
        "people": (people.value, people.low, people.high),
    }


def measure(args: argparse.Namespace, record: Record) -> None:
    """The figures that the module's docstring names; the interval is the first draw's."""
    data = Path(args.data)
    draws = for_seeds(
        args, args.seeds, lambda place, seed, work: run_one(place, seed, work, data, args.quick)
    )
    record.figure("pairs", draws[0]["pairs"])
    record.figure("ratings", len(draws[0]["ratings"]))
    for number, name in enumerate(COLUMNS):
        found = [
            kendall_tau_c_interval(each["ratings"], each["scores"][:, number], each["images"], seed=args.seed)
            for each in draws
        ]
        value = float(np.mean([each.value for each in found]))
        if name == "fused" and not args.quick:
            record.target("fused", value, ">=", 0.45)
        else:
            record.figure(name, value)
        record.figure(f"{name} low", found[0].low)
        record.figure(f"{name} high", found[0].high)
    for name, value in zip(("people", "people low", "people high"), draws[0]["people"], strict=True):
        record.figure(name, value)
    record.target("pairs judged", draws[0]["pairs"], ">=", 1)


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
