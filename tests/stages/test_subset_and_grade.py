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
from capfilt.stages.subset.stage import place as stand
from capfilt.tables.contracts import IMAGES, SCORES
from capfilt.tables.ids import image_id
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


def shares(place, **changes):
    """(rows of the human share, rows of the web share), half of whose texts are another image's."""
    run(Subset(SubsetOptions(images="clean", dataset="human", share_to=0.3), place))
    noisy = {"dataset": "web", "role": "web", "share_from": 0.3, "texts": 1, "wrong": 0.5, **changes}
    run(Subset(SubsetOptions(images="clean", **noisy), place))
    return rows_of(place.part("images", "human")), rows_of(place.part("images", "web"))


def planted(rows, kind):
    return [
        (row, text)
        for row in rows
        for text, said in zip(row["captions"], row["planted"], strict=True)
        if said == kind
    ]


def owners(place):
    """The key of the picture that has each text."""
    return {text: row["key"] for row in rows_of(place.part("images", "clean")) for text in row["captions"]}


def test_wrong_texts_come_from_the_share_itself_and_from_all_of_its_shards(place):
    """Would catch: a look-up among the human texts that finds the noise; donors of one shard only."""
    human, web = shares(place)
    wrong = planted(web, "other_image")
    assert len(wrong) > 80
    assert not {text for _, text in wrong} & {text for row in human for text in row["captions"]}
    of = owners(place)
    keys = [row["key"] for row in rows_of(place.part("images", "clean"))]
    assert {of[text] for _, text in wrong} <= {row["key"] for row in web}
    crossed = [keys.index(of[text]) // 200 != keys.index(row["key"]) // 200 for row, text in wrong]
    assert np.mean(crossed) == pytest.approx(0.5, abs=0.15)


def test_donors_set_aside_leave_no_right_picture_to_find(place):
    _, web = shares(place, share_to=0.7, donors_from=0.7, donors_to=1.0)
    wrong = planted(web, "other_image")
    assert len(wrong) > 50
    of = owners(place)
    aside = {row["key"] for row in rows_of(place.part("images", "clean")) if stand(row["image_id"]) >= 0.7}
    assert {of[text] for _, text in wrong} <= aside
    assert not aside & {row["key"] for row in web}


def test_donors_of_other_splits_are_left_out(tmp_path):
    """Would catch: texts of test pictures planted in training pairs."""
    workspace = Workspace(tmp_path / "ws")
    rows = image_rows("clean", 60, source="human", texts=1, split="train")
    for number, row in enumerate(rows):
        row |= {"captions": [f"picture {number}"], "split": "test" if number % 2 else "train"}
    write_images(workspace.part("images", "clean"), [rows])
    run(Subset(SubsetOptions(images="clean", dataset="web", splits=("train",), wrong=1.0), workspace))
    made = rows_of(workspace.part("images", "web"))
    assert len(made) == 30
    assert {int(row["captions"][0].split()[1]) % 2 for row in made} == {0}


def test_a_text_without_a_donor_stays_true_and_is_told(tmp_path):
    """Would catch: texts called wrong that are the picture's own, or left as they are without a word."""
    workspace = Workspace(tmp_path / "ws")
    rows = image_rows("clean", 5, source="human", texts=1)
    for row in rows:
        row["captions"] = ["a picture", "a photograph"]
    write_images(workspace.part("images", "clean"), [rows])
    for option, kind in (("wrong", "other_image"), ("changed_word", "changed_word")):
        stage = Subset(
            SubsetOptions(images="clean", dataset=option.replace("_", ""), **{option: 1.0}), workspace
        )
        run(stage)
        made = rows_of(stage.output)
        assert {tuple(row["planted"]) for row in made} == {("true", "true")}
        assert {tuple(row["captions"]) for row in made} == {("a picture", "a photograph")}
        (line,) = stage.remarks()
        assert line.startswith("10 texts")
        assert kind in line


def test_a_new_shard_makes_planted_noise_stale(place):
    """Donors are of all shards: would catch rows that stand while the texts they were drawn from change."""
    for wrong, moves in ((0.0, False), (0.5, True)):
        stage = Subset(SubsetOptions(images="clean", dataset="x", wrong=wrong), place)
        before = stage.identity()
        part = place.part("images", "clean")
        shard = len(part.shards())
        rows = image_rows("clean", 3, source="human", texts=1)
        for number, row in enumerate(rows):
            row |= {"key": f"new{shard}{number}", "image_id": image_id("clean", f"new{shard}{number}")}
        part.commit(shard, IMAGES.table(rows), Counts(3, 3), part.info["fingerprint"], 0.1)
        again = Subset(SubsetOptions(images="clean", dataset="x", wrong=wrong), place)
        assert (again.identity() != before) == moves


def test_a_changed_word_is_one_word_that_the_texts_have_in_its_place(tmp_path):
    workspace = Workspace(tmp_path / "ws")
    rows = image_rows("clean", 120, source="human", texts=1)
    for number, row in enumerate(rows):
        colour, thing = ("Red", "blue", "green")[number % 3], ("ball", "kite")[number % 2]
        row["captions"] = [f"{colour} {thing} {('in', 'over')[number % 5 % 2]} the air .", "it is up"]
    write_images(workspace.part("images", "clean"), [rows])
    run(Subset(SubsetOptions(images="clean", dataset="web", changed_word=0.5), workspace))
    clean = {row["key"]: row["captions"] for row in rows}
    made = rows_of(workspace.part("images", "web"))
    changed = planted(made, "changed_word")
    assert len(changed) == pytest.approx(60, abs=15)
    for row, text in changed:
        own = clean[row["key"]][0]
        ((old, new),) = [(a, b) for a, b in zip(own.split(), text.split(), strict=True) if a != b]
        kind = {"red", "green", "blue"} if old.lower() in {"red", "green", "blue"} else {"ball", "kite"}
        assert new.lower() in kind - {old.lower()}
        assert new[0].isupper() == old[0].isupper()
    assert all(text in clean[row["key"]] for row, text in planted(made, "true"))


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
    ("changes", "option"),
    [
        ({"share_from": 0.5, "share_to": 0.5}, "--share-from"),
        ({"wrong": 0.9, "truncated": 0.2}, "--wrong"),
        ({"wrong": 0.9, "changed_word": 0.2}, "--changed-word"),
        ({"role": "robot"}, "--role"),
        ({"wrong": 0.5, "share_to": 0.5, "donors_from": 0.4, "donors_to": 0.6}, "--donors-from"),
        ({"wrong": 0.5, "share_from": 0.5, "donors_from": 0.0, "donors_to": 0.6}, "--donors-to"),
        ({"wrong": 0.5, "share_to": 0.5, "donors_from": 0.8}, "--donors-to"),
    ],
)
def test_impossible_shares_are_refused(place, changes, option):
    with refused(option):
        Subset(SubsetOptions(images="clean", dataset="x", **changes), place)


def test_a_share_without_a_donor_is_refused_before_the_work(place):
    options = SubsetOptions(
        images="clean", dataset="x", wrong=0.5, share_to=0.9, donors_from=0.9, donors_to=0.90001
    )
    with refused("--donors-from"):
        run(Subset(options, place))
    assert not place.part("images", "x").shards()


def test_experts_are_graded_as_evaluate_grades_them(place, tmp_path):
    """Ratings of other pictures than those scored, a picture that is lost not counted, tau-c of other scores, of means in the
    place of single ratings, or with own captions."""
    rows = [row for table in place.part("images", "clean").tables() for row in table.to_pylist()][:6]
    lines = []
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jpg").write_bytes(row["image"]["bytes"])
        lines += [
            {"image": f"{number}.jpg", "caption": text, "ratings": [number % 4, len(text) % 4]}
            for text in ("a red square", "a blue square number 3")
        ]
    lines.append({"image": "lost.jpg", "caption": "a", "ratings": [1]})
    own = [
        {"image": "2.jpg", "caption": "own", "caption_id": "2.jpg#0", "ratings": [4, 4]},
        {"image": "2.jpg", "caption": "Own ", "caption_id": "3.jpg#1", "ratings": [4, 4]},
    ]
    (tmp_path / "expert.jsonl").write_text("\n".join(map(json.dumps, lines + own)))
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
    counts = {"texts": 12, "ratings": 24, "images": 6, "own_captions": 2, "failed": {"file_missing": 1}}
    assert result["expert"] == counts
    judge = Filter.load(place.model("judge"))
    known = [line for line in lines if line["image"] != "lost.jpg"]
    found = judge.score(
        [str(tmp_path / line["image"]) for line in known], [line["caption"] for line in known]
    )
    means = [np.mean(line["ratings"]) for line in known]
    single = [rating for line in known for rating in line["ratings"]]
    for name in ("itm", "itc"):
        values = [getattr(score, f"{name}_score") for score in found]
        expected = kendalltau(means, values, variant="c").statistic
        assert result["metrics"][f"tau_c_mean_{name}"] == pytest.approx(expected)
        expected = kendalltau(single, np.repeat(values, 2), variant="c").statistic
        assert result["metrics"][f"tau_c_{name}"] == pytest.approx(expected)
        low, high = (result["metrics"][f"tau_c_{name}_{end}"] for end in ("low", "high"))
        assert low <= expected <= high


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
