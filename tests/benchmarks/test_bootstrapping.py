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
import bootstrapping
from _form import main
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
        "rows": ("raw", "oracle"), "grid": ((1, 1e-3),), "quick": True,
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


def test_a_second_round_judges_no_picture_that_trained_it(data):
    """Catches fold checkpoints that train on their own fold, and a row whose steps are not those of the row that it is like."""
    steps = _photographs.judging(
        protocol(data, rows=tuple(_photographs.ROWS)), _photographs.Trial("human", 30, 1e-3), 0
    )
    by_name = {step.name: step for step in steps}
    for fold in range(_photographs.FOLDS):
        assert by_name[f"not{fold}"].options["require"] == f"fold <> {fold}"
        assert by_name[f"second-{fold}"].options["verdicts"] == [f"web=not{fold}"]
    assert by_name["second"].options["filter"] == ["human-30-0.001", "second-{fold}"]
    assert by_name["calibrate-no-hub_score"].options["judged"] == "judge"


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
    assert pictures.shape == (4, 20)
    assert pictures.mean(axis=1) == pytest.approx([metrics[name] for name in _photographs.METRICS])


def draw(levels, keys, seed):
    """A draw whose pictures add these sums, with what makes a picture hard alike in every row."""
    rng = np.random.default_rng(seed)
    ease = np.random.default_rng(1).normal(0, 60, len(keys))
    rows = {}
    for row, level in levels.items():
        parts = np.outer([0.1, 0.2, 0.3, 0.4], ease + level + rng.normal(0, 5, len(keys)))
        rows[row] = _photographs.Outcome(_photographs.Trial(row, 80, 1e-3), {}, parts, 2 * parts)
    return _photographs.Draw(rows, {}, keys, tuple(f"val {key}" for key in keys), {})


def test_headroom_is_measured_from_the_best_trivial_row():
    levels = {"raw": 120, "human": 128, "mixed": 135, "cut": 145, "oracle": 155}
    draws = [draw(levels, tuple(map(str, range(400))), seed) for seed in range(3)]
    mean = {row: np.mean([each.rows[row].pictures.sum(axis=0) for each in draws]) for row in levels}
    found = _figures.recovery(draws, seed=0)
    wanted = (mean["cut"] - mean["mixed"]) / (mean["oracle"] - mean["mixed"])
    assert found["cut"].value == pytest.approx(wanted)
    # Unpaired, pictures alone would move it by a third.
    assert 0.4 < found["cut"].low < found["cut"].value < found["cut"].high < 0.6
    assert found["cut"].baseline == "mixed"
    # Val's figures are twice the test's here: as large a share of as large a gap.
    both = _figures.recovery(draws, seed=0, both=True)["cut"]
    assert both.value == pytest.approx(wanted)
    assert both.gap == pytest.approx(1.5 * found["cut"].gap)
    assert found["human"].value < 0
    by_recall = _figures.above(draws, "cut", seed=0)
    for share, (value, low, high) in zip((0.1, 0.2, 0.3, 0.4), by_recall.values(), strict=True):
        assert value == pytest.approx(share * (mean["cut"] - mean["mixed"]))
        assert 0.8 * share * 10 < low < value < high < 1.2 * share * 10
    assert _figures.above(draws, "human", seed=0)["tr@1"][2] < 0
    close = [draw({**levels, "oracle": 135.2}, tuple(map(str, range(400))), seed) for seed in range(3)]
    assert math.isnan(_figures.recovery(close, seed=0)["cut"].value)


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
    kept_none = [{**each, _photographs.precision_name(0.95): False} for each in texts]
    assert math.isnan(_figures.judge_figures(kept_none)["precision shortfall"])


def test_the_whole_table_and_a_second_run_that_trains_nothing(data, tmp_path, capsys):
    # Every row through the stages, with the judge's probabilities; the second run reads results and choices alone.
    place = tmp_path / "w"
    words = ["--quick", "--data", str(data), "--family", "locked", "--human", "0.6", "--markdown"]
    words += ["--workspace", str(place)]
    figures = []
    # Two numbers of steps for eight rows, one of which has two trainings; one for ten rows that are like another; six judges.
    for trainings in (18 + 10 + 4 + 2, 0):
        argv = ["benchmarks/bootstrapping.py", *words, "--json", str(tmp_path / "found.json")]
        with pytest.raises(SystemExit) as stopped:
            main("A table.", bootstrapping.measure, bootstrapping.add_arguments, argv)
        assert stopped.value.code == 0
        printed = capsys.readouterr().out
        trained = [line for line in printed.splitlines() if line.startswith("retrain")]
        assert len(trained) == 34
        assert sum("done before" not in line for line in trained) == trainings
        found = json.loads((tmp_path / "found.json").read_text())["figures"]
        figures.append({name: value for name, value in found.items() if "seconds" not in name})
    assert figures[0] == figures[1]
    tested = {path.name for path in (place / "seed0" / "runs").glob("test-*.json")}
    chosen = [json.loads(path.read_text())["chosen"] for path in (place / "seed0" / "choices").iterdir()]
    assert tested == {f"test-{name}.json" for name in chosen}
    assert len(chosen) == len(_photographs.ROWS)
    assert all(f"| {row.title} |" in printed for row in _photographs.ROWS.values())
