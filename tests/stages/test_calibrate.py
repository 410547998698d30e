"""Catches probabilities that nobody calibrated, calibration pictures that trained the judge, and rows that workers decide."""

from __future__ import annotations

import dataclasses
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.calibration.fit import calibrate, class_weights, reliability
from capfilt.calibration.judgement import Known, _Scored, ratios_of, told_apart
from capfilt.calibration.ranking import roc_auc
from capfilt.calibration.share import posterior
from capfilt.catalog.report import render
from capfilt.cli import main
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import checkpoint
from capfilt.plugins.checkpoints import FamilyScorer
from capfilt.stages.calibrate import CalibrateOptions, judging
from capfilt.stages.calibrate import stage as stage_module
from capfilt.stages.calibrate.held_out import near_texts, trained_on
from capfilt.stages.calibrate.judge import Judge, JudgePairs
from capfilt.stages.calibrate.stage import Calibrate
from capfilt.stages.prove import ProveOptions
from capfilt.stages.prove.stage import Prove
from capfilt.stages.registry import stage_command
from capfilt.stages.select import SelectOptions
from capfilt.stages.select.stage import Select, WritePairs
from capfilt.stages.train import FinetuneFilter, Pretrain, Retrain
from capfilt.tables.calibrations import read
from capfilt.tables.contracts import CAPTIONS
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import names, refused
from tests.worlds import COLOURS, failed_row, image_rows, write_images

WRONG = 0.4


def colourful(dataset, count, start, source="human", wrong=0.0, seed=0):
    """Pictures of one colour with a text that names it, or, for the share `wrong`, another colour; and which are true."""
    rng = np.random.default_rng(seed)
    rows = image_rows(dataset, count, source=source, start=start)
    names, truth = list(COLOURS), {}
    for row in rows:
        colour = next(name for name in names if name in row["captions"][0])
        true = rng.random() >= wrong
        said = colour if true else names[(names.index(colour) + 1 + rng.integers(3)) % 4]
        row["captions"] = [f"a {said} square"]
        truth[row["image_id"]] = true
    return rows, truth


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A judge that tells colours, calibration pictures that it never saw, and web pairs of which some are wrong."""
    made = Workspace(tmp_path_factory.mktemp("calibrate"))
    rows, _ = colourful("human", 120, 0)
    write_images(made.part("images", "human"), [rows])
    rows, _ = colourful("held", 80, 1000)
    write_images(made.part("images", "held"), [rows])
    rows, truth = colourful("web", 240, 2000, "web", WRONG)
    lost = failed_row("web", "lost")
    write_images(made.part("images", "web"), [rows[:100], [*rows[100:], lost]])
    written = [
        {
            "text_id": text_id(row["image_id"], "synthetic", "a square", "c", 0), "image_id": row["image_id"],
            "text": "a square", "sample_index": 0, "captioner": "c", "decoding": "{}",
        }
        for row in rows[:5]
    ]  # fmt: skip
    part = made.part("captions", "c")
    mark = part.begin(CAPTIONS, "test", {})
    part.commit(0, CAPTIONS.table(written), Counts(5, 5, {}, {}), mark, 0.01)
    part.commit(1, CAPTIONS.table([]), Counts(0, 0, {}, {}), mark, 0.01)
    options = stage_command("retrain-locked").options(
        preset="tiny", human=("human",), steps=120, batch_size=32, warmup_steps=5, vocab_size=600, learning_rate=1e-2,
        out="judge",
    )  # fmt: skip
    run_stage(Retrain(options, made), InlineExecutor(), quiet=True)
    return made, truth


def calibrated(place, out="calibrated", **more):
    options = CalibrateOptions(
        **{"images": "web", "filter": ("judge",), "calibration": "held", "out": out, "resamples": 20, **more}
    )
    for stage in (JudgePairs, Judge, Calibrate):
        run_stage(stage(options, place), InlineExecutor(), quiet=True)
    return place.part("scores", out)


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def test_probabilities_tell_true_texts_and_the_share_is_that_of_the_corpus(world):
    place, truth = world
    part = calibrated(place)
    rows = [row for row in rows_of(part) if row["match_probability"] is not None]
    assert len(rows) == 240
    p = np.array([row["match_probability"] for row in rows])
    true = np.array([truth[row["image_id"]] for row in rows])
    assert p[true].mean() > 0.85
    assert p[~true].mean() < 0.15
    made = read(part)
    assert made["share"] == pytest.approx(true.mean(), abs=0.06)
    assert made["share_interval"][0] <= made["share"] <= made["share_interval"][1]
    assert made["share"] <= made["share_bound"]
    assert (made["images"], made["texts"]) == (80, 240)
    # The expectation needs no labels, and is right here.
    half = made["cuts"][0]
    assert half["precision"] == pytest.approx(true[p >= 0.5].mean(), abs=0.1)
    assert half["kept"] == pytest.approx((p >= 0.5).mean(), abs=1e-6)


def test_a_synthetic_text_has_no_probability_and_is_counted(world):
    place, _ = world
    part = calibrated(place, "with-captions", captions=("c",))
    rows = rows_of(part)
    assert len(rows) == 245
    assert sum(row["match_probability"] is None for row in rows) == 5
    assert all(row["hub_score"] is not None for row in rows)
    assert part.counts().dropped == {"synthetic_not_calibrated": 5}
    # It decides nothing of the others.
    plain = {row["text_id"]: row["match_probability"] for row in rows_of(calibrated(place))}
    assert {row["text_id"]: row["match_probability"] for row in rows if row["text_id"] in plain} == plain


def test_the_same_rows_again_and_another_fingerprint_for_another_fit(world):
    place, _ = world
    first = calibrated(place)
    other = calibrated(place, "isotonic", method="isotonic")
    assert first.info["fingerprint"] != other.info["fingerprint"]
    assert rows_of(first) != rows_of(other)
    assert [row["hub_score"] for row in rows_of(first)] == [row["hub_score"] for row in rows_of(other)]
    again = calibrated(place, "again")
    assert rows_of(again) == rows_of(first)
    # A second run finds all done, the fit too.
    summary = run_stage(Calibrate(_options("again"), place), InlineExecutor(), quiet=True)
    assert summary.done_now == 0


def _options(out, **more):
    given = {
        "images": "web",
        "filter": ("judge",),
        "calibration": "held",
        "out": out,
        "resamples": 20,
        **more,
    }
    return CalibrateOptions(**given)


def test_a_lost_shard_is_made_again_with_the_fit_that_stands(world):
    place, _ = world
    part = calibrated(place, "lost")
    before = [(path.name, path.read_bytes()) for path in sorted(part.path.glob("*.parquet"))]
    (part.path / "00001.parquet").unlink()
    (part.record / "00001.manifest.json").unlink()
    calibrated(place, "lost")
    assert [(path.name, path.read_bytes()) for path in sorted(part.path.glob("*.parquet"))] == before


def test_select_judges_by_it_finds_a_precision_and_weighs(world, capsys):
    place, _ = world
    calibrated(place)
    rule = {"images": "web", "scores": "calibrated", "sources": ("web",)}
    stage = Select(SelectOptions(**rule, out="half"), place)
    assert stage.by == "match_probability"
    run_stage(stage, InlineExecutor(), quiet=True)
    assert any("judged by match_probability" in line for line in stage.remarks())
    options = SelectOptions(**rule, out="sure", precision=0.95, weight="match_probability")
    for each in (Select, WritePairs):
        run_stage(each(options, place), InlineExecutor(), quiet=True)
    verdicts = rows_of(place.part("verdicts", "sure"))
    kept = [row["match_probability"] for row in verdicts if row["keep"]]
    values = sorted(
        (row["match_probability"] for row in verdicts if row["match_probability"] is not None), reverse=True
    )
    assert np.mean(kept) >= 0.95
    more = values[: len(kept) + 1]
    assert np.mean(more) < 0.95 or len(more) == len(kept)
    weights = [text["weight"] for row in rows_of(place.part("pairs", "sure")) for text in row["texts"]]
    assert sorted(weights) == pytest.approx(sorted(kept))


def test_trainings_draw_verdicts_by_their_weight(world):
    from capfilt.data.pair_shards import PairInput
    from capfilt.data.pairs import Pairs

    place, _ = world
    calibrated(place)
    options = SelectOptions(
        images="web",
        scores="calibrated",
        sources=("web",),
        threshold=0.0,
        out="soft",
        weight="match_probability",
    )
    for each in (Select, WritePairs):
        run_stage(each(options, place), InlineExecutor(), quiet=True)
    joined = Pairs([PairInput(place.part("images", "web"), place.part("verdicts", "soft"))], size=16)
    written = Pairs([PairInput(place.part("pairs", "soft"))], size=16)
    assert joined.drawn == pytest.approx(written.drawn)
    assert 0 < joined.drawn < len(joined)


def test_the_command_prints_the_share_and_what_thresholds_keep(world, capsys):
    place, _ = world
    words = [
        "calibrate",
        "--images",
        "web",
        "--filter",
        "judge",
        "--calibration",
        "held",
        "--out",
        "told",
        "--resamples",
        "20",
    ]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "-w", str(place.path), "--execution", "inline"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "share of true pairs" in out
    assert "p >= 0.5 keeps" in out


def test_what_cannot_be_calibrated_is_refused_before_anything_is_judged(world, tmp_path):
    """Catches hours of judging before the first look at the calibration part, and noise or nothing taken for human pairs."""
    place, _ = world
    few, _ = colourful("few", 20, 5000)
    write_images(place.part("images", "few"), [few])
    mute = [
        {**row, "captions": row["captions"][: place < 6]}
        for place, row in enumerate(colourful("mute", 60, 6000)[0])
    ]
    write_images(place.part("images", "mute"), [mute])
    found, _ = colourful("found", 60, 7000, "web")
    write_images(place.part("images", "found"), [found])
    alike = [{**row, "captions": ["A  picture"]} for row in colourful("alike", 60, 8000)[0]]
    write_images(place.part("images", "alike"), [alike])
    hashes = [f"{number:064x}" for number in range(60)]
    copies = [
        {**row, "sha256": digest}
        for row, digest in zip(colourful("copies", 60, 9000)[0], hashes, strict=True)
    ]
    write_images(place.part("images", "copies"), [copies])
    hashed = [
        {**row, "sha256": digest}
        for row, digest in zip(colourful("hashed", 4, 9500, "web")[0], hashes, strict=False)
    ]
    write_images(place.part("images", "hashed"), [hashed])
    for calibration, images, words in (
        ("few", "web", ("--calibration few", "20", "50")),
        ("mute", "web", ("--calibration mute", "6", "50")),
        ("found", "web", ("--calibration found", "0", "human")),
        ("alike", "web", ("--calibration alike", "one text")),
        ("human", "web", ("--calibration human", "120", "trained judge")),
        ("web", "web", ("--calibration web", "judged")),
        ("copies", "hashed", ("--calibration copies", "4", "--images hashed")),
    ):
        with refused(*words):
            calibrated(place, f"refused-{calibration}", calibration=calibration, images=images)
        for table, name in (("scores", ""), ("scores", "-judged"), ("signals", "-pairs")):
            assert not place.part(table, f"refused-{calibration}{name}").exists
    with refused("--compile"):
        calibrated(place, "refused-compile", compile=True)
    config = place.model("judge") / "exposures.parquet"
    moved = config.rename(tmp_path / "exposures.parquet")
    try:
        made = read(calibrated(place, "unsaid"))
    finally:
        moved.rename(config)
    assert "does not say" in made["warnings"][0]


def test_a_filter_that_ranks_own_texts_no_higher_is_refused(world, monkeypatch):
    """Catches a share and probabilities by a judge that takes wrong texts for right ones."""
    place, _ = world
    read_right = judging.read
    monkeypatch.setattr(judging, "read", lambda embed, texts: -read_right(embed, texts))
    for method in ("platt", "isotonic"):
        with refused("--filter judge", "higher"):
            calibrated(place, f"turned-{method}", method=method)
        assert not place.part("scores", f"turned-{method}").exists


def test_checkpoints_that_the_filter_started_from_are_heard_too(world):
    """Catches calibration pictures that trained the filter's ancestor, and such as no step ever drew."""
    place, _ = world
    whole = pq.read_table(place.model("judge") / "exposures.parquet")
    seen = set(whole["image_id"].to_pylist())
    assert trained_on(place.model("judge"), place) == seen
    contents, _ = checkpoint.open_any(place.model("judge"))
    parent, child = place.model("parent"), place.model("child")
    checkpoint.save(parent, contents.model, contents.tokenizer, {})
    origins = checkpoint.origin(parent, "parent")
    checkpoint.save(child, contents.model, contents.tokenizer, {"origins": origins})
    drawn = pa.table({"image_id": ["a", "b"], "exposures": [3, 0]})
    pq.write_table(drawn, child / "exposures.parquet")
    assert trained_on(child, place) == {"a"}  # its parent does not say
    pq.write_table(pa.table({"image_id": ["c"], "exposures": [1]}), parent / "exposures.parquet")
    assert trained_on(child, place) == {"a", "c"}
    # Another checkpoint under the parent's name is no parent.
    other = {f"{mark[:-1]}x": said for mark, said in origins.items()}
    checkpoint.save(child, contents.model, contents.tokenizer, {"origins": other})
    assert trained_on(child, place) == {"a"}


def test_the_bank_decodes_its_own_pictures_alone_and_of_a_bounded_number_of_shards(world, monkeypatch):
    """Catches every worker decoding the whole corpus for a bank of a few pairs."""
    place, _ = world
    options = _options("bank", bank=6)
    judges = Judge(options, place).judging
    prepared = []
    whole = judges.prepare
    judges.prepare = lambda data: prepared.append(data) or whole(data)
    with judges.ready():
        assert len(judges.banks[0][0].image_ids) == len(prepared) == 6
    assert len(judges.drawn) == 2
    monkeypatch.setattr(judging, "BANK_SHARDS", 1)
    assert len(Judge(options, place).judging.drawn) == 1
    assert Judge(options, place).judging.drawn != Judge(_options("bank", bank=6, seed=1), place).judging.drawn


@pytest.mark.parametrize("kind", [JudgePairs, Judge])
def test_rows_depend_on_no_worker(kind, world):
    """Catches a bank or foreign texts that a worker draws for itself: each shard by a worker of its own, in reverse."""
    place, _ = world
    calibrated(place)
    first = kind(_options("calibrated"), place)
    rows = {shard: first.output.read(shard) for shard in first.shards()}
    for shard in reversed(first.shards()):
        worker = pickle.loads(pickle.dumps(first))
        worker.setup()
        made = worker.process(shard)
        worker.teardown()
        assert worker.contract.conform(made.table).equals(rows[shard])


def test_each_picture_has_its_own_texts_and_distinct_foreign_ones(world):
    place, _ = world
    calibrated(place)
    rows = rows_of(place.part("signals", "calibrated-pairs"))
    texts = {row["image_id"]: row["captions"][0] for row in rows_of(place.part("images", "held"))}
    named = {text_id(image, "human", text, "", 0): (image, text) for image, text in texts.items()}
    assert len({(row["image_id"], row["text_id"]) for row in rows}) == len(rows)
    for row in rows:
        image, text = named[row["text_id"]]
        assert row["own"] == (image == row["image_id"]) == (text == texts[row["image_id"]])
        assert row["failure"] is None
        assert row["hub_score"] is not None
    foreign = [row["image_id"] for row in rows if not row["own"] and not row["near"]]
    assert all(foreign.count(image) == 10 for image in texts)


def test_near_texts_are_those_of_like_pictures():
    """Catches near misses that are the picture's own words, that it was given before, or that any picture has."""
    angles = np.linspace(0, np.pi / 2, 60)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    ids = [f"{place:02d}" for place in range(60)]
    pairs = {
        image: [
            {"text_id": image, "image_id": image, "text": f"Text {place // 2}", "own": True, "near": False},
            {"text_id": "f", "image_id": image, "text": "text 12", "own": False, "near": False},
        ]
        for place, image in enumerate(ids)
    }
    found = near_texts(pairs, ids, vectors, 3, 0)
    for place, image in enumerate(ids):
        assert len(found[image]) == 3
        for row in found[image]:
            assert (row["image_id"], row["own"], row["near"]) == (image, False, True)
            assert row["text"] not in (f"Text {place // 2}", "Text 12")
            assert abs(int(row["text_id"]) - place) <= 21
    mixed = np.random.default_rng(0).permutation(60)
    assert near_texts(pairs, [ids[n] for n in mixed], vectors[mixed], 3, 0) == found
    assert near_texts(pairs, ids, vectors, 3, 1) != found


def test_another_calibration_part_gives_another_fingerprint(world):
    place, _ = world
    rows, _ = colourful("other", 70, 15_000)
    write_images(place.part("images", "other"), [rows])
    one, two = calibrated(place), calibrated(place, "otherwise", calibration="other")
    assert one.info["fingerprint"] != two.info["fingerprint"]
    with refused("another identity", "calibrated-pairs"):
        calibrated(place, calibration="other")


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_reliability_is_of_pictures_that_the_fit_did_not_see(method):
    """Catches a calibration error of nought, by a curve that bends to the very pairs that it is judged by."""
    rng = np.random.default_rng(0)
    owners = np.repeat([f"{image}" for image in range(60)], 4)
    scores, truth = rng.normal(size=240), rng.random(240) < 0.5
    folds = Known(owners, scores[:, None], truth, ~truth).folds
    told = told_apart(_Scored(owners, scores, truth), folds, 0.5, method)
    weight = class_weights(truth, 0.5)
    seen = posterior(ratios_of(calibrate(scores, truth, 0.5, method=method, link="identity"), scores), 0.5)
    if method == "isotonic":
        assert reliability(seen, truth, weight)[1] < 1e-9 < 0.02 < reliability(told, truth, weight)[1]
    # Other truths of one picture change no probability of its own, and those of others.
    turned = truth.copy()
    turned[:4] = ~turned[:4]
    moved = np.abs(told_apart(_Scored(owners, scores, turned), folds, 0.5, method) - told) > 1e-12
    assert moved.any()
    assert not moved[:4].any()


def test_a_calibration_that_changed_on_disk_is_refused(world):
    place, _ = world
    part = calibrated(place, "spoilt")
    path = part.record / "calibration.json"
    stands = path.read_bytes()
    path.write_text(json.dumps({**json.loads(stands), "share": 0.99}))
    with refused("calibration.json", "run calibrate again"):
        read(part)
    path.write_bytes(stands)


def test_a_precision_that_no_set_has_keeps_nothing_and_says_so(world):
    place, _ = world
    calibrated(place)
    stage = Select(
        SelectOptions(images="web", scores="calibrated", sources=("web",), out="never", precision=1.0), place
    )
    run_stage(stage, InlineExecutor(), quiet=True)
    (line,) = stage.remarks()
    best = max(row["match_probability"] or 0 for row in rows_of(place.part("scores", "calibrated")))
    assert names(line, "nothing is kept", f"{best:.4g}", "--precision")


def test_rules_that_exclude_one_another(world):
    place, _ = world
    calibrated(place)
    rule = SelectOptions(images="web", scores="calibrated", sources=("web",), out="none")
    for more in ({"precision": 0.9, "keep_fraction": 0.3}, {"precision": 0.9, "threshold": 0.7}):
        with refused("--precision 0.9", "give one of them"):
            Select(dataclasses.replace(rule, **more), place)
    with refused("--precision 0.9", "match_probability"):
        Select(dataclasses.replace(rule, precision=0.9, by="itc_score"), place)
    with refused("--weight itc_score"):
        Select(dataclasses.replace(rule, weight="itc_score"), place)


def test_the_report_shows_share_thresholds_and_reliability(world):
    """Catches a calibration that nobody sees, and a report that a part without one breaks."""
    place, _ = world
    part = calibrated(place)
    page = render(place)
    assert "Calibration: calibrated" in page
    assert "Calibration: calibrated-judged" not in page
    assert f"{read(part)['share']:.3f}".rstrip("0") in page
    assert "observed share over predicted probability of calibrated" in page


# ------------------------------------------------------------------ fused signals


@pytest.fixture(scope="module")
def neighbours(world):
    place, _ = world
    rows, _ = colourful("bank", 60, 20_000)
    # A text of the same words is no neighbour.
    rows = [{**row, "captions": [row["captions"][0].replace("a ", "the ")]} for row in rows]
    write_images(place.part("images", "bank"), [rows[:30], rows[30:]])
    return place


def test_neighbours_are_signals_and_any_signal_can_be_left_out(neighbours, world):
    """Catches neighbours that decide nothing, signals without an area of their own, and a column that nobody wrote."""
    _, truth = world
    part = calibrated(neighbours, "fused", neighbours=("bank",))
    rows = [row for row in rows_of(part) if row["match_probability"] is not None]
    names = ["itc_score", "hub_score", "image_neighbours", "text_neighbours"]
    assert {*names, "words", "unknown_words", "fold"} < rows[0].keys()
    made = read(part)
    assert set(made["signals"]) == set(names) == {*made["fusion"]["names"]}
    assert made["signals"]["image_neighbours"]["auc"] > 0.9
    true = [truth[row["image_id"]] for row in rows]
    for name in names:
        assert roc_auc([row[name] for row in rows], true) > 0.9, name
    assert roc_auc([row["match_probability"] for row in rows], true) > 0.95
    less = calibrated(
        neighbours, "less", judged="fused", neighbours=("bank",), signals=("hub_score", "text_neighbours")
    )
    assert not neighbours.part("scores", "less-judged").exists
    assert read(less)["fusion"]["names"] == ["hub_score", "text_neighbours"]
    assert less.info["fingerprint"] != part.info["fingerprint"]
    with refused("--signals itm_score"):
        calibrated(neighbours, "absent", signals=("itm_score",))


def test_neighbours_that_are_judged_or_calibrated_on_are_refused(neighbours):
    for bank, words in (("held", ("--neighbours held", "80")), ("web", ("--neighbours web", "240"))):
        with refused(*words):
            calibrated(neighbours, f"refused-{bank}-bank", neighbours=(bank,))
        assert not neighbours.part("signals", f"refused-{bank}-bank-pairs").exists


def test_a_set_judges_every_picture_by_the_checkpoint_of_its_fold(neighbours, world):
    """Catches a picture that is judged by a checkpoint that trained on it, and calibration pictures judged by all of a set."""
    place, _ = world
    single = calibrated(place, "folded", folds=2)
    folds = {row["image_id"]: row["fold"] for row in rows_of(single)}
    assert set(folds.values()) == {0, 1}
    for fold in (0, 1):
        rule = SelectOptions(
            images="web", scores="folded", sources=("web",), out=f"not{fold}", require=f"fold <> {fold}", threshold=0.5
        )  # fmt: skip
        for stage in (Select, WritePairs):
            run_stage(stage(rule, place), InlineExecutor(), quiet=True)
        options = stage_command("retrain-locked").options(
            preset="tiny", human=("human",), verdicts=(f"web=not{fold}",), steps=60, batch_size=32, warmup_steps=5,
            vocab_size=600, learning_rate=1e-2, out=f"second-{fold}", seed=fold,
        )  # fmt: skip
        run_stage(Retrain(options, place), InlineExecutor(), quiet=True)
    both = calibrated(place, "second", filter=("second-{fold}",), folds=2, previous="folded")
    (line,) = [line for line in _remarks(place, "second") if line.startswith("since folded")]
    assert names(line, "ROC-AUC", "share", "likely texts", "stop" if "stop" in line else "further")
    assert any("web text" in line and "by heart" in line for line in read(both)["warnings"])
    with refused("--previous folded-judged", "calibrate"):
        calibrated(place, "no-previous", previous="folded-judged")
    cosines = {row["text_id"]: row["itc_score"] for row in rows_of(both)}
    for fold in (0, 1):
        # One checkpoint alone may judge what it saw, and says so.
        alone = calibrated(place, f"alone{fold}", filter=(f"second-{fold}",), folds=2)
        assert any("by heart" in line for line in read(alone)["warnings"])
        for row in rows_of(alone):
            same = row["itc_score"] == pytest.approx(cosines[row["text_id"]], abs=1e-6)
            assert same or folds[row["image_id"]] != fold
    assert len(place.part("scores", "second-judged").info["origins"]) == 2
    with refused("second-{fold}", "--folds 2"):
        calibrated(place, "other-folds", filter=("second-{fold}",), folds=3)
    with refused("lonely-{fold}", "lonely-0"):
        calibrated(place, "no-set", filter=("lonely-{fold}",))
    for fold in (0, 1):
        place.model(f"turned-{1 - fold}").symlink_to(place.model(f"second-{fold}"))
    with refused("turned-{fold}", "fold 0", "--require"):
        calibrated(place, "turned", filter=("turned-{fold}",), folds=2)


# ------------------------------------------------------------------ synthetic texts


def captioned(place, images, name, wrong, by="captioner", origins=None, text=None):
    """Captions of an images part by colour, or another colour for the share `wrong`; which are true, by text_id."""
    part, written = place.part("images", images), place.part("captions", name)
    rng = np.random.default_rng([len(images), 7])
    mark, truth = written.begin(CAPTIONS, "caption", {"captioner": by}, origins), {}
    for shard in part.shards():
        rows = []
        for row in part.read(shard).to_pylist():
            if row["status"] != "success":
                continue
            # The world's pictures have their colour by place.
            colour = [*COLOURS][int(row["key"]) % 4]
            true = rng.random() >= wrong
            said = colour if true else [*COLOURS][([*COLOURS].index(colour) + 1 + rng.integers(3)) % 4]
            words = text or f"a {said} square"
            key = text_id(row["image_id"], "synthetic", words, by, 0)
            truth[key] = bool(true)
            rows.append(
                {
                    "text_id": key, "image_id": row["image_id"], "text": words, "sample_index": 0, "captioner": by,
                    "decoding": "{}",
                }
            )  # fmt: skip
        written.commit(shard, CAPTIONS.table(rows), Counts(len(rows), len(rows)), mark, 0.01)
    return truth


def test_synthetic_texts_have_a_probability_of_their_own(world):
    """Catches a captioner's texts that pass because a captioner wrote them."""
    place, _ = world
    truth = captioned(place, "web", "made", 0.1)
    captioned(place, "held", "made-held", 0.1)
    part = calibrated(place, "spoken", captions=("made",), calibration_captions=("made-held",))
    rows = [row for row in rows_of(part) if row["text_id"] in truth]
    assert len(rows) == len(truth) == 240
    p = np.array([row["match_probability"] for row in rows])
    true = np.array([truth[row["text_id"]] for row in rows])
    assert roc_auc(p, true) > 0.95
    assert (p[true] >= 0.5).mean() > 0.9 > 0.1 > (p[~true] >= 0.5).mean()
    made = read(part)["synthetic"]
    assert made["share"] == 0.5
    assert made["error"] < 0.15
    assert part.counts().dropped == {}
    assert any(
        names(line, "synthetic texts", f"{made['auc_near']:.3f}") for line in _remarks(place, "spoken")
    )
    assert "Calibration: spoken" in render(place)


def test_how_a_text_agrees_with_the_captions_of_its_picture_is_a_signal(world):
    """Catches another picture's captions, and a loop that disagrees; SIEVE's best cosine is told again here, one by one."""
    place, _ = world
    captioned(place, "web", "made", 0.1)
    captioned(place, "held", "made-held", 0.1)
    part = calibrated(place, "agreeing", captions=("made",), calibration_captions=("made-held",))
    made = read(part)
    assert made["signals"]["caption_agreement"]["auc"] > 0.8
    assert "caption_agreement" not in made["synthetic"]["fusion"]["names"]
    scorer = FamilyScorer(str(place.model("judge")))
    scorer.setup()

    def vector(text):
        return scorer.model.like_texts([text]).float().numpy()[0]

    written = {row["image_id"]: row["text"] for row in rows_of(place.part("captions", "made"))}
    said = {row["image_id"]: row["captions"][0] for row in rows_of(place.part("images", "web"))}
    synthetic = {row["text_id"] for row in rows_of(place.part("captions", "made"))}
    rows = rows_of(part)
    for row in rows[:20]:
        if row["text_id"] in synthetic:
            assert row["caption_agreement"] == pytest.approx(1, abs=1e-5)
        else:
            wanted = vector(written[row["image_id"]]) @ vector(said[row["image_id"]])
            assert row["caption_agreement"] == pytest.approx(float(wanted), abs=1e-5)


def test_a_proof_of_texts_judged_by_captions_wants_captions(world):
    place, _ = world
    captioned(place, "web", "made", 0.1)
    captioned(place, "held", "made-held", 0.1)
    calibrated(place, "agreed", captions=("made",), calibration_captions=("made-held",))
    rows, _ = colourful("proved", 60, 50_000)
    write_images(place.part("images", "proved"), [rows])
    with refused("--scores agreed", "caption_agreement", "--captions"):
        Prove(ProveOptions("proved", "agreed"), place)
    captioned(place, "proved", "made-proved", 0.1)
    options = ProveOptions("proved", "agreed", captions=("made-proved",), noises=("uniform",), out="agreed")
    run_stage(Prove(options, place), InlineExecutor(), quiet=True)
    assert json.loads(place.result("agreed").read_bytes())["noises"]["uniform"]["auc"] > 0.9


def test_synthetic_texts_that_are_hardly_told_from_changed_ones_have_no_probability(world, monkeypatch):
    place, _ = world
    captioned(place, "web", "made", 0.1)
    captioned(place, "held", "made-held", 0.1)
    monkeypatch.setattr(stage_module, "LEAST_AREA", 1.01)
    part = calibrated(place, "off", captions=("made",), calibration_captions=("made-held",))
    assert part.counts().dropped == {"synthetic_not_calibrated": 240}
    assert any(names(line, "synthetic texts", "no probability") for line in read(part)["warnings"])


def test_captions_that_calibrate_nothing_are_refused(world):
    """Catches a captioner that knows the calibration pictures, another one's texts, and a judge that is the captioner."""
    place, _ = world
    captioned(place, "web", "made", 0.1)
    captioned(place, "held", "other", 0.3, by="other")
    captioned(place, "held", "known", 0.3, origins=checkpoint.origin(place.model("judge"), "judge"))
    captioned(place, "held", "same", 0.3, text="square")
    captioned(place, "held", "mute", 0.3, text="!")
    held = {"captions": ("made",), "calibration": "held"}
    for captions, more, words in (
        ("other", held, ("--calibration-captions other", "--captions made")),
        ("known", held, ("--filter judge", "captioner judge", "finetune")),
        ("same", held, ("--calibration-captions same", "one text")),
        ("mute", held, ("--calibration-captions mute", "0", "50")),
        ("other", {}, ("--calibration-captions other", "--captions")),
    ):
        with refused(*words):
            calibrated(place, f"refused-{captions}", calibration_captions=(captions,), **more)
        assert not place.part("signals", f"refused-{captions}-pairs").exists


def _remarks(place, out):
    said = read(place.part("scores", out))["options"]
    options = {name: tuple(each) if isinstance(each, list) else each for name, each in said.items()}
    return Calibrate(CalibrateOptions(**options), place).remarks()


@pytest.mark.parametrize(
    ("auc", "share", "same", "told"),
    [
        (-0.1, 0.1, 0.5, "keep before"),
        (0.1, 0.01, 0.5, "settled"),
        (0.1, 0.1, 0.99, "settled"),
        (0.1, 0.1, 0.5, "further"),
    ],
)
def test_a_round_says_whether_another_one_is_worth_its_time(auc, share, same, told, monkeypatch):
    """Catches rounds that go on for ever, and one that ranks worse and is kept."""
    before = {"auc": 0.8, "share": 0.4}
    monkeypatch.setattr(stage_module, "read", lambda part: before)
    gone = round(100 * (1 - same) / (1 + same))
    texts = {"before": set(range(100)), "now": set(range(gone, 100 + gone))}
    monkeypatch.setattr(stage_module, "_likely", lambda part: texts[part.name])
    made = Calibrate.__new__(Calibrate)
    made.previous, made.output = SimpleNamespace(name="before"), SimpleNamespace(name="now")
    line = made._progress({"auc": 0.8 + auc, "share": 0.4 + share})
    assert told in line
    assert f"{share:+.3f}" in line


def test_several_filters_are_one_by_their_mean(neighbours):
    place = neighbours
    both = {row["text_id"]: row for row in rows_of(calibrated(place, "both", filter=("judge", "second-0")))}
    one = {row["text_id"]: row for row in rows_of(calibrated(place, "one", filter=("judge",)))}
    two = {row["text_id"]: row for row in rows_of(calibrated(place, "two", filter=("second-0",)))}
    for name in ("itc_score", "hub_score"):
        for key, row in both.items():
            assert row[name] == pytest.approx((one[key][name] + two[key][name]) / 2, abs=1e-5)


# ------------------------------------------------------------------ judges side by side


def test_finetuning_a_filter_compares_judges_on_pictures_that_none_saw(world):
    """Catches a comparison on training pictures, after hours of training, and a judge that nobody compared."""
    place, _ = world
    small = {"human": ("human",), "steps": 2, "batch_size": 16, "warmup_steps": 1, "save_every": 0}
    options = stage_command("pretrain").options(preset="tiny", vocab_size=300, out="ancestor", **small)
    run_stage(Pretrain(options, place), InlineExecutor(), quiet=True)

    def finetuned(out, **more):
        made = stage_command("finetune-filter").options(init="ancestor", out=out, **small, **more)
        stage = FinetuneFilter(made, place)
        run_stage(stage, InlineExecutor(), quiet=True)
        return stage

    stage = finetuned("compared", held_out="held", against=("judge",))
    figures = checkpoint.read_config(stage.output)["extra"]["figures"]
    assert {"own itc_score", "own itm_score", "judge itc_score"} < figures.keys()
    pairs = read_pairs(calibrated(place), place)
    assert figures["judge itc_score"] == pytest.approx(roc_auc(*pairs), abs=1e-3)
    line = stage.remarks()[-1]
    assert names(line, "held", "judge itc_score", "trust judge itc_score")
    with refused("--held-out human", "trained judge"):
        finetuned("overlapping", held_out="human", against=("judge",))
    with refused("--held-out human", "this filter"):
        finetuned("its-own", held_out="human")
    assert not place.model("its-own").exists()
    with refused("--against judge", "--held-out"):
        finetuned("alone", against=("judge",))


def read_pairs(part, place):
    """Cosines and truths of the calibration pairs but those of like pictures."""
    rows = [row for row in rows_of(place.part("signals", f"{part.name}-pairs")) if not row["near"]]
    return [row["itc_score"] for row in rows], [row["own"] for row in rows]


# ------------------------------------------------------------------ prove


def proved(place, **more):
    options = ProveOptions(**{"images": "proof", "scores": "calibrated", "out": "proof", **more})
    stage = Prove(options, place)
    stage.run(lambda *_: None)
    return json.loads(stage.output.read_text()), stage.remarks()


@pytest.fixture(scope="module")
def proof(world):
    place, _ = world
    calibrated(place)
    rows, _ = colourful("proof", 160, 9000)
    write_images(place.part("images", "proof"), [rows[:80], rows[80:]])
    return place


def test_a_proof_finds_the_noise_that_it_planted(proof):
    """Catches a proof of its own calibration pictures, and noise that is true of its picture."""
    result, lines = proved(proof, wrong=0.5)
    uniform = result["noises"]["uniform"]
    assert 0.3 < uniform["planted"] < 0.7
    assert uniform["auc"] > 0.95
    assert uniform["estimated"] == pytest.approx(uniform["planted"], abs=0.1)
    assert result["metrics"]["uniform_share_error"] == pytest.approx(
        abs(uniform["estimated"] - uniform["planted"])
    )
    # Nearest pictures have the same colour, so their texts equal the own one: what cannot be made wrong is true.
    assert result["noises"]["near"]["planted"] > uniform["planted"]
    assert any(line.startswith("uniform: AUC") for line in lines)
    assert "harder" in lines[-1]
    assert proved(proof, wrong=0.5, out="again")[0]["noises"] == result["noises"]


def test_a_proof_asks_every_signal_and_refuses_the_neighbours(neighbours, proof):
    calibrated(proof, "fused-proof", neighbours=("bank",))
    result, _ = proved(proof, scores="fused-proof", out="fused", wrong=0.5)
    assert result["noises"]["uniform"]["auc"] > 0.95
    with refused("--images bank", "neighbours"):
        proved(proof, scores="fused-proof", images="bank", out="refused-bank")


def test_a_proof_on_pictures_that_were_seen_is_refused(proof, tmp_path):
    for images, words in (
        ("human", ("--images human", "trained judge")),
        ("held", ("--images held", "calibrated")),
        ("web", ("--images web", "judged")),
    ):
        with refused(*words):
            proved(proof, images=images, out=f"refused-{images}")
    rows, _ = colourful("tiny", 10, 12_000)
    write_images(proof.part("images", "tiny"), [rows])
    with refused("--images tiny", "10", "50"):
        proved(proof, images="tiny", out="refused-tiny")
    with refused("--scores calibrated-judged", "calibrate"):
        Prove(ProveOptions(images="proof", scores="calibrated-judged"), proof)
    moved = proof.model("judge") / "exposures.parquet"
    other = moved.rename(tmp_path / "exposures.parquet")
    try:
        with refused("--images proof", "does not say"):
            proved(proof, out="unsaid")
    finally:
        other.rename(moved)
