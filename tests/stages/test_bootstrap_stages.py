"""Catches a caption, score or select that loses a neighbour of a bad row, miscounts, or depends on how work was cut."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from capfilt.execution.commit import process_and_commit
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.inference import engine
from capfilt.inference.engine import Engine
from capfilt.inference.graphs import RecordedWriter
from capfilt.models.blip.model import Blip
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreStage
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from tests.refusals import refused
from tests.worlds import image_rows, write_images


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def caption(workspace, **changes):
    return run(CaptionStage(CaptionOptions(images="web", prompt="", max_new_tokens=6, **changes), workspace))


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def put_scores(workspace, score_of):
    """A scores part with scores of the test's choosing, over web texts and captions."""
    from capfilt.tables.texts import texts_of

    part = workspace.part("scores", "chosen")
    mark = part.begin(SCORES, "test", {})
    captions = (
        [workspace.part("captions", "captioner")] if workspace.part("captions", "captioner").exists else []
    )
    for shard in workspace.part("images", "web").shards():
        texts = texts_of(workspace.part("images", "web").read(shard), [each.read(shard) for each in captions])
        made = [
            {
                "text_id": row["text_id"],
                "image_id": row["image_id"],
                "itm_score": score_of(row),
                "itc_score": 0.1,
            }
            for row in texts.to_pylist()
        ]
        part.commit(shard, SCORES.table(made), Counts(len(made), len(made)), mark, 0.0)
    return part


def test_captions_every_picture_and_accounts_for_the_rest(workspace):
    summary = caption(workspace, samples=2)
    assert summary.counts.rows_in == 12
    assert summary.counts.dropped == {"no_image": 1}
    assert summary.counts.failed.get("truncated") == 1
    rows = rows_of(workspace.part("captions", "captioner"))
    assert len(rows) == 2 * (12 - 1)
    assert {row["sample_index"] for row in rows} == {0, 1}
    bad = [row for row in rows if row["failure"] == "truncated"]
    assert len(bad) == 2
    assert all(row["text"] is None and row["logprob"] is None for row in bad)
    assert all(row["text"] is not None and row["logprob"] < 0 for row in rows if row["failure"] is None)
    assert len({row["text_id"] for row in rows}) == len(rows)


def test_a_text_does_not_depend_on_the_batch_it_is_written_in(workspace):
    caption(workspace, batch_size=64, out="a", seed=3)
    caption(workspace, batch_size=2, out="b", seed=3)
    caption(workspace, batch_size=64, out="c", seed=4)
    first, second, other = (
        [row["text"] for row in rows_of(workspace.part("captions", name))] for name in ("a", "b", "c")
    )
    assert first == second
    assert first != other


@pytest.mark.parametrize("batch_size", [4, 64])
def test_rows_are_the_same_however_shards_are_shared_among_workers(workspace, batch_size):
    """One worker with every shard in order, against a worker of its own for each, in the other order: to the last bit."""
    options = CaptionOptions(
        images="web", prompt="", max_new_tokens=6, min_new_tokens=2, samples=2, seed=4, batch_size=batch_size
    )

    def stage():
        made = CaptionStage(options, workspace)
        made.setup()
        return made

    def scored(shard, scorer):
        return scorer.process(shard).table

    alone = stage()
    together = {shard: alone.process(shard) for shard in alone.shards()}
    assert len(together) == 2
    for shard in reversed(list(together)):
        apart = stage().process(shard)
        assert apart.table.equals(together[shard].table)
        assert apart.counts == together[shard].counts
    caption(workspace, samples=2)
    scoring = ScoreOptions(filter="filter", images="web", captions=("captioner",), batch_size=batch_size)
    one, other = (ScoreStage(scoring, workspace) for _ in range(2))
    for each in (one, other):
        each.setup()
    tables = {shard: scored(shard, one) for shard in one.shards()}
    for shard in reversed(list(tables)):
        assert scored(shard, other).equals(tables[shard])


def test_a_shard_says_how_long_its_engine_worked(workspace):
    caption(workspace)
    part = workspace.part("captions", "captioner")
    for shard in part.shards():
        stats = part.stats(shard)
        assert 0 < stats["engine_seconds"] < stats["seconds"]


def mixed(workspace):
    """More rows than a row group has, some of them unusable; options to caption them."""
    rows = image_rows("mixed", 130)
    for row in rows[::5]:
        row["image"] = {"bytes": row["image"]["bytes"][:200], "path": None}
    for row in rows[64:96]:  # and one batch of 32 with none
        row["image"] = {"bytes": b"<html>", "path": None}
    write_images(workspace.part("images", "mixed"), [rows, rows[:40]])
    return CaptionOptions(
        images="mixed", prompt="", max_new_tokens=4, min_new_tokens=4, captioner="captioner", out="recorded"
    )


def test_every_batch_runs_in_one_recording_whatever_pictures_are_broken(workspace):
    """More rows than a row group has, some of them unusable: one shape, every step of it recorded once."""
    options = mixed(workspace)
    plain, recorded = (CaptionStage(dataclasses.replace(options, batch_size=32), workspace) for _ in range(2))
    shapes, made = [], []

    def record(compute):
        made.append(1)
        return compute

    def recorder():
        shapes.append(1)
        return record

    for stage in (plain, recorded):
        stage.setup()
    engine = recorded.writer.engine
    engine.__dict__["writer"] = RecordedWriter(engine.model, recorder)
    for shard in (0, 1):
        expected, found = (stage.process(shard) for stage in (plain, recorded))
        assert found.counts == expected.counts
        texts = [each.table["text"].to_pylist() for each in (expected, found)]
        assert texts[0] == texts[1]
        assert sum(map(bool, texts[1])) == found.counts.kept
    assert (len(shapes), len(made)) == (1, 3)
    assert engine.writer.shape.images == 32


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [0, 32])
def test_on_a_gpu_broken_pictures_leave_the_recording_as_it_is(workspace, batch_size):
    options = dataclasses.replace(mixed(workspace), batch_size=batch_size)
    stage = CaptionStage(options, workspace)
    summary = run(stage)
    writer = stage.writer.engine.writer
    assert not writer.failed
    assert writer.shape.images == stage.batch_size() == (batch_size or 512)
    assert len(writer.shape.steps) == 3
    stats = workspace.part("captions", "recorded").stats(0)
    assert (stats["precision"], stats["device"]) == ("bf16", torch.cuda.get_device_name())
    # Without recordings, batches as small as what can be used.
    plain = CaptionStage(options, workspace)
    plain.setup()
    plain.writer.engine.__dict__["writer"] = plain.writer.engine.model
    expected = [plain.process(shard) for shard in (0, 1)]
    assert summary.counts == expected[0].counts + expected[1].counts
    wanted = [text for each in expected for text in each.table["text"].to_pylist()]
    texts = [row["text"] for row in rows_of(workspace.part("captions", "recorded"))]
    assert [text is None for text in texts] == [text is None for text in wanted]
    same = [a == b for a, b in zip(texts, wanted, strict=True) if a]
    assert sum(same) >= 0.9 * len(same), "rounding may decide now and then"


def test_what_auto_comes_to_is_told_and_never_mixed(workspace, monkeypatch):
    """Half of the shards from a worker with a GPU, half from one without, under one identity."""
    caption(workspace)
    part = workspace.part("captions", "captioner")
    stats = part.stats(0)
    assert (stats["precision"], stats["device"], stats["attention"]) == ("fp32", "cpu", "sdpa")
    scoring = ScoreOptions(filter="filter", images="web", captions=("captioner",))
    run(ScoreStage(scoring, workspace))
    assert workspace.part("scores", "filter").stats(1)["precision"] == "fp32"
    options = CaptionOptions(images="web", prompt="", max_new_tokens=6)
    for stage in (ScoreStage(scoring, workspace), CaptionStage(options, workspace)):
        (stage.output.record / "00001.manifest.json").unlink()
        (stage.output.path / "00001.parquet").unlink()
        with monkeypatch.context() as patch:
            patch.setattr(Engine, "computed", lambda self: {"precision": "bf16", "device": "NVIDIA H100"})
            with refused("fp32", "bf16", "NVIDIA H100"):
                run(stage)
    assert part.shards() == [0]
    assert run(CaptionStage(options, workspace)).done_now == 1


def test_a_batch_size_that_no_option_says_is_in_the_manifest(workspace, monkeypatch):
    def sizes(table, name):
        part = workspace.part(table, name)
        return [(part.manifest(shard).batch_size, part.stats(shard)["batch_size"]) for shard in part.shards()]

    caption(workspace, batch_size=5, out="asked")
    assert sizes("captions", "asked") == [(0, 5)] * 2
    caption(workspace, out="found")
    assert sizes("captions", "found") == [(64, 64)] * 2

    encode = Blip.encode_image

    def limited(self, images):
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, images)

    monkeypatch.setattr(Blip, "encode_image", limited)
    caption(workspace, batch_size=4, out="forced")
    assert sizes("captions", "forced") == [(2, 2)] * 2
    texts = [
        [row["text"] for row in rows_of(workspace.part("captions", name))] for name in ("asked", "forced")
    ]
    assert texts[0] == texts[1]
    run(ScoreStage(ScoreOptions(filter="filter", images="web", batch_size=4, out="forced"), workspace))
    assert sizes("scores", "forced") == [(2, 2)] * 2
    # A shard whose writer died before its manifest is adopted with what its footer says.
    part = workspace.part("scores", "forced")
    for path in part.path.glob("00000*.json"):
        path.unlink()
    run(ScoreStage(ScoreOptions(filter="filter", images="web", batch_size=4, out="forced"), workspace))
    assert part.manifest(0).batch_size == 2


def test_all_shards_have_the_batch_size_that_the_first_worker_chose(workspace, monkeypatch):
    # Catches: captions and scores rounded by the memory of whichever card a shard was worked on with, after a resume too.
    def chosen(size):
        monkeypatch.setattr(engine, "batch_that_fits", lambda *_: size)

    captioning = CaptionOptions(images="web", prompt="", max_new_tokens=4)
    scoring = ScoreOptions(filter="filter", images="web")
    for stage, options in ((CaptionStage, captioning), (ScoreStage, scoring)):
        chosen(4)
        part = stage(options, workspace).output
        run(stage(options, workspace))
        for path in (part.record / "00001.manifest.json", part.path / "00001.parquet"):
            path.unlink()
        chosen(64)
        assert run(stage(options, workspace)).done_now == 1
        assert [part.stats(shard)["batch_size"] for shard in part.shards()] == [4, 4]
        # What was asked for is no worker's choice.
        other = dataclasses.replace(options, batch_size=3, out=f"{part.name}-asked")
        run(stage(other, workspace))
        asked = stage(other, workspace).output
        assert [asked.stats(shard)["batch_size"] for shard in asked.shards()] == [3, 3]


def test_a_precision_is_part_of_what_a_part_is_and_the_default_is_not(workspace):
    caption(workspace)
    plain = CaptionStage(CaptionOptions(images="web"), workspace)
    assert "precision" not in plain.identity()["options"], (
        "or parts of earlier releases would not count as done"
    )
    with refused("precision"):
        caption(workspace, precision="int8")
    caption(workspace, precision="int8", out="low")
    rows, low = (rows_of(workspace.part("captions", name)) for name in ("captioner", "low"))
    assert [row["image_id"] for row in rows] == [row["image_id"] for row in low]
    assert [row["logprob"] for row in rows] != [row["logprob"] for row in low]
    with refused("--precision fp4"):
        caption(workspace, precision="fp4", out="other")
    with refused("clip:x", "plug-in"):
        ScoreStage(ScoreOptions(filter="clip:x", images="web", precision="int8"), workspace)


def test_a_second_run_does_nothing_and_a_changed_option_is_refused(workspace):
    assert caption(workspace).done_now == 2
    path = workspace.part("captions", "captioner").path / "00000.parquet"
    before = (path.stat().st_mtime_ns, path.read_bytes())
    again = caption(workspace)
    assert (again.done_now, again.done_before) == (0, 2)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before
    with refused("top_p", 0.9, 0.5):
        caption(workspace, top_p=0.5)


def test_scores_every_text_of_a_picture_that_is_there(workspace):
    caption(workspace)
    summary = run(ScoreStage(ScoreOptions(images="web", captions=("captioner",)), workspace))
    counts = summary.counts
    synthetic = 11
    found = 6 + 1 + 3 + 4
    assert counts.rows_in == synthetic + found
    assert counts.dropped == {"no_image": 1}
    assert counts.failed["too_long"] == 1
    assert counts.failed["empty_text"] >= 2
    assert counts.failed["truncated"] == 2  # the broken picture's own text and its failed synthetic one
    rows = rows_of(workspace.part("scores", "filter"))
    good = [row for row in rows if row["failure"] is None]
    assert len(rows) == counts.rows_in - 1
    assert all(0 <= row["itm_score"] <= 1 and -1 <= row["itc_score"] <= 1 for row in good)
    assert all(row["itm_score"] is None for row in rows if row["failure"])


def test_scores_agree_with_scoring_one_pair_at_a_time(workspace):
    from capfilt import Filter
    from capfilt.tables.texts import found_texts

    run(ScoreStage(ScoreOptions(images="web"), workspace))
    engine = Filter.load(workspace.model("filter"))
    images = workspace.part("images", "web").read(0)
    scored = {row["text_id"]: row for row in workspace.part("scores", "filter").read(0).to_pylist()}
    pixels = dict(zip(images["image_id"].to_pylist(), images["image"].to_pylist(), strict=True))
    for row in found_texts(images).to_pylist():
        if row["text_id"] in scored and pixels[row["image_id"]] is not None:
            alone = engine.score([pixels[row["image_id"]]["bytes"]], [row["text"]])[0]
            assert scored[row["text_id"]]["itm_score"] == pytest.approx(alone.itm_score, abs=1e-5)
            assert scored[row["text_id"]]["itc_score"] == pytest.approx(alone.itc_score, abs=1e-5)


def test_select_keeps_at_the_threshold_and_says_why_it_dropped(workspace):
    caption(workspace)
    put_scores(workspace, lambda row: 0.5 if row["source"] == "web" else 0.4999)
    options = SelectOptions(images="web", captions=("captioner",), scores="chosen", out="rule")
    summary = run(Select(options, workspace))
    rows = rows_of(workspace.part("verdicts", "rule"))
    assert summary.counts.rows_in == len(rows) == 14 + 11
    reasons = {}
    for row in rows:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
        assert row["keep"] == (row["reason"] == "itm_score_at_threshold")
    assert reasons["no_image"] == 1
    assert reasons["truncated"] == 1
    assert all(row["source"] == "web" for row in rows if row["keep"])
    pairs = run(WritePairs(options, workspace))
    assert pairs.counts.kept == pairs.rows_out
    assert pairs.counts.dropped["no_image"] == 1
    kept = rows_of(workspace.part("pairs", "rule"))
    assert sum(len(row["texts"]) for row in kept) == sum(row["keep"] for row in rows)
    assert all(row["image"]["bytes"] for row in kept)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_a_kept_fraction_is_a_global_quantile(workspace, fraction):
    order = {}
    put_scores(workspace, lambda row: order.setdefault(row["text_id"], len(order) / 14))
    options = SelectOptions(images="web", scores="chosen", out="rule", keep_fraction=fraction)
    run(Select(options, workspace))
    wanted = {text for text, score in order.items() if score >= sorted(order.values())[-round(fraction * 14)]}
    assert len(wanted) == round(fraction * 14)
    rows = rows_of(workspace.part("verdicts", "rule"))
    lost = {row["text_id"] for row in rows if row["reason"] == "no_image"}
    assert {row["text_id"] for row in rows if row["keep"]} == wanted - lost


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.75, 1.0])
def test_the_threshold_of_a_kept_fraction_is_found_once_for_all_workers(workspace, monkeypatch, fraction):
    """Catches a threshold that every worker finds for itself, in all shards each."""
    order = {}
    put_scores(workspace, lambda row: order.setdefault(row["text_id"], len(order) / 14))
    partition, found = np.partition, []
    monkeypatch.setattr(np, "partition", lambda *given: (found.append(given), partition(*given))[1])
    stage = Select(
        SelectOptions(images="web", scores="chosen", out="rule", keep_fraction=fraction), workspace
    )
    mark = stage.begin()
    travelling = pickle.dumps(stage)
    for shard in stage.shards():
        process_and_commit(pickle.loads(travelling), mark, shard)
    assert len(found) == 1
    assert len(stage.output.shards()) > 1
    assert any(row["keep"] for row in rows_of(stage.output))


def test_a_damaged_part_that_nobody_named_stops_no_threshold(workspace):
    caption(workspace, out="other")
    put_scores(workspace, lambda row: 0.5)
    (workspace.part("captions", "other").record / "part.json").write_text("{")
    options = SelectOptions(images="web", scores="chosen", out="rule", keep_fraction=0.5)
    assert run(Select(options, workspace)).counts.kept


def test_a_kept_fraction_is_of_the_texts_that_may_be_kept(workspace):
    """Catches a share that counts texts which --sources drop: 0.5 of the synthetic ones kept none of
    them, because every web text scored higher.
    """
    caption(workspace)
    web = lambda row: row["source"] == "web"
    order = {}
    put_scores(workspace, lambda row: order.setdefault(row["text_id"], len(order) / 100 + web(row)))
    scored = list(rows_of(workspace.part("scores", "chosen")))
    assert len(scored) > 20
    for sources in (("synthetic",), ("web",)):
        rule = f"half-{sources[0]}"
        options = SelectOptions(
            images="web",
            captions=("captioner",),
            scores="chosen",
            out=rule,
            keep_fraction=0.5,
            sources=sources,
        )
        run(Select(options, workspace))
        rows = rows_of(workspace.part("verdicts", rule))
        asked = [
            row["itm_score"] for row in rows if row["source"] in sources and row["itm_score"] is not None
        ]
        least = sorted(asked)[-round(len(asked) / 2)]
        kept = [row for row in rows if row["keep"]]
        assert kept
        assert all(row["source"] in sources and row["itm_score"] >= least for row in kept)
        usable = [row for row in rows if row["source"] in sources and row["reason"].startswith("itm_score")]
        assert len(kept) == sum(row["itm_score"] >= least for row in usable)


def test_a_share_is_not_mixed_with_captions_that_were_scored_and_are_not_judged(workspace):
    """Catches a share of web texts that takes another captioner's scored texts for found ones."""
    caption(workspace)
    run(ScoreStage(ScoreOptions(images="web", captions=("captioner",), out="both"), workspace))
    found = SelectOptions(images="web", scores="both", out="found", keep_fraction=0.5)
    stage = Select(found, workspace)
    made = {row["text_id"] for row in rows_of(workspace.part("captions", "captioner"))}
    scores = [row for row in rows_of(workspace.part("scores", "both")) if row["itm_score"] is not None]
    web = sorted(row["itm_score"] for row in scores if row["text_id"] not in made)
    assert len(web) < len(scores)
    assert stage.threshold == web[-round(len(web) / 2)]
    (workspace.path / "captions" / "captioner").rename(workspace.path / "elsewhere")
    assert Select(found, workspace).threshold == stage.threshold


def test_a_threshold_beside_a_kept_fraction_is_refused(workspace):
    """Catches --threshold 0.9 that --keep-fraction overrides without a word."""
    put_scores(workspace, lambda row: 0.9)
    with refused("--keep-fraction", "--threshold"):
        Select(SelectOptions(images="web", scores="chosen", keep_fraction=0.5, threshold=0.9), workspace)


def test_keeping_nothing_is_said(workspace):
    """Catches a rule that keeps nothing and says nothing of it."""
    put_scores(workspace, lambda row: 0.125)
    options = SelectOptions(images="web", scores="chosen", out="rule")
    summary = run(Select(options, workspace))
    assert "nothing is kept: itm_score of 14 texts is between 0.125 and 0.125" in "\n".join(summary.lines())
    assert "nothing is kept" in "\n".join(run(Select(options, workspace)).lines())  # nor the second time
    lower = dataclasses.replace(options, threshold=0.1, out="lower")
    assert "nothing" not in "\n".join(run(Select(lower, workspace)).lines())


def test_captions_of_other_images_are_refused_by_name(workspace):
    """Catches captions of another images part, whose shards have the same numbers: they ended in "rows do not add up"."""
    caption(workspace)
    write_images(workspace.part("images", "other"), [image_rows("other", 5), image_rows("other", 5, start=5)])
    put_scores(workspace, lambda row: 0.9)
    for stage in (
        ScoreStage(ScoreOptions(images="other", captions=("captioner",)), workspace),
        Select(SelectOptions(images="other", captions=("captioner",), scores="chosen"), workspace),
    ):
        with refused("captions/captioner", "images/other", "shard"):
            run(stage)
        assert not stage.output.path.exists()


def test_human_texts_are_kept_only_when_asked_for(workspace):
    put_scores(workspace, lambda row: 0.9)
    run(Select(SelectOptions(images="web", scores="chosen", out="none", sources=("synthetic",)), workspace))
    rows = rows_of(workspace.part("verdicts", "none"))
    assert not any(row["keep"] for row in rows)
    assert {row["reason"] for row in rows} == {"no_image", "source_not_selected"}


def test_missing_inputs_and_wrong_options_are_one_line_and_write_nothing(workspace):
    before = sorted(str(path) for path in workspace.path.rglob("*"))
    cases = [
        lambda: CaptionStage(CaptionOptions(images="nowhere"), workspace),
        lambda: CaptionStage(CaptionOptions(images="web", captioner="nowhere"), workspace),
        lambda: CaptionStage(CaptionOptions(images="web", method="magic"), workspace),
        lambda: CaptionStage(CaptionOptions(images="web", top_p=0.0), workspace),
        lambda: ScoreStage(ScoreOptions(images="web", captions=("nowhere",)), workspace),
        lambda: Select(SelectOptions(images="web", scores="nowhere"), workspace),
        lambda: Select(SelectOptions(images="web", by="beauty"), workspace),
        lambda: Select(SelectOptions(images="web", keep_fraction=2.0), workspace),
    ]
    for case in cases:
        with refused():
            case()
    assert sorted(str(path) for path in workspace.path.rglob("*")) == before


def test_a_part_of_the_wrong_table_is_refused(workspace):
    with refused("table images", "scores"):
        Select(SelectOptions(images="web", scores=str(workspace.path / "images" / "web")), workspace)


def test_a_changed_input_shard_is_noticed(workspace):
    caption(workspace)
    part = workspace.part("images", "web")
    (part.path / "00001.parquet").unlink()
    (part.record / "00001.manifest.json").unlink()
    from capfilt.tables.contracts import IMAGES
    from tests.worlds import image_rows

    rows = image_rows("web", 3, start=50)
    part.commit(1, IMAGES.table(rows), Counts(3, 3), part.info["fingerprint"], 0.1)
    with refused("00001", "stale"):
        caption(workspace)


def test_pairs_open_without_capfilt(workspace):
    put_scores(workspace, lambda row: 0.9)
    options = SelectOptions(images="web", scores="chosen", out="rule")
    run(Select(options, workspace))
    run(WritePairs(options, workspace))
    table = pq.read_table(workspace.part("pairs", "rule").path / "00000.parquet")
    origin = ["dataset", "key", "url", "license", "width", "height", "sha256"]
    assert table.column_names == ["image_id", "image", "texts", "split", *origin]
    assert b"huggingface" in table.schema.metadata


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", [{}, {"keep_fraction": 1.0}, {"threshold": 0.0}])
def test_a_score_that_is_no_number_is_kept_by_no_rule(workspace, value, rule):
    """Catches `not value < threshold`, which keeps NaN; and a quantile that counts what nothing can be above."""
    scored = iter([0.6, 0.7])
    put_scores(workspace, lambda row: next(scored, value))
    summary = run(Select(SelectOptions(images="web", scores="chosen", **rule), workspace))
    assert summary.counts.kept == 2
    rows = rows_of(workspace.part("verdicts", "capfilt"))
    lost = {
        row["reason"]
        for row in rows
        if row["itm_score"] not in (None, pytest.approx(0.6), pytest.approx(0.7))
    }
    assert lost <= {"not_finite", "no_image", "truncated"}
    assert "not_finite" in lost


@pytest.mark.parametrize(
    ("by", "threshold", "good"),
    [("itm_score", 1.5, False), ("itm_score", -0.1, False), ("itc_score", 1.01, False), ("itc_score", -0.5, True),
     ("itm_score", 1.0, True), ("itm_score", 0.0, True)],
)  # fmt: skip
def test_a_threshold_is_where_its_scores_are(workspace, by, threshold, good):
    put_scores(workspace, lambda row: 0.5)
    options = SelectOptions(images="web", scores="chosen", by=by, threshold=threshold)
    if good:
        Select(options, workspace)
        return
    with refused(f"--threshold {threshold:g}", by):
        Select(options, workspace)
