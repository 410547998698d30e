"""Would catch: two runs over other queries, or other labels, resampled as if they were the same ones; a paired difference as
wide as an unpaired one; a verdict on figures over galleries of different sizes; and a file of another kind read as a result."""

from __future__ import annotations

import json

import numpy as np
import pytest

from capfilt.tasks.comparison import difference, read_result, shared_metrics, unlike
from capfilt.tasks.intervals import paired_difference
from capfilt.tasks.outcome import pack, units
from tests.refusals import refused

IMAGES = [f"image {number // 3}" for number in range(300)]


def written(path, figures, **content):
    """A result file with these units: {metric: Units}."""
    groups = {
        each.queries: {"groups": pack(each.groups), "number": len(each.names)} for each in figures.values()
    }
    path.write_text(
        json.dumps(
            {
                "name": path.stem, "split": "test", "metrics": {name: each.value() for name, each in figures.items()},
                "units": {name: each.as_dict() for name, each in figures.items()}, "queries": groups,
                "bootstrap": {"resamples": 400, "seed": 1, "level": 0.95}, **content,
            }
        )
    )  # fmt: skip
    return read_result(path)


def hits(seed, share, like=None):
    rng = np.random.default_rng(seed)
    base = rng.random(300) if like is None else like
    return (base < share).astype(float)


def test_a_paired_difference_is_that_of_the_means_over_the_same_draws(tmp_path):
    hard = np.random.default_rng(0).random(300)
    one, other = hits(0, 0.50, hard), hits(0, 0.56, hard)
    first = written(tmp_path / "first.json", {"tr@1": units("mean", one, IMAGES)})
    second = written(tmp_path / "second.json", {"tr@1": units("mean", other, IMAGES)})
    found = difference(second, first, "tr@1")
    expected = paired_difference(other, one, IMAGES, resamples=400, seed=1)
    assert found.paired
    assert found.interval.low == pytest.approx(100 * expected.low)
    assert found.interval.high == pytest.approx(100 * expected.high)
    assert found.value == pytest.approx(100 * (other.mean() - one.mean()))
    assert found.verdict == "above", "where one model is right wherever the other is, a few points are enough"
    assert difference(first, second, "tr@1").verdict == "below"
    assert difference(first, first, "tr@1").verdict == "within"


def test_other_queries_are_resampled_apart(tmp_path):
    hard = np.random.default_rng(0).random(300)
    first = written(tmp_path / "a.json", {"tr@1": units("mean", hits(0, 0.50, hard), IMAGES)})
    elsewhere = [f"other {name}" for name in IMAGES]
    second = written(tmp_path / "b.json", {"tr@1": units("mean", hits(0, 0.53, hard), elsewhere)})
    same = written(tmp_path / "c.json", {"tr@1": units("mean", hits(0, 0.53, hard), IMAGES)})
    apart, paired = difference(second, first, "tr@1"), difference(same, first, "tr@1")
    assert not apart.paired
    assert apart.verdict == "within"
    assert apart.interval.high - apart.interval.low > 2 * (paired.interval.high - paired.interval.low)


def test_labels_must_agree_for_a_pairing(tmp_path):
    rng = np.random.default_rng(3)
    score, label = rng.random(300), (rng.random(300) < 0.5).astype(float)
    made = {
        name: written(
            tmp_path / f"{name}.json", {"auc": units("roc_auc", [values, truth], IMAGES)}
        )
        for name, values, truth in (("a", score, label), ("b", rng.random(300), label), ("c", score, 1 - label))
    }  # fmt: skip
    assert difference(made["b"], made["a"], "auc").paired
    assert not difference(made["c"], made["a"], "auc").paired


def test_figures_without_units_have_no_verdict(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"metrics": {"tr@1": 10.0, "new": 1.0}}))
    old = read_result(path)
    first = written(tmp_path / "a.json", {"tr@1": units("mean", hits(0, 0.5), IMAGES)})
    found = difference(old, first, "tr@1")
    assert (found.interval, found.verdict) == (None, "")
    assert shared_metrics([first, old]) == ["tr@1", "new"]


def test_what_makes_runs_unlike_is_told(tmp_path):
    made = {"tr@1": units("mean", hits(0, 0.5), IMAGES)}
    task = {"retrieval": {"protocol": "k = 16", "metrics": ["tr@1"]}}
    first = written(tmp_path / "a.json", made, tasks=task)
    assert unlike([first, written(tmp_path / "b.json", made, tasks=task)]) == []
    other = {"retrieval": {"protocol": "k = 128", "metrics": ["tr@1"]}}
    found = unlike([first, written(tmp_path / "c.json", made, tasks=other, split="val")])
    assert found[0] == "the runs are of different splits: test, val"
    assert "a: k = 16; c: k = 128" in found[1]


def retrieved(path, images, metrics, **content):
    """A result over the first so many images."""
    task = {"protocol": "cosine", "metrics": list(metrics), "counts": {"images": images, "texts": images}}
    made = {name: units("mean", hits(0, 0.5)[:images], IMAGES[:images]) for name in metrics}
    return written(path, made, tasks={content.pop("task", "retrieval"): task}, **content)


@pytest.mark.parametrize(
    ("task", "metric", "alone"),
    [
        ("retrieval", "tr@1", True),
        ("captioning", "cider", True),
        ("captioning", "rouge_l", False),
        ("vqa", "vqa_written", False),
    ],
)
def test_what_depends_on_how_much_is_measured_has_no_verdict_over_other_numbers(
    tmp_path, task, metric, alone
):
    few = retrieved(tmp_path / "few.json", 90, [metric], task=task)
    many = retrieved(tmp_path / "many.json", 300, [metric], task=task)
    found = difference(few, many, metric)
    assert (found.interval is None, found.verdict == "", found.sized) == (alone, alone, alone)
    same = retrieved(tmp_path / "same.json", 300, [metric], task=task)
    assert difference(same, many, metric).verdict == "within"
    (note,) = unlike([many, few])
    assert (
        note
        == f"{task} was measured over different numbers (many: 300 images, 300 texts; few: 90 images, 90 texts)"
    )


def test_other_pictures_and_other_examples_are_told(tmp_path):
    def made(name, task="vqa", **identity):
        given = {"images": "a", "pictures": ["b"], "examples": ["c"], **identity}
        return retrieved(tmp_path / f"{name}.json", 90, ["m"], task=task, identity=given)

    first = made("first")
    assert unlike([first, made("same")]) == []
    assert unlike([first, made("x", images="z")]) == ["the runs are over different parts of images"]
    assert unlike([first, made("y", examples=["z"])]) == ["the runs are over different parts of examples"]
    # What a task does not read says nothing of its figures.
    assert unlike([made("u", "retrieval"), made("v", "retrieval", examples=["z"])]) == []


def test_a_result_of_another_stage_is_refused(tmp_path):
    with refused("x.json", "grade"):
        written(tmp_path / "x.json", {"tau_c_itm": units("mean", hits(0, 0.5), IMAGES)}, stage="grade")
    written(tmp_path / "x.json", {"tau_c_itm": units("mean", hits(0, 0.5), IMAGES)}, stage="evaluate")


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"metrics": {"a": "b"}}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with refused(path):
        read_result(path)


@pytest.mark.parametrize("change", [{"queries": {}}, {"statistic": "guess"}, {"columns": ["|u1:!"]}])
def test_damaged_units_are_named(tmp_path, change):
    path = tmp_path / "x.json"
    written(path, {"tr@1": units("mean", hits(0, 0.5), IMAGES)})
    content = json.loads(path.read_text())
    if "queries" in change:
        content["queries"] = {}
    else:
        content["units"]["tr@1"] |= change
    path.write_text(json.dumps(content))
    with refused("read", "evaluate"):
        read_result(path).units("tr@1")
