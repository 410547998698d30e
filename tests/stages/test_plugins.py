"""Catches: a plug-in that works in a unit test and not from the command line, rows of two fingerprints in one part, a
threshold on its column that never reaches verdicts, and a guide whose example does not run.
"""

from __future__ import annotations

import json
import shlex

import pytest

from capfilt.catalog.report import write_report
from capfilt.catalog.views import describe, open_catalog
from tests.plugins.packages import blocks, install, install_documented, use
from tests.refusals import names

PROBE = """
import io, json, os
from PIL import Image
import numpy as np

class Probe:
    columns = {"first_score": "the first", "second_score": "the second"}
    def __init__(self, argument, weights="1"):
        self.mode, self.weights = argument, weights
    def fingerprint(self): return self.weights + os.environ.get("PROBE_WEIGHTS", "")
    def setup(self): self.ready = True
    def prepare(self, data):
        if self.mode == "pillow":
            return Image.open(io.BytesIO(data)).convert("RGB").size
        if self.mode == "bug":
            raise IndexError("a bug of the plug-in's own")
        return data
    def caption(self, images, keys, **options):
        assert self.ready and len(images) == len(keys)
        if self.mode == "short":
            return [("x", None)]
        if self.mode == "blank":
            return [(" ", None)] * len(images)
        if self.mode in ("nan", "inf", "-inf"):
            return [("x", float(self.mode) if k else -1.0) for k in range(len(images))]
        said = [(f"{key} {type(image).__name__} {k} {json.dumps(options, sort_keys=True)}", -1.0 - k)
                for key, image in zip(keys, images) for k in range(options["samples"])]
        return said
    def score(self, images, image_index, texts, **options):
        assert self.ready and set(image_index) <= set(range(len(images)))
        if self.mode == "short":
            return [[0.0, 0.0]]
        if self.mode in ("nan", "inf", "-inf"):
            return [[0.5, float(self.mode)] for _ in texts]
        return np.array([[len(text), i] for text, i in zip(texts, image_index)])
"""


@pytest.fixture
def documented(tmp_path, monkeypatch):
    use(monkeypatch, install_documented(tmp_path / "site"))


@pytest.fixture
def probe(tmp_path, monkeypatch):
    groups = ("capfilt.captioners", "capfilt.scorers")
    site = install(tmp_path / "site", "probe", PROBE, {group: {"probe": "probe:Probe"} for group in groups})
    use(monkeypatch, site, "probe")


@pytest.fixture
def call(workspace, capsys):
    """Run a command inline on the workspace: (exit code, stderr)."""
    from capfilt.cli import main

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments), "--execution", "inline", "-q", "-w", str(workspace.path)])
        return stopped.value.code, capsys.readouterr().err

    return run


def rows_of(part):
    return [row for table in part.tables() for row in table.to_pylist()]


def test_the_guide_from_its_package_to_the_corpus(workspace, call, documented):
    (commands,) = blocks("sh")
    for line in commands.splitlines():
        program, *arguments = shlex.split(line)
        assert program == "capfilt"
        assert call(*arguments) == (0, ""), line

    captions = rows_of(workspace.part("captions", "colours"))
    assert len(captions) == 11
    good = [row for row in captions if row["failure"] is None]
    assert {row["text"] for row in good} <= {"a red square", "a green square", "a blue square"}
    assert len(good) == 10
    assert all((row["captioner"], row["logprob"]) == ("colours", None) for row in captions)

    scores = rows_of(workspace.part("scores", "colours"))
    judged = [row["colour_score"] for row in scores if row["failure"] is None]
    assert all(0 <= value <= 1 for value in judged)
    assert any(value > 0.5 for value in judged)
    assert all(row["itm_score"] is None for row in scores)

    verdicts = rows_of(workspace.part("verdicts", "colourful"))
    kept = [row for row in verdicts if row["keep"]]
    assert {row["reason"] for row in kept} == {"colour_score_at_threshold"}
    lowest = sorted(judged)[-round(0.5 * len(judged))]
    assert {row["text_id"] for row in kept} == {
        row["text_id"] for row in scores if row["colour_score"] is not None and row["colour_score"] >= lowest
    }
    pairs = rows_of(workspace.part("pairs", "colourful"))
    assert sum(len(row["texts"]) for row in pairs) == len(kept)
    assert all(text["itm_score"] is None for row in pairs for text in row["texts"])

    # Another threshold is no GPU job; and the analyst and the report see the column with its meaning.
    again = ("select", "--images", "web", "--captions", "colours", "--scores", "colours", "--no-pairs")
    assert call(*again, "--by", "colour_score", "--threshold", "2", "--out", "none") == (0, "")
    assert not any(row["keep"] for row in rows_of(workspace.part("verdicts", "none")))
    with open_catalog(workspace) as connection:
        found = connection.execute(
            "SELECT count(*) FROM verdicts JOIN scores USING (text_id) "
            "WHERE rule = 'colourful' AND keep AND verdicts.colour_score = scores.colour_score"
        ).fetchone()
        assert found == (len(kept),)
        meanings = {
            (view.name, column.name): column.comment
            for view in describe(connection)
            for column in view.columns
        }
    for view in ("scores", "verdicts"):
        assert meanings[view, "colour_score"].startswith("share of the named colour")
    write_report(workspace, workspace.path / "report.html")
    page = (workspace.path / "report.html").read_text()
    # The lineage says what each part was made with.
    assert "colours:square (plug-in, 1 square a)" in page
    assert "colours: (plug-in, 1  a)" in page
    assert "Texts are judged by colour_score" in page
    assert "histogram of colour_score of web texts" in page


def test_options_of_the_plug_in_s_own_reach_it_and_count(workspace, call, documented):
    caption = ("caption", "--images", "web", "--captioner", "colours:square")
    assert call(*caption, "--captioner-option", "article=the")[0] == 0
    assert all(
        row["text"].startswith("the ")
        for row in rows_of(workspace.part("captions", "colours"))
        if row["text"]
    )
    code, err = call(*caption, "--captioner-option", "article=some")
    assert code == 2
    assert "captioner" in err


def test_what_the_stage_was_told_is_what_the_plug_in_is_told(workspace, call, probe):
    caption = (
        "caption",
        "--images",
        "web",
        "--captioner",
        "probe:x",
        "--samples",
        2,
        "--seed",
        7,
        "--top-p",
        0.5,
    )
    assert call(*caption, "--out", "a")[0] == 0
    assert call(*caption, "--out", "b", "--batch-size", 2)[0] == 0
    first, second = (rows_of(workspace.part("captions", name)) for name in "ab")
    for row in first:
        if row["failure"] is None:
            key, kind, index, options = row["text"].split(" ", 3)
            assert (key, kind, int(index)) == (row["image_id"], "bytes", row["sample_index"])
            told = json.loads(options)
            assert (told["samples"], told["seed"], told["top_p"], told["method"]) == (2, 7, 0.5, "nucleus")
            assert row["logprob"] == -1.0 - row["sample_index"]
    shared = [
        [(row["image_id"], row["sample_index"], row["failure"]) for row in rows] for rows in (first, second)
    ]
    assert shared[0] == shared[1]


def test_another_fingerprint_at_the_same_place_is_refused(workspace, call, probe, monkeypatch):
    caption = ("caption", "--images", "web", "--captioner", "probe:x")
    score = ("score", "--images", "web", "--filter", "probe:x")
    assert call(*caption)[0] == call(*score)[0] == 0
    before = rows_of(workspace.part("scores", "probe"))
    assert call(*caption)[0] == call(*score)[0] == 0
    monkeypatch.setenv("PROBE_WEIGHTS", "other weights")
    for command, word in ((caption, "captioner"), (score, "filter")):
        code, err = call(*command)
        assert code == 2
        assert names(err, word, '"probe:1"', "probe:1other")
    assert rows_of(workspace.part("scores", "probe")) == before
    # The same fingerprint from a checkpoint is not the same captioner.
    assert call("caption", "--images", "web", "--out", "probe")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("caption", "--captioner", "probe:short"), "plug-in 'probe': returned 1 captions where 5 were asked for"),
        (("score", "--filter", "probe:short"), "plug-in 'probe': returned scores of shape [1, 2]; 5 texts by 2 columns"),
    ],
)  # fmt: skip
def test_too_few_answers_end_the_run_by_name_and_nothing_is_committed(
    workspace, call, probe, arguments, message
):
    code, err = call(*arguments, "--images", "web")
    assert code == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not list(workspace.path.rglob("probe/*.parquet"))


@pytest.mark.parametrize(
    "arguments", [("caption", "--captioner", "nobody:x"), ("score", "--filter", "nobody:x")]
)
def test_an_unknown_plug_in_is_a_wrong_call(workspace, call, documented, arguments):
    before = sorted(workspace.path.rglob("*"))
    code, err = call(*arguments, "--images", "web")
    assert code == 2
    assert names(err, "nobody", "colours")
    assert sorted(workspace.path.rglob("*")) == before


def test_a_decoder_of_the_plug_in_s_own_loses_the_bad_picture_and_no_other(workspace, call, probe):
    # Pillow raises an error of its own at the truncated picture; the stage knows what it is.
    assert call("caption", "--images", "web", "--captioner", "probe:pillow")[0] == 0
    rows = rows_of(workspace.part("captions", "probe"))
    assert [row["failure"] for row in rows if row["failure"]] == ["truncated"]
    # At a good picture it is the plug-in's error, shown with its traceback.
    with pytest.raises(IndexError, match="bug"):
        call("score", "--images", "web", "--filter", "probe:bug")


def test_blank_texts_and_numbers_that_are_none_are_failures(workspace, call, probe):
    assert call("caption", "--images", "web", "--captioner", "probe:blank")[0] == 0
    assert {row["failure"] for row in rows_of(workspace.part("captions", "probe"))} == {"empty_text"}
    assert call("score", "--images", "web", "--filter", "probe:nan")[0] == 0
    rows = rows_of(workspace.part("scores", "probe"))
    assert {row["failure"] for row in rows} == {"not_finite", "empty_text", "too_long"}
    assert all(row["first_score"] is None and row["second_score"] is None for row in rows)


def test_only_columns_that_the_scorer_fills_can_be_judged_by(workspace, call, probe):
    assert call("score", "--images", "web", "--filter", "probe:x")[0] == 0
    assert call("score", "--images", "web")[0] == 0
    select = ("select", "--images", "web", "--no-pairs", "--scores")
    # The filter's columns are there, and null: everything would be dropped without a word.
    code, err = call(*select, "probe")
    assert code == 2
    assert names(err, "--by itm_score", "first_score, second_score")
    code, err = call(*select, "filter", "--by", "first_score")
    assert code == 2
    assert "itm_score, itc_score" in err
    assert call(*select, "probe", "--by", "second_score", "--out", "second")[0] == 0
    row = rows_of(workspace.part("verdicts", "second"))[0]
    assert "second_score" in row
    assert "first_score" not in row


def test_a_clip_from_scoring_to_the_corpus(workspace, call, tmp_path, capsys):
    pytest.importorskip("transformers")
    from tests.plugins.test_clip import save_clip

    directory = save_clip(tmp_path / "clip-tiny")
    capsys.readouterr()
    score = ("score", "--images", "web", "--filter", f"clip:{directory}")
    assert call(*score) == (0, "")
    rows = rows_of(workspace.part("scores", "clip"))
    values = [row["clip_score"] for row in rows if row["failure"] is None]
    assert all(-1 <= value <= 1 for value in values)
    assert len(set(values)) > 5
    middle = sorted(values)[len(values) // 2]
    select = ("select", "--images", "web", "--scores", "clip", "--by", "clip_score")
    assert call(*select, "--threshold", middle, "--out", "above")[0] == 0
    kept = [row for row in rows_of(workspace.part("verdicts", "above")) if row["keep"]]
    assert len(kept) == sum(value >= middle for value in values)
    assert all(row["clip_score"] >= middle for row in kept)
    assert len(rows_of(workspace.part("pairs", "above"))) == len({row["image_id"] for row in kept})
    # Other weights in the same directory.
    save_clip(directory, seed=1)
    code, err = call(*score)
    assert code == 2
    assert "filter was" in err


@pytest.mark.parametrize("mode", ["nan", "inf", "-inf"])
def test_what_is_no_number_is_a_failure_whoever_says_it(call, probe, workspace, mode):
    """Catches texts and scores that are kept though nothing stands behind them: NaN is not below any threshold."""
    assert call("caption", "--images", "web", "--captioner", f"probe:{mode}", "--batch-size", "64")[0] == 0
    rows = [row for row in rows_of(workspace.part("captions", "probe")) if row["failure"] != "truncated"]
    assert {(row["text"], row["logprob"], row["failure"]) for row in rows} == {
        ("x", -1.0, None),
        (None, None, "not_finite"),
    }
    assert workspace.part("captions", "probe").counts().failed["not_finite"] == len(rows) - 2
    assert call("score", "--images", "web", "--filter", f"probe:{mode}")[0] == 0
    counts = workspace.part("scores", "probe").counts()
    assert counts.kept == 0
    assert counts.failed["not_finite"] > 0
