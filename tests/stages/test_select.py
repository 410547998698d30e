"""Would catch: a corpus that does not say where its pictures come from, and a corpus of the version before that nothing reads
any more; a condition that drops another text than it says.
"""

from __future__ import annotations

import io
import pickle
import shutil
from collections import Counter
from pathlib import Path

import pytest

from capfilt.catalog.query import print_query, query
from capfilt.catalog.report import write_report
from capfilt.data.images import decode
from capfilt.doctor import workspace as doctor
from capfilt.errors import UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import process_and_commit, run_stage
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.registry import stage_command
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.stages.train import Retrain
from capfilt.stages.training_options import Retrain_blip
from capfilt.tables.contracts import IMAGES, SCORES, SIGNALS
from capfilt.tables.convert import convert
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import found_texts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import failed_row, image_rows, write_images

OLD = Path(__file__).parents[1] / "fixtures" / "workspace-1"
"""A workspace as it was when pairs were of version 1: a retried download, an ingested part, everything up to pairs."""
ORIGIN = ("dataset", "key", "url", "license", "width", "height", "sha256")
RULE = {"images": "web", "captions": ("captioner",), "threshold": 0.01, "signals": ("duplicates",)}
RULE["require"] = "first IS NOT false"


@pytest.fixture
def old(tmp_path):
    shutil.copytree(OLD, tmp_path / "ws")
    convert(tmp_path / "ws")
    return Workspace(tmp_path / "ws")


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def test_pairs_carry_where_their_pictures_come_from(old):
    options = SelectOptions(out="new", **RULE)
    run(Select(options, old))
    run(WritePairs(options, old))
    images = {row["image_id"]: row for row in rows_of(old.part("images", "web"))}
    pairs = rows_of(old.part("pairs", "new"))
    assert len(pairs) == 4
    for pair in pairs:
        assert {name: pair[name] for name in ORIGIN} == {
            name: images[pair["image_id"]][name] for name in ORIGIN
        }
        assert (pair["width"], pair["height"]) == decode(pair["image"]["bytes"]).size
        assert None not in [pair[name] for name in ORIGIN]
    # Of a picture that a retry brought, the newest generation's.
    assert [pair["texts"] for pair in pairs] == [
        pair["texts"] for pair in rows_of(old.part("pairs", "capfilt"))
    ]


def test_pairs_of_version_1_are_read_as_ever(old, tmp_path):
    assert all(good for good, _ in doctor(str(old.path), full=True))
    listed = ", ".join(ORIGIN)
    rows = query(old, f"SELECT {listed} FROM pairs").to_pylist()
    assert rows == [dict.fromkeys(ORIGIN)] * 4
    for format in ("table", "json", "csv"):
        print_query(old, "SELECT * FROM pairs", format, io.StringIO())
    write_report(old, tmp_path / "report.html")
    options = SelectOptions(out="new", **RULE)
    for stage in (Select, WritePairs):
        run(stage(options, old))
    # Beside pairs of the new version, in one view and in one training.
    both = query(
        old, "SELECT rule, count(*) AS n, count(license) AS l FROM pairs GROUP BY 1 ORDER BY 1"
    ).to_pylist()
    assert both == [{"rule": "capfilt", "n": 4, "l": 0}, {"rule": "new", "n": 4, "l": 4}]
    for stream in (False, True):
        alone, joined = (
            Retrain(Retrain_blip(pairs=names, stream=stream), old).source.data(16)
            for names in (("capfilt",), ("capfilt", "new"))
        )
        assert len(alone) == 8
        assert len(joined) == 16


def test_pairs_of_version_1_train_and_what_they_train_is_evaluated(old):
    given = {
        "steps": 1,
        "batch_size": 4,
        "preset": "tiny",
        "vocab_size": 60,
        "queue_size": 0,
        "augment": False,
    }
    run(Retrain(Retrain_blip(pairs=("capfilt",), human=("human",), **given), old))
    options = EvaluateOptions(images="human", split="", tasks=("retrieval",), rerank=0, resamples=0)
    command = stage_command("evaluate")
    assert run(command.build(command.stages[0], options, old)).figures["texts"] == 4


def test_a_part_of_version_1_is_not_continued_in_version_2(old):
    """Would catch: one part with rows of two versions, and a message that does not say why."""
    with refused("pairs/capfilt", "contract_version", 1, 2):
        run(WritePairs(SelectOptions(**RULE), old))


# -- conditions ---------------------------------------------------------------------------------------------------------


def put_signal(place, name, shards):
    part = place.part("signals", name)
    mark = part.begin(SIGNALS, "test", {"made": "by a test"})
    for shard, rows in enumerate(shards):
        part.commit(shard, SIGNALS.table(rows), Counts(len(rows), len(rows)), mark, 0.0)


@pytest.fixture
def judged(tmp_path):
    """Two shards of pictures, one lost, with two texts each, which have scores but for one; signals of pictures and texts."""
    place = Workspace(tmp_path / "ws")
    shards = [
        [*image_rows("web", 4, texts=2), failed_row("web", "lost")],
        image_rows("web", 3, start=20, texts=2),
    ]
    for number, row in enumerate(row for rows in shards for row in rows):
        row["watermark"] = number / 10
    write_images(place.part("images", "web"), shards)
    scores = place.part("scores", "filter")
    mark = scores.begin(SCORES, "test", {})
    copies, lengths, count = [], [], 0
    for shard, rows in enumerate(shards):
        texts = [row for row in found_texts(IMAGES.table(rows)).to_pylist() if "lost" not in row["text"]]
        made = [
            {
                "text_id": t["text_id"],
                "image_id": t["image_id"],
                "itm_score": (n + count) / 20,
                "itc_score": 0.1,
            }
            for n, t in enumerate(texts)
        ]
        made[0]["itm_score"] = None
        count += len(made)
        scores.commit(shard, SCORES.table(made), Counts(len(made), len(made)), mark, 0.0)
        copies.append(
            [
                {"image_id": row["image_id"], "first": n != 1 if n != 2 else None, "size": n}
                for n, row in enumerate(rows)
            ]
        )
        lengths.append(
            [
                {"image_id": t["image_id"], "text_id": t["text_id"], "place": int(t["text"][-1])}
                for t in texts
                if n_of(t)
            ]
        )
    put_signal(place, "copies", copies)
    put_signal(place, "place", lengths)
    return place


def n_of(text):
    """Of a text with the lowest id of its shard there is no signal."""
    return text["text_id"][0] != "0"


def verdicts(place, **options):
    summary = run(Select(SelectOptions("web", threshold=0.0, **options), place))
    rows = rows_of(place.part("verdicts", options["out"]))
    assert Counter(row["reason"] for row in rows if not row["keep"]) == {
        **summary.counts.dropped,
        **summary.counts.failed,
    }
    assert sum(row["keep"] for row in rows) == summary.counts.kept
    assert len(rows) == summary.counts.rows_in
    return {row["text_id"]: row for row in rows}


def test_a_condition_drops_what_it_is_not_true_of_and_says_so(judged):
    """Would catch: a text that is kept or dropped by its neighbour's signal, and a drop without a reason."""
    plain = verdicts(judged, out="plain")
    found = verdicts(judged, out="unique", signals=("copies", "place"), require="first AND place.place = 0")
    copies = {row["image_id"]: row["first"] for row in rows_of(judged.part("signals", "copies"))}
    places = {row["text_id"]: row["place"] for row in rows_of(judged.part("signals", "place"))}
    seen = set()
    for text, row in plain.items():
        first, place = copies[row["image_id"]], places.get(text)
        if not row["keep"]:
            wanted = row["reason"]
        elif first is False or (place is not None and place != 0):
            wanted = "require_false"
        elif first is None or place is None:
            wanted = "require_null"
        else:
            wanted = "itm_score_at_threshold"
        assert found[text]["reason"] == wanted
        seen.add(wanted)
    assert seen == {"no_image", "no_score", "require_false", "require_null", "itm_score_at_threshold"}
    assert [*found] == [*plain]


@pytest.mark.parametrize(
    "require",
    ["watermark < 0.25", "images.watermark < 0.25 AND width = 32", "itm_score > 0.3 AND itc_score < 0.2",
     "source = 'web' AND text LIKE '%0'", "copies.size + coalesce(place, 0) < 3",
     "copies.first IS NOT false OR dataset = 'web'"],
)  # fmt: skip
def test_a_condition_is_the_same_as_the_query(judged, require):
    """Would catch: a name that means one thing in `select` and another in `query`."""
    found = verdicts(judged, out="rule", signals=("copies", "place"), require=require)
    wanted = query(
        judged,
        "SELECT texts.text_id FROM texts JOIN images USING (image_id) JOIN scores ON scores.text_id = texts.text_id "
        "LEFT JOIN signals.copies ON copies.image_id = texts.image_id LEFT JOIN signals.place ON place.text_id = texts.text_id "
        f"WHERE itm_score IS NOT NULL AND ({require.replace('source', 'texts.source')})",
    )["text_id"].to_pylist()
    assert {text for text, row in found.items() if row["keep"]} == set(wanted)
    assert wanted


def test_a_kept_fraction_is_of_the_texts_that_the_condition_is_true_of(judged):
    """Would catch: a quantile over texts that the condition drops, after which fewer than the fraction are kept."""
    found = verdicts_of(judged, out="half", keep_fraction=0.5, signals=("copies",), require="first")
    left = sorted(
        (row["itm_score"] for row in found.values() if row["reason"].startswith("itm_score")), reverse=True
    )
    assert sum(row["keep"] for row in found.values()) == round(len(left) / 2) > 0


def verdicts_of(place, **options):
    run(Select(SelectOptions("web", **options), place))
    return {row["text_id"]: row for row in rows_of(place.part("verdicts", options["out"]))}


def test_a_selection_resumes_and_does_not_depend_on_who_makes_its_shards(judged):
    """Would catch: rows of a shard that depend on the shards before it, or on the process that loads the stage."""
    options = {"signals": ("copies", "place"), "require": "first AND place < 2", "keep_fraction": 0.5}
    whole = verdicts_of(judged, out="whole", **options)
    stage = Select(SelectOptions("web", out="parts", **options), judged)
    mark = stage.begin()
    travelling = pickle.dumps(stage)
    for shard in reversed(stage.shards()):
        process_and_commit(pickle.loads(travelling), mark, shard)
        if shard:  # what is left is done by another run
            again = run(Select(SelectOptions("web", out="parts", **options), judged))
            assert (again.done_before, again.done_now) == (1, 1)
    assert {row["text_id"]: row for row in rows_of(judged.part("verdicts", "parts"))} == whole


def test_a_changed_condition_or_signal_is_never_mixed_in(judged):
    verdicts_of(judged, out="rule", signals=("copies",), require="first")
    for options in ({"require": "first OR true"}, {"require": "first", "signals": ("place", "copies")}):
        with refused("verdicts/rule", "identity"):
            verdicts_of(judged, out="rule", **{"signals": ("copies",), **options})


def test_select_without_a_condition_has_the_identity_it_had(judged):
    """Would catch: verdicts of before that count as made by other options, and are made again."""
    stage = Select(SelectOptions("web"), judged)
    assert set(stage.identity()) == {"options", "threshold", "images", "captions", "scores"}
    assert set(stage.identity()["options"]) == {"by", "keep_fraction", "sources", "threshold"}


def test_signals_of_other_pictures_or_with_two_answers_are_refused(judged):
    """Would catch: a signal that is joined by place, or the first of two rows taken without a word."""
    other = [
        [{"image_id": row["image_id"], "first": True} for row in image_rows("other", 5, start=at)]
        for at in (0, 9)
    ]
    put_signal(judged, "other", other)
    mine = [table.to_pylist() for table in judged.part("images", "web").tables(["image_id"])]
    put_signal(judged, "twice", [[{**row, "first": True} for row in [*rows, rows[0]]] for rows in mine])
    put_signal(judged, "half", [[{**row, "first": True} for row in mine[0]]])
    for name, words in (
        ("other", "images"),
        ("twice", "image_id"),
        ("half", "shard 00001"),
    ):
        with refused(f"signals/{name}", words):
            verdicts_of(judged, out=name, signals=(name,), require="first")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"require": "frist", "signals": ("copies",)}, ["frist", "copies(first, size)", "watermark"]),
        ({"require": "copies.frist", "signals": ("copies",)}, ["frist", "copies(first, size)"]),
        ({"require": "first"}, ["first", "scores(itm_score"]),
        ({"require": "place = 0", "signals": ("place", "./signals/place")}, ["differ"]),
        ({"signals": ("copies",)}, ["--signals copies", "--require"]),
        ({"require": "image IS NULL"}, ["image"]),
        ({"require": "first", "signals": ("nowhere",)}, ["signals/nowhere"]),
        ({"require": "(FROM read_text('/etc/passwd')) IS NULL"}, ["subquery"]),
    ],
)  # fmt: skip
def test_a_condition_that_cannot_be_is_one_line_and_no_part(judged, monkeypatch, options, words):
    monkeypatch.chdir(judged.path)
    with pytest.raises(UserError) as caught:
        Select(SelectOptions("web", out="new", **options), judged)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not judged.part("verdicts", "new").exists


@pytest.mark.parametrize("name", ["texts", "Images", "scores"])
def test_a_signal_named_as_another_table_is_refused(judged, name):
    put_signal(judged, name, [[], []])
    with refused("--signals", "differ"):
        Select(SelectOptions("web", signals=(name,), require="true"), judged)


def test_a_condition_that_nothing_fulfils_is_told(judged):
    summary = run(Select(SelectOptions("web", out="none", signals=("copies",), require="size < 0"), judged))
    assert "nothing is kept: --require is true of none of 12 scored texts" in "\n".join(summary.lines())


def test_an_endless_condition_ends_the_call(judged, monkeypatch):
    monkeypatch.setattr(Select, "seconds", 0.2)
    rows = "list_sum(list_transform(range(30000), lambda x: list_sum(list_transform(range(30000), lambda y: x * y))))"
    with refused("--require", "0.2 s"):
        run(Select(SelectOptions("web", require=f"{rows} > size", signals=("copies",)), judged))
