"""Catches, in the table on real photographs: calibration images that the judge was trained on, a split that is the same in
every draw, a choice made again after the test split was asked, headroom against the wrong row or without a meaning, and a
figure of the judge that counts truncated texts as wrong."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from capfilt.errors import UserError
from capfilt.execution.run import executor
from capfilt.tables.workspace import Workspace
from capfilt.tasks.comparison import Result
from capfilt.tasks.outcome import pack, units
from tests.worlds import COLOURS, jpeg

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _figures
import _photographs
from _recipes import run_steps

THINGS = ("dog", "ball", "tree", "car", "hat")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of one colour with three captions each, in three splits, and one of another source."""
    root = tmp_path_factory.mktemp("data")
    (root / "clean" / "images").mkdir(parents=True)
    images, notes = [], []
    for number in range(300):
        colour = list(COLOURS)[number % len(COLOURS)]
        name = f"{number:04d}.jpg"
        (root / "clean" / "images" / name).write_bytes(jpeg(colour, seed=number))
        split = "val" if number % 10 == 8 else "test" if number % 10 == 9 else "train"
        images.append({"id": number, "file_name": name, "width": 32, "height": 32, "split": split})
        notes += [
            {"id": 5 * number + k, "image_id": number, "caption": f"a {colour} {thing} number {number}"}
            for k, thing in enumerate(THINGS[:3])
        ]
    images[7]["source"] = "coco2017"
    (root / "clean" / "captions.json").write_text(json.dumps({"images": images, "annotations": notes}))
    return root


def protocol(data, **changes):
    given = {
        "data": str(data), "family": "clip", "human": 0.4, "wrong": 0.5, "truncated": 0.1, "file_name": 0.1,
        "rows": ("raw", "oracle"), "steps": (1,), "rates": (1e-3,), "quick": True,
    }  # fmt: skip
    return _photographs.Protocol(**{**given, **changes})


def keys(place, name):
    rows = [row for table in place.part("images", name).tables(["key"]) for row in table.to_pylist()]
    return {row["key"] for row in rows}


def test_every_draw_has_its_own_disjoint_images(data, tmp_path):
    found = []
    for seed in (0, 1):
        place = Workspace(tmp_path / f"seed{seed}")
        captions = _photographs.taken(data, place.path, quick=False)
        with executor("inline") as work:
            run_steps(_photographs.parts(protocol(data), captions, seed), place, work)
        parts = [keys(place, name) for name in ("human", "calibration", "web")]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 239  # of 240, one is of another source
        assert 30 <= len(parts[1]) <= 66  # at the quick size half of 40% of 239, 48
        found.append(parts)
    assert all(first != second for first, second in zip(*found, strict=True))
    for row in _photographs.ROWS:
        for step in _photographs.trained(protocol(data), _photographs.Trial(row, 30, 1e-3), 0):
            assert "calibration" not in str(step.options)


def test_a_choice_stands_once_it_is_made(tmp_path):
    workspace = Workspace(tmp_path)
    trials = [_photographs.Trial("raw", steps, 1e-3) for steps in (80, 140, 200)]
    sums = dict(zip(trials, (130.0, 140.0, 140.0), strict=True))
    assert _photographs.chosen(workspace, "raw", sums) == trials[1]
    assert _photographs.chosen(workspace, "raw", sums) == trials[1]
    assert json.loads((workspace.path / "choices" / "raw.json").read_text())["chosen"] == "raw-140-0.001"
    with pytest.raises(UserError, match="workspace"):
        _photographs.chosen(workspace, "raw", {**sums, trials[2]: 150.0})


def test_two_trainings_share_the_steps(data):
    trial = _photographs.Trial("then", 200, 1e-3)
    first, last = _photographs.trained(protocol(data), trial, seed=3)
    assert (first.options["steps"], last.options["steps"]) == (134, 66)
    assert first.options["web"] == ["web"]
    assert "web" not in last.options
    assert last.options["init"] == first.options["out"]


def result_of(hits, groups):
    """A result file's content with these hits per query."""
    made = {name: units("mean", values, groups[name[:2]]) for name, values in hits.items()}
    queries = {
        each.queries: {"groups": pack(each.groups), "number": len(each.names)} for each in made.values()
    }
    content = {"units": {name: each.as_dict() for name, each in made.items()}, "queries": queries}
    return Result("made", Path("made.json"), content), {name: each.value() for name, each in made.items()}


def test_pictures_add_up_to_the_recalls():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(20), rng.integers(1, 6, 20))  # pictures with different numbers of texts
    groups = {"tr": np.arange(20), "ir": owner}
    hits = {name: rng.random(len(groups[name[:2]])) < 0.4 for name in _photographs.METRICS}
    found, metrics = result_of(hits, groups)
    pictures = _photographs.pictures(found)
    assert len(pictures) == 20
    assert pictures.mean() == pytest.approx(sum(metrics.values()))


def test_headroom_is_measured_from_the_best_trivial_row():
    rng = np.random.default_rng(1)
    ease = rng.normal(0, 60, 400)  # what makes a picture hard is hard for every row
    levels = {"raw": 120, "human": 128, "mixed": 135, "cut": 145, "oracle": 155}
    rows = {name: [ease + level + rng.normal(0, 5, 400) for _ in range(3)] for name, level in levels.items()}
    found = _figures.headroom(rows, seed=0)
    mean = {name: np.mean(values) for name, values in rows.items()}
    wanted = (mean["cut"] - mean["mixed"]) / (mean["oracle"] - mean["mixed"])
    assert found["cut"]["headroom"] == pytest.approx(wanted)
    assert found["cut"]["headroom low"] > 0.4  # unpaired, pictures alone would move it by 0.3
    assert found["cut"]["headroom high"] < 0.6
    assert found["human"]["headroom"] < 0
    assert found["oracle"]["headroom low"] == found["oracle"]["headroom high"] == 1
    # The oracle is a standard error or two above: no meaning.
    close = {**rows, "oracle": [values + rng.normal(1, 10, 400) for values in rows["mixed"]]}
    assert all(math.isnan(each["headroom"]) for each in _figures.headroom(close, seed=0).values())


def test_a_judge_is_measured_on_true_texts_and_those_of_other_images():
    kept = dict.fromkeys(map(_photographs.precision_name, _photographs.PRECISIONS), True)
    texts = [
        {"kind": kind, "probability": probability, **kept}
        for kind, probability in (
            ("true", 0.9), ("true", 0.9), ("true", 0.3), ("other_image", 0.3), ("other_image", 0.6),
            ("truncated", 0.7), ("truncated", 0.2), ("file_name", 0.1),
        )
    ]  # fmt: skip
    found = _figures.judge_figures(texts)
    assert found["auc"] == pytest.approx((2 + 2 + 0.5 + 0) / 6)
    assert found["share planted"] == pytest.approx(0.6)
    assert found["share estimated"] == pytest.approx(0.6)
    assert found["kept true"] == pytest.approx(2 / 3)
    assert found["precision"] == pytest.approx(2 / 3)
    # Bins 0.3, 0.6 and 0.9: |0.6 - 1|, |0.6 - 0|, |1.8 - 2|, of five texts.
    assert found["ece"] == pytest.approx((0.4 + 0.6 + 0.2) / 5)
    assert found["kept truncated"] == 0.5
    assert found["kept file_name"] == 0
    assert found["precision shortfall"] == pytest.approx(0.95 - 0.6)
