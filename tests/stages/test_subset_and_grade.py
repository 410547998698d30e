"""Catches planted noise that is not what it says, leaks between shares, or a grade that counts a kind under another."""

from __future__ import annotations

import json
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from scipy.stats import kendalltau

from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.inference.filter import Filter
from capfilt.stages.grade import GradeOptions
from capfilt.stages.grade.stage import Grade
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select
from capfilt.stages.subset import SubsetOptions
from capfilt.stages.subset.stage import Subset
from capfilt.tables.contracts import IMAGES, SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, tiny_checkpoint, write_images


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


@pytest.fixture
def place(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    rows = image_rows("clean", 400, source="human", texts=2, split="train")
    for number, row in enumerate(rows):
        row["captions"] = [f"picture {number} says {k} and a few words more" for k in range(2)]
    write_images(workspace.part("images", "clean"), [rows[:200], rows[200:]])
    return workspace


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def test_two_shares_split_the_images_and_noise_is_what_it_says(place):
    run(Subset(SubsetOptions(images="clean", dataset="human", share_to=0.3), place))
    noisy = SubsetOptions(
        images="clean",
        dataset="web",
        role="web",
        share_from=0.3,
        texts=1,
        wrong=0.5,
        truncated=0.1,
        file_name=0.1,
    )
    summary = run(Subset(noisy, place))
    human, web = rows_of(place.part("images", "human")), rows_of(place.part("images", "web"))
    assert len(human) + len(web) == 400
    assert not {row["key"] for row in human} & {row["key"] for row in web}
    assert summary.counts.dropped == {"outside_share": len(human)}
    assert all(row["planted"] == ["true", "true"] for row in human)
    clean = {row["key"]: row["captions"] for row in rows_of(place.part("images", "clean"))}
    kinds = {}
    for row in web:
        (kind,), (text,) = row["planted"], row["captions"]
        kinds[kind] = kinds.get(kind, 0) + 1
        own = clean[row["key"]]
        if kind == "true":
            assert text == own[0]
        elif kind == "truncated":
            assert text.endswith("...")
            assert own[0].startswith(text[:-3])
        else:
            assert text not in own
        assert row["source"] == "web"
    assert kinds["other_image"] / len(web) == pytest.approx(0.5, abs=0.09)
    assert kinds["file_name"] / len(web) == pytest.approx(0.1, abs=0.06)


def test_a_perfect_filter_is_graded_as_one(place):
    run(Subset(SubsetOptions(images="clean", dataset="web", role="web", texts=1, wrong=0.5), place))
    images = place.part("images", "web")
    scores = place.part("scores", "oracle")
    mark = scores.begin(SCORES, "test", {})
    for shard in images.shards():
        table = images.read(shard)
        texts = found_texts(table).to_pylist()
        kinds = [kind for row in table.to_pylist() for kind in row["planted"]]
        made = [
            {"text_id": t["text_id"], "image_id": t["image_id"], "itm_score": 0.9 if kind == "true" else 0.1}
            for t, kind in zip(texts, kinds, strict=True)
        ]
        scores.commit(shard, SCORES.table(made), Counts(len(made), len(made)), mark, 0.0)
    run(Select(SelectOptions(images="web", scores="oracle", out="rule"), place))
    run(Grade(GradeOptions(images="web", verdicts="rule"), place))
    result = json.loads((place.path / "runs" / "grade.json").read_bytes())
    assert result["metrics"]["roc_auc"] == 1.0
    assert result["metrics"]["kept_true"] == 1.0
    assert result["metrics"]["kept_other_image"] == 0.0
    assert sum(kind["texts"] for kind in result["kinds"].values()) == 400
    with refused("column", "planted"):
        run(Grade(GradeOptions(images="clean", verdicts="rule", out="other"), place))


@pytest.mark.parametrize(
    "changes", [{"share_from": 0.5, "share_to": 0.5}, {"wrong": 0.9, "truncated": 0.2}, {"role": "robot"}]
)
def test_impossible_shares_are_refused(place, changes):
    with refused("--"):
        Subset(SubsetOptions(images="clean", dataset="x", **changes), place)


def test_experts_are_graded_as_evaluate_grades_them(place, tmp_path):
    """Ratings of other pictures than those scored, a picture that is lost not counted, tau-c of other scores."""
    rows = [row for table in place.part("images", "clean").tables() for row in table.to_pylist()][:6]
    lines = []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        lines += [
            {"image": f"{number}.jpg", "caption": text, "ratings": [number % 4, len(text) % 4]}
            for text in ("a red square", "a blue square number 3")
        ]
    lines.append({"image": "lost.jpg", "caption": "a", "ratings": [1]})
    (tmp_path / "expert.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tiny_checkpoint(place.model("judge"))
    run(Subset(SubsetOptions(images="clean", dataset="few", role="web", share_to=0.1), place))
    images = place.part("images", "few")
    scores = place.part("scores", "none")
    mark = scores.begin(SCORES, "test", {})
    for shard in images.shards():
        texts = found_texts(images.read(shard)).to_pylist()
        made = [{"text_id": t["text_id"], "image_id": t["image_id"], "itm_score": 0.5} for t in texts]
        scores.commit(shard, SCORES.table(made), Counts(len(made), len(made)), mark, 0.0)
    run(Select(SelectOptions(images="few", scores="none", out="few"), place))
    expert = str(tmp_path / "expert.jsonl")
    run(
        Grade(GradeOptions(images="few", verdicts="few", expert=expert, filter="judge", out="experts"), place)
    )
    result = json.loads((place.path / "runs" / "experts.json").read_bytes())
    assert result["expert"] == {"texts": 12, "images": 6, "failed": {"file_missing": 1}}
    judge = Filter.load(place.model("judge"))
    known = [line for line in lines if line["image"] != "lost.jpg"]
    found = judge.score(
        [str(tmp_path / line["image"]) for line in known], [line["caption"] for line in known]
    )
    means = [np.mean(line["ratings"]) for line in known]
    for name in ("itm", "itc"):
        expected = kendalltau(
            means, [getattr(score, f"{name}_score") for score in found], variant="c"
        ).statistic
        assert result["metrics"][f"tau_c_mean_{name}"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([2**61], pa.timestamp("us")),
        pa.array([5], pa.int8()),
        pa.array([Decimal("1.50")]),
        pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
        pa.array(["x"]).dictionary_encode(),
    ],
    ids=["far", "narrow", "decimal", "map", "dictionary"],
)
def test_further_columns_keep_their_types_and_values(tmp_path, column):
    """Would catch: a shard whose first 100 rows are null in a column, or an infinite date, ending the run; an int8 that
    comes out as int64."""
    workspace = Workspace(tmp_path)
    part = workspace.part("images", "clean")
    mark = part.begin(IMAGES, "test", {})
    table = IMAGES.table(image_rows("clean", 120, source="human"))
    values = pa.chunked_array([pa.nulls(119, column.type), column])
    part.commit(0, table.append_column("x", values), Counts(120, 120), mark, 0.1)
    run(Subset(SubsetOptions(images="clean", dataset="noisy", wrong=0.5), workspace))
    made = workspace.part("images", "noisy").read(0)
    assert made.schema.field("x").type == column.type
    assert made["x"].combine_chunks() == values.combine_chunks()
    assert {*made["planted"].to_pylist()[0]} <= {"true", "other_image"}
