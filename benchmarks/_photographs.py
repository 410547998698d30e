"""Bootstrapping on real photographs with planted noise: which steps there are, and how each row's own training is chosen.

Families, rows, the steps of one draw and the choice on the val split live here. Figures and tables of the results do not
(`_figures.py`).

One draw has its own human and web images, planted noise, donors, calibration images, initial weights and sampling. Every row
trains at each number of steps and learning rate. The val split chooses, the choice is written to a file, and then the test
split is asked, once.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _recipes import run_steps

from capfilt.errors import UserError
from capfilt.execution.run import Executor
from capfilt.recipe import Step
from capfilt.tables.publish import replace
from capfilt.tables.texts import FOUND_COLUMNS, found_texts
from capfilt.tables.workspace import Workspace
from capfilt.tasks.comparison import Result

Parts = np.ndarray[Any, np.dtype[np.float64]]
METRICS = ("tr@1", "tr@10", "ir@1", "ir@10")
"""The val split chooses by the sum of these. Ranks by ITC."""
CALIBRATION = 0.15
"""Share of the human images that neither heads, banks nor captioners see."""
PRECISIONS = (0.8, 0.9, 0.95)
SAMPLE = {"train": 400, "val": 50, "test": 50}
"""Images of each split at the quick size."""


@dataclass(frozen=True)
class Family:
    """A family of models as judge and as what is retrained.

    Attributes:
        train: options of its training, at every row.
        grid: numbers of steps with a learning rate, of which each row has its own best.
        quick: options at the quick size.
        evaluate: further options of `evaluate` on the test split.
        judge: the family that judges, with the steps and the rate that the val split chose for it most often; "" for itself,
            as the val split chose the row of human pairs.
        rows: its rows unless others are asked for; () for all.
    """

    train: Mapping[str, Any]
    grid: tuple[tuple[int, float], ...]
    quick: Mapping[str, Any]
    evaluate: Mapping[str, Any] = field(default_factory=dict)
    judge: tuple[str, int, float] = ("", 0, 0.0)
    rows: tuple[str, ...] = ()


_TRUNK = {"preset": "trunk", "warmup_steps": 50, "cache_features": True, "save_every": 0}
FAMILIES = {
    "locked": Family(
        {"preset": "lite2-minilm", "batch_size": 256, "warmup_steps": 20, "save_every": 0},
        ((100, 1e-3), (200, 1e-3), (400, 5e-4), (400, 1e-3), (800, 5e-4)),
        {"preset": "tiny", "batch_size": 32, "warmup_steps": 5},
    ),
    "clip": Family(
        {**_TRUNK, "vocab_size": 4000, "batch_size": 256, "max_text_tokens": 30},
        tuple(itertools.product((80, 140, 200, 300, 400), (5e-4, 1e-3))),
        {"preset": "tiny", "batch_size": 32, "warmup_steps": 5, "cache_features": False},
        rows=("raw", "human", "mixed", "then", "cut", "weights", "oracle"),
    ),
    "blip": Family(
        {**_TRUNK, "batch_size": 64, "queue_size": 0, "momentum": 0.0, "hardness_ramp_steps": 300},
        ((100, 1e-3), (200, 1e-3), (400, 1e-3)),
        {"preset": "tiny", "batch_size": 32, "warmup_steps": 5, "cache_features": False},
        {"tasks": ["retrieval", "captioning"], "method": "greedy"},
        ("locked", 400, 5e-4),
        ("raw", "human", "mixed", "cut", "weights", "oracle"),
    ),
}
QUICK = ((10, 1e-3), (20, 1e-3))
"""The grid at the quick size."""


@dataclass(frozen=True)
class Row:
    """A row of the table: on which pairs its model is trained.

    Attributes:
        title: as printed.
        data: options of the training that name its pairs.
        first: the same of a training before it, of two thirds of the steps; the row's own then has the last third.
        trivial: whether curation is measured against it.
        steps: stages that make the pairs, as (stage, options); `out` is the row's name.
        like: a row whose steps and learning rate are this one's too: a change to that row's judge is measured, and no other.
        scores: the scores part by which its pairs were chosen.
    """

    title: str
    data: Mapping[str, Any]
    first: Mapping[str, Any] = field(default_factory=dict)
    trivial: bool = False
    steps: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    like: str = ""
    scores: str = ""


JUDGE, JUDGED, SECOND, JUDGES = "human", "judge", "second", "judges"
FOLDS = 4
"""Of the second round."""
MORE_JUDGES = (1000, 2000)
"""Further judges of the row JUDGES have these numbers on top of the draw's seed."""
_RAW = {"human": ["human"], "web": ["web"]}
_SELECT = {"images": "web", "scores": JUDGED, "by": "match_probability", "pairs": False}


def _weighted(name: str, scores: str) -> dict[str, Any]:
    """A row's data and steps: human pairs, and web pairs drawn by a part's probability."""
    made = {**_SELECT, "scores": scores, "threshold": 0.0, "weight": "match_probability"}
    return {
        "data": {"human": ["human"], "verdicts": [f"web={name}"]},
        "steps": (("select", made),),
        "scores": scores,
    }


def _refitted(name: str, title: str, signals: Sequence[str]) -> Row:
    """The row `weights` by other signals: nothing is judged again."""
    row = _weighted(name, name)
    fit = {"judged": JUDGED, "signals": list(signals)}
    return Row(title, row["data"], steps=(("calibrate", fit), *row["steps"]), like="weights", scores=name)


_CUT = {"human": ["human"], "verdicts": ["web=cut"]}
_WEIGHTS = _weighted("weights", JUDGED)
SIGNALS = ("itc_score", "hub_score", "image_neighbours", "text_neighbours")
ROWS = {
    "raw": Row("human + web", _RAW, trivial=True),
    "human": Row("human only", {"human": ["human"]}, trivial=True),
    "mixed": Row("human:web drawn 4:1", {**_RAW, "mix": ["human=4", "web=1"]}, trivial=True),
    "then": Row("human + web, then human", {"human": ["human"]}, first=_RAW, trivial=True),
    "cut": Row(
        "human + web at p >= 0.5",
        _CUT,
        steps=(("select", {**_SELECT, "threshold": 0.5}),),
        scores=JUDGED,
    ),
    "weights": Row("human + web, drawn by p", **_WEIGHTS),
    "loss": Row(
        "the same, p in the losses", {**_WEIGHTS["data"], "weights": "loss"}, like="weights", scores=JUDGED
    ),
    **{
        dropped: Row(
            f"p >= 0.5, dropped ones {named}", {**_CUT, "dropped": dropped}, like="cut", scores=JUDGED
        )
        for dropped, named in (("negatives", "as negatives"), ("soft", "with soft targets"))
    },
    "second": Row("the same, second round", **_weighted("second", SECOND)),
    "judges": Row("by p of three judges", **_weighted("judges", JUDGES), like="weights"),
    "cosine": _refitted("cosine", "by p of the cosine alone", SIGNALS[:1]),
    "hub": _refitted("hub", "by p of the hub score alone", SIGNALS[1:2]),
    **{
        f"no-{left}": _refitted(
            f"no-{left}", f"fused without {left}", [each for each in SIGNALS if each != left]
        )
        for left in SIGNALS
    },
    "oracle": Row(
        "human + true web",
        {"human": ["human"], "verdicts": ["web=oracle"]},
        steps=(("select", {**_SELECT, "threshold": 0.0, "require": "planted[1] = 'true'"}),),
    ),
}


@dataclass(frozen=True)
class Protocol:
    """Settings that all draws share.

    Attributes:
        data: folder with clean/captions.json (COCO captions with splits) and clean/images.
        human: share of the training images whose captions are human pairs, calibration images included.
        wrong, truncated, file_name: shares of the web images by what is planted in their text.
    """

    data: str
    family: str
    human: float
    wrong: float
    truncated: float
    file_name: float
    rows: tuple[str, ...]
    grid: tuple[tuple[int, float], ...]
    quick: bool

    @property
    def train(self) -> dict[str, Any]:
        """Options of every training."""
        return self.options_of(self.family)

    def options_of(self, family: str) -> dict[str, Any]:
        """Options of every training of a family."""
        chosen = FAMILIES[family]
        return {**chosen.train, **(chosen.quick if self.quick else {})}

    @property
    def judge(self) -> str:
        """The family that judges."""
        return FAMILIES[self.family].judge[0] or self.family


@dataclass(frozen=True)
class Trial:
    """One training of a row: its checkpoint is `name`."""

    row: str
    steps: int
    rate: float

    @property
    def name(self) -> str:
        return f"{self.row}-{self.steps}-{self.rate:g}"


def taken(data: Path, place: Path, quick: bool) -> Path:
    """The captions of Flickr8k's images, or of a sample of them, as a file of the workspace.

    Images that name another source are left out: neither the val nor the test split has any.
    """
    path = data / "clean" / "captions.json"
    if not path.is_file():
        raise UserError(f"--data {data}: has no clean/captions.json; name the folder that holds clean/")
    content = json.loads(path.read_bytes())
    images = [each for each in content["images"] if each.get("source", "flickr8k") == "flickr8k"]
    if quick:
        by_split = {name: [each for each in images if each["split"] == name] for name in SAMPLE}
        images = [
            each
            for name, count in SAMPLE.items()
            for each in by_split[name][:: max(1, len(by_split[name]) // count)][:count]
        ]
    ids = {each["id"] for each in images}
    notes = [each for each in content["annotations"] if each["image_id"] in ids]
    text = json.dumps({"images": images, "annotations": notes}).encode()
    made = place / "captions.json"
    if not made.exists() or made.read_bytes() != text:
        place.mkdir(parents=True, exist_ok=True)
        replace(made, text)
    return made


def parts(protocol: Protocol, captions: Path, seed: int) -> list[Step]:
    """The steps that make a draw's images: human, calibration and web."""
    p = protocol
    # The share that an image falls into is a hash of its part's name and its key: another name, another split.
    clean = f"clean{seed}"
    source = {
        "source_path": str(captions),
        "images": str(Path(p.data) / "clean" / "images"),
        "format": "coco",
    }
    share = {"images": clean, "splits": ["train"]}
    # A fit needs 50 calibration images, which 15% of a sample are not.
    trained = (0.5 if p.quick else 1 - CALIBRATION) * p.human
    noise = {"wrong": p.wrong, "truncated": p.truncated, "file_name": p.file_name, "seed": seed}
    return [
        # One shard, so that any web image can be a donor.
        step("ingest", "ingest", {**source, "dataset": clean, "shard_size": 100_000}),
        step("subset", "human", {**share, "dataset": "human", "share_to": trained}),
        step(
            "subset",
            "calibration",
            {**share, "dataset": "calibration", "share_from": trained, "share_to": p.human},
        ),
        step(
            "subset",
            "web",
            {**share, "dataset": "web", "role": "web", "share_from": p.human, "texts": 1, **noise},
        ),
    ]


def judging(protocol: Protocol, best: Trial, seed: int) -> list[Step]:
    """The steps that give every web text a probability by a checkpoint, and make of it each row's pairs.

    The second round trains a judge per fold, as the first one was trained, on human pairs and likely pairs of other folds.
    """
    given = {
        "images": "web", "filter": [best.name], "calibration": "calibration", "neighbours": ["human"], "folds": FOLDS,
    }  # fmt: skip
    steps = [step("calibrate", "calibrate", {**given, "out": JUDGED})]
    for asked in PRECISIONS:
        name = precision_name(asked)
        steps.append(step("select", name, {**_SELECT, "precision": asked, "out": name}))
    if any(ROWS[row].scores == SECOND for row in protocol.rows):
        likely = {"keep_fraction": 0.3} if protocol.quick else {"threshold": 0.8}
        for fold in range(FOLDS):
            name = f"not{fold}"
            made = {
                **_SELECT,
                **likely,
                "weight": "match_probability",
                "require": f"fold <> {fold}",
                "out": name,
            }
            data = {"human": ["human"], "verdicts": [f"web={name}"], "out": f"{SECOND}-{fold}", "seed": seed}
            options = {
                **protocol.options_of(protocol.judge),
                **data,
                "learning_rate": best.rate,
                "steps": best.steps,
            }
            steps += [
                step("select", name, made),
                step(f"retrain-{protocol.judge}", f"{SECOND}-{fold}", options),
            ]
        both = {**given, "filter": [best.name, f"{SECOND}-{{fold}}"], "out": SECOND}
        steps.append(step("calibrate", SECOND, both))
    if any(ROWS[row].scores == JUDGES for row in protocol.rows):
        names = [f"{JUDGES}-{more}" for more in MORE_JUDGES]
        options = {
            **protocol.options_of(protocol.judge),
            "human": ["human"],
            "learning_rate": best.rate,
            "steps": best.steps,
        }
        for name, more in zip(names, MORE_JUDGES, strict=True):
            steps.append(
                step(f"retrain-{protocol.judge}", name, {**options, "out": name, "seed": seed + more})
            )
        steps.append(step("calibrate", JUDGES, {**given, "filter": [best.name, *names], "out": JUDGES}))
    for row in protocol.rows:
        for stage, made in ROWS[row].steps:
            # A judge of a few steps is sure of nothing, so that 0.5 would keep no text.
            cut = {"threshold": 0.5, "keep_fraction": 0.4} if protocol.quick and made.get("threshold") else {}
            common = given if stage == "calibrate" else {}
            steps.append(step(stage, f"{stage}-{row}", {**common, **made, **cut, "out": row}))
    return steps


def step(stage: str, name: str, options: Mapping[str, Any]) -> Step:
    """A step of a recipe."""
    return Step(stage=stage, name=name, options=dict(options))


def precision_name(asked: float) -> str:
    """The verdicts part of a precision that was asked for."""
    return f"precision{100 * asked:.0f}"


def trained(protocol: Protocol, trial: Trial, seed: int) -> list[Step]:
    """The training of a trial: one stage, or two that follow each other."""
    row, stage = ROWS[trial.row], f"retrain-{protocol.family}"
    common = {**protocol.train, "seed": seed, "learning_rate": trial.rate}
    options = {**common, **row.data, "out": trial.name, "steps": trial.steps}
    if not row.first:
        return [step(stage, trial.name, options)]
    last = trial.steps // 3
    before = {**common, **row.first, "out": f"{trial.name}-first", "steps": trial.steps - last}
    # A checkpoint has its own architecture and vocabulary.
    options = {name: value for name, value in options.items() if name not in ("preset", "vocab_size")}
    options |= {"steps": last, "init": before["out"]}
    return [step(stage, before["out"], before), step(stage, trial.name, options)]


def evaluated(trial: Trial, split: str, seed: int, further: Mapping[str, Any]) -> Step:
    """The result of a trial on a split, `runs/SPLIT-NAME.json`."""
    name = f"{split}-{trial.name}"
    options = {"model": trial.name, "images": f"clean{seed}", "split": split, "out": name, "rerank": 0}
    options |= {"tasks": ["retrieval"], "resamples": 0, **further}
    return step("evaluate", name, options)


def result(place: Workspace, split: str, trial: Trial) -> Result:
    """The result file of a trial on a split."""
    name = f"{split}-{trial.name}"
    path = place.result(name)
    return Result(name, path, json.loads(path.read_bytes()))


def chosen(place: Workspace, row: str, sums: Mapping[Trial, float]) -> Trial:
    """The trial with the largest sum on val, the first of equals; `choices/ROW.json` says so from now on.

    Raises UserError where a choice among other trials, or by other sums, was made before: the test split has been asked.
    """
    best = max(sums, key=lambda trial: sums[trial])
    words = {"chosen": best.name, "val": {trial.name: round(total, 3) for trial, total in sums.items()}}
    path = place.path / "choices" / f"{row}.json"
    if path.exists() and json.loads(path.read_bytes()) != words:
        raise UserError(f"{path}: another choice was made there; give another --workspace")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, (json.dumps(words, indent=1) + "\n").encode())
    return best


def total(metrics: Mapping[str, float]) -> float:
    """The sum of the four recalls, of 400."""
    return sum(metrics[name] for name in METRICS)


@dataclass(frozen=True)
class Outcome:
    """A row's chosen training on the test split.

    Attributes:
        metrics: figures in percent.
        pictures: what each picture adds to each of the four recalls, float64 [4, N]; their means are the recalls.
        val: the same of the val split, by the sum of whose means it was chosen.
    """

    trial: Trial
    metrics: Mapping[str, float]
    pictures: Parts
    val: Parts


@dataclass(frozen=True)
class Draw:
    """One seed: its rows, its web texts as judged, by scores part, and the keys of its test and val pictures in order."""

    rows: Mapping[str, Outcome]
    texts: Mapping[str, Sequence[Mapping[str, Any]]]
    keys: tuple[str, ...]
    val_keys: tuple[str, ...]
    seconds: Mapping[str, float]


def run_draw(place: Workspace, seed: int, work: Executor, protocol: Protocol) -> Draw:
    """Run one draw, as far as it is not done yet. Returns its results."""
    clock = _Clock()
    captions = taken(Path(protocol.data), place.path, protocol.quick)
    run_steps(parts(protocol, captions, seed), place, work)
    clock.lap("images")
    rows: dict[str, Outcome] = {}
    family, *settled = FAMILIES[protocol.family].judge
    if family:
        judge = Trial(f"judge-{family}", *(QUICK[0] if protocol.quick else settled))
        options = {**protocol.options_of(family), "human": ["human"], "seed": seed, "out": judge.name}
        made = step(
            f"retrain-{family}", judge.name, {**options, "steps": judge.steps, "learning_rate": judge.rate}
        )
        run_steps([made, *judging(protocol, judge, seed)], place, work)
        clock.lap("judge")
    # The judge saw human pairs alone: without another family, the checkpoint of that row is it, as the val split chose it.
    for row in (JUDGE, *(row for row in protocol.rows if row != JUDGE)):
        like = ROWS[row].like
        grid = [(rows[like].trial.steps, rows[like].trial.rate)] if like else protocol.grid
        trials = [Trial(row, *each) for each in grid]
        steps = [each for trial in trials for each in trained(protocol, trial, seed)]
        run_steps([*steps, *(evaluated(trial, "val", seed, {}) for trial in trials)], place, work)
        sums = {trial: total(result(place, "val", trial).metrics) for trial in trials}
        best = chosen(place, row, sums)
        run_steps([evaluated(best, "test", seed, FAMILIES[protocol.family].evaluate)], place, work)
        found = result(place, "test", best)
        rows[row] = Outcome(best, found.metrics, pictures(found), pictures(result(place, "val", best)))
        clock.lap(row)
        if row == JUDGE and not family:
            run_steps(judging(protocol, best, seed), place, work)
            clock.lap("judge")
    parts_ = dict.fromkeys([JUDGED, *(ROWS[row].scores for row in protocol.rows if ROWS[row].scores)])
    texts = {name: judged(place, name) for name in parts_}
    return Draw(
        {row: rows[row] for row in protocol.rows},
        texts,
        keys(place, seed, "test"),
        keys(place, seed, "val"),
        clock.laps,
    )


def pictures(found: Result) -> Parts:
    """Each picture's part of the four recalls: float64 [4, N], pictures in the corpus's order; means are the recalls."""
    parts = []
    for name in METRICS:
        units = found.units(name)
        assert units is not None, f"{found.path}: {name} has no units"
        sums = units.sums()[:, 0]
        # Every query counts alike, so a picture with more texts weighs more.
        parts.append(100.0 * sums * len(sums) / len(units.columns))
    return np.stack(parts)


def judged(place: Workspace, scores: str) -> list[dict[str, Any]]:
    """Every web text's `planted` kind and `match_probability`, and by each precision asked for, whether it is kept."""
    tables = place.part("images", "web").tables(["image_id", "planted"])
    kinds = {row["image_id"]: row["planted"][0] for table in tables for row in table.to_pylist()}
    columns = ["image_id", "match_probability"]
    rows = [row for table in place.part("scores", scores).tables(columns) for row in table.to_pylist()]
    kept: dict[str, set[str]] = {}
    for name in map(precision_name, PRECISIONS):
        tables = place.part("verdicts", name).tables(["image_id", "keep"])
        kept[name] = {row["image_id"] for table in tables for row in table.to_pylist() if row["keep"]}
    return [
        {
            "kind": kinds[row["image_id"]],
            "probability": row["match_probability"],
            **{name: row["image_id"] in images for name, images in kept.items()},
        }
        for row in rows
    ]


def by_text(
    place: Workspace, images: str, scores: str, columns: Sequence[str]
) -> dict[tuple[str, str], tuple[float, ...]]:
    """The columns of every judged text of an images part, by the picture's key and the text."""
    by_id = {
        row["text_id"]: tuple(row[name] for name in columns)
        for table in place.part("scores", scores).tables(["text_id", *columns])
        for row in table.to_pylist()
    }
    part = place.part("images", images)
    keys = {
        row["image_id"]: row["key"] for table in part.tables(["image_id", "key"]) for row in table.to_pylist()
    }
    rows = (
        row for shard in part.shards() for row in found_texts(part.read(shard, FOUND_COLUMNS)).to_pylist()
    )
    return {
        (keys[row["image_id"]], row["text"]): by_id[row["text_id"]]
        for row in rows
        if None not in by_id.get(row["text_id"], (None,))
    }


def keys(place: Workspace, seed: int, split: str) -> tuple[str, ...]:
    """The keys of a split's pictures, in the order in which they are evaluated."""
    tables = place.part("images", f"clean{seed}").tables(["key", "split", "status"])
    rows = [row for table in tables for row in table.to_pylist()]
    return tuple(row["key"] for row in rows if row["split"] == split and row["status"] == "success")


class _Clock:
    """Seconds of each piece of work, printed as it ends."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self._since
        self._since = now
        print(f"-- {name}: {self.laps[name]:,.1f} s", flush=True)
