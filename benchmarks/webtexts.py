"""Alt texts and figure captions of web pages as found: how a calibration judges texts that nobody planted.

With --data DIR, a folder with clean/ (captions.json, images) and web/ (pairs.parquet, images): a locked-tower CLIP learns from
the human pairs of the training split, a part of which calibrates it. Then it judges the texts of web/ as found, and with a
share of them shuffled within their source.

    area        ROC-AUC of the texts as found, against the same texts all shuffled within their source
    share q     estimated share of true pairs with the share q shuffled; shuffling leaves 1 - q of it
    by eye      share of 200 texts that were labelled before their scores were seen, with Wilson's interval

A text was labelled true where it names the main thing that is to be seen. WRONG_BY_EYE and the rule of the sample are here; the
texts are not. The judge learned from photographs. Half of these pictures are charts, maps, scans and screenshots.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from _form import Record, main
from _photographs import by_text, step, taken
from _recipes import for_seeds, run_steps

from capfilt.calibration.ranking import roc_auc
from capfilt.errors import UserError
from capfilt.execution.run import Executor
from capfilt.tables.calibrations import read
from capfilt.tables.workspace import Workspace

SHARES = (0.0, 0.3, 0.6, 1.0)
"""Of the texts that are shuffled within their source."""
COLUMNS = ("alt_text", "figure_caption")
LABELLED = 200
WRONG_BY_EYE = frozenset({11, 45, 52, 54, 55, 56, 62, 64, 98, 134, 164, 176, 184, 187, 195, 199})
"""Places in the sample whose text names nothing that is to be seen: context, a question, a file's name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The benchmark's own options."""
    parser.add_argument("--data", required=True, metavar="DIR", help="folder with clean/ and web/")
    parser.add_argument("--workspace", default="", help="keep the workspace here (and continue it)")
    parser.add_argument("--execution", default="inline", help="ray or inline")
    parser.set_defaults(jobs=1)


def labelled(texts: int) -> list[int]:
    """The numbers of the texts that were labelled, in order; of the texts in the order of rows, then of COLUMNS."""
    return sorted(random.Random(0).sample(range(texts), LABELLED))


def shuffled(table: pa.Table, share: float, seed: int) -> pa.Table:
    """The table with the texts of a share of its rows exchanged among rows of the same source, each column by itself."""
    rng = np.random.default_rng([seed, round(100 * share)])
    sources = np.array(table["source_repo"].to_pylist())
    columns = {name: table[name].to_pylist() for name in COLUMNS}
    for source in np.unique(sources):
        for name in COLUMNS:
            able = [row for row in np.flatnonzero(sources == source) if columns[name][row]]
            moved = rng.permutation(able)[: round(share * len(able))]
            said = [columns[name][row] for row in moved]
            # One place on: no text stays where it was.
            for row, text in zip(moved, [*said[1:], *said[:1]], strict=True):
                columns[name][row] = text
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.string()))
    return table


def run_one(place: Workspace, seed: int, work: Executor, data: Path, quick: bool) -> dict[str, Any]:
    """All stages; the calibration of each share, and the texts' probabilities."""
    captions = taken(data, place.path, quick)
    clean = {"images": "clean", "splits": ["train"]}
    held = 0.5 if quick else 0.15
    source = {"source_path": str(captions), "images": str(data / "clean" / "images"), "format": "coco"}
    steps = [
        step("ingest", "ingest", {**source, "dataset": "clean", "shard_size": 100_000}),
        step("subset", "human", {**clean, "dataset": "human", "share_to": 1 - held}),
        step("subset", "calibration", {**clean, "dataset": "calibration", "share_from": 1 - held}),
    ]
    size = (
        {"preset": "tiny", "batch_size": 32, "steps": 100, "learning_rate": 1e-2}
        if quick
        else {"preset": "lite2-minilm", "batch_size": 256, "steps": 800}
    )
    train = {
        "human": ["human"],
        "learning_rate": 5e-4,
        "save_every": 0,
        "seed": seed,
        "out": "web-judge",
        **size,
    }
    steps.append(step("retrain-locked", "judge", train))
    table = pq.read_table(data / "web" / "pairs.parquet")
    table = table.slice(0, 200) if quick else table
    for share in SHARES:
        name = f"web{100 * share:.0f}"
        path = place.path / f"{name}.parquet"
        place.path.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            pq.write_table(shuffled(table, share, seed), path)
        steps.append(
            step(
                "ingest",
                f"ingest-{name}",
                {
                    "source_path": str(path), "images": str(data / "web" / "images"), "dataset": name, "source": "web",
                    "caption_col": list(COLUMNS), "shard_size": 100_000,
                },
            )
        )  # fmt: skip
        given = {
            "images": name,
            "filter": ["web-judge"],
            "calibration": "calibration",
            "neighbours": ["human"],
        }
        steps.append(step("calibrate", f"calibrate-{name}", {**given, "out": name}))
    run_steps(steps, place, work)
    names = [f"web{100 * share:.0f}" for share in SHARES]
    return {
        "made": {name: read(place.part("scores", name)) for name in names},
        "texts": {
            name: {key: p for key, (p,) in by_text(place, name, name, ["match_probability"]).items()}
            for name in names
        },
        "table": table,
    }


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share."""
    p, spread = hits / count, z * z / count
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / count + spread / (4 * count)) / (1 + spread)
    return centre - half, centre + half


def measure(args: argparse.Namespace, record: Record) -> None:
    """The figures that the module's docstring names."""
    data = Path(args.data)
    if not (data / "web" / "pairs.parquet").is_file():
        raise UserError(f"--data {data}: has no web/pairs.parquet; name the folder that holds web/")
    (found,) = for_seeds(args, 1, lambda place, seed, work: run_one(place, seed, work, data, args.quick))
    made, texts = found["made"], found["texts"]
    right, wrong = list(texts["web0"].values()), list(texts["web100"].values())
    record.figure("area", roc_auc([*right, *wrong], [True] * len(right) + [False] * len(wrong)))
    for share in SHARES:
        each = made[f"web{100 * share:.0f}"]
        record.figure(f"share {share:g}", each["share"])
        for end, value in zip(("low", "high"), each["share_interval"], strict=True):
            record.figure(f"share {share:g} {end}", value)
        record.figure(f"share {share:g} near", each["share_near"])
    for share in SHARES[1:3]:
        off = abs(made[f"web{100 * share:.0f}"]["share"] - (1 - share) * made["web0"]["share"])
        if args.quick:
            record.figure(f"share {share:g} off (1 - q)", off)
        else:
            record.target(f"share {share:g} off (1 - q)", off, "<=", 0.05)
    record.figure("warnings", len(made["web0"]["warnings"]))
    if not args.quick:
        _by_eye(found["table"], texts["web0"], record)
    record.target("texts judged", len(right), ">=", 1)
    print(json.dumps({name: each["warnings"] for name, each in made.items()}, indent=1))


def _by_eye(table: pa.Table, judged: dict[tuple[str, str], float], record: Record) -> None:
    rows = table.select(["file_name", *COLUMNS]).to_pylist()
    every = [(row["file_name"], row[name]) for row in rows for name in COLUMNS if row[name]]
    places = labelled(len(every))
    true = [place not in WRONG_BY_EYE for place in range(LABELLED)]
    record.figure("by eye", sum(true) / LABELLED)
    for end, value in zip(("low", "high"), wilson(sum(true), LABELLED), strict=True):
        record.figure(f"by eye {end}", value)
    both = [
        (judged[every[number]], label)
        for number, label in zip(places, true, strict=True)
        if every[number] in judged
    ]
    record.figure("labelled and judged", len(both))
    record.figure("area by eye", roc_auc([p for p, _ in both], [label for _, label in both]))
    record.figure("mean probability of the labelled", float(np.mean([p for p, _ in both])))


if __name__ == "__main__":
    main(__doc__, measure, add_arguments)
