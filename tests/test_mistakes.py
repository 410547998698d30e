"""Would catch: a typing mistake that ends in a traceback, in several lines, in another exit code than 2, in a line that
does not quote the mistake, or in files."""

from __future__ import annotations

import importlib.util

import pytest

from capfilt.cli import main
from capfilt.tables.workspace import Workspace
from tests.worlds import image_rows, tiny_checkpoint, write_images

TRAIN = ["pretrain", "--web", "web", "--preset", "tiny", "--steps", "1", "--batch-size", "2"]
MISTAKES = [
    # Commands.
    (["dowload", "urls.txt"], ["dowload"]),
    (["finetune", "captionr", "--human", "web"], ["captionr"]),
    (["recipe", "shwo", "quickstart"], ["shwo"]),
    # Options.
    (["caption", "--images", "web", "--captionr", "captioner"], ["--captionr"]),
    (["retrain", "blip", "--human", "web", "--pars", "capfilt"], ["--pars"]),
    (["select", "--images", "web", "--treshold", "0.5"], ["--treshold"]),
    (["score"], ["--images"]),
    (["ingest", "pictures"], ["--dataset"]),
    (["export", "captioner", "--out", "x"], ["--to"]),
    # Values: of another kind, out of range, none of the choices.
    (["caption", "--images", "web", "--num-beams", "three"], ["--num-beams"]),
    ([*TRAIN, "--learning-rate", "1e-4x"], ["--learning-rate"]),
    (["caption", "--images", "web", "--num-beams", "0"], ["--num-beams", "0"]),
    (["evaluate", "--images", "web", "--limit", "-5"], ["--limit", "-5"]),
    ([*TRAIN, "--learning-rate", "-0.1"], ["--learning-rate", "-0.1"]),
    (["select", "--images", "web", "--keep-fraction", "30"], ["--keep-fraction", "30"]),
    (["duplicates", "--images", "web", "--distance", "11"], ["--distance", "11"]),
    (["caption", "--images", "web", "--method", "beams"], ["--method", "beams"]),
    (["evaluate", "--images", "web", "--split", "tests"], ["--split", "tests"]),
    (["evaluate", "--images", "web", "--model", "filter", "--tasks", "retrival"], ["--tasks", "retrival"]),
    ([*TRAIN, "--precision", "fp8"], ["--precision", "fp8"]),
    ([*TRAIN[:3], "--preset", "huge", "--steps", "1"], ["huge"]),
    (["retrain", "blip2", "--human", "web"], ["blip2"]),
    (["caption", "--images", "web", "--execution", "rayy"], ["--execution", "rayy"]),
    (["quickstart", "--size", "medium"], ["--size", "medium"]),
    (["compare", "a", "--format", "xml"], ["xml"]),
    (["export", "captioner", "--to", "onnx", "--out", "x"], ["--to", "onnx"]),
    # Names: of what is not there, of another table, a path where a name goes, no name at all.
    (["caption", "--images", "wbe", "--captioner", "captioner"], ["wbe"]),
    (["caption", "--images", "web", "--captioner", "captoiner"], ["captoiner"]),
    (["caption", "--images", "./signals/duplicates", "--captioner", "captioner"], ["signals", "images"]),
    (["select", "--images", "web", "--scores", "images"], ["images"]),
    (["ingest", "pictures", "--dataset", "a/b"], ["--dataset", "a/b"]),
    (["subset", "web", "--dataset", ""], ["--dataset"]),
    (["evaluate", "--images", "web", "--model", "filter", "--out", "-x"], ["-x"]),
    (["caption", "--images", "s3://bucket/web", "--captioner", "captioner"], ["s3://bucket/web"]),
    # Files that are not there, or not what they should be.
    (["ingest", "nowhere.json", "--dataset", "d"], ["nowhere.json"]),
    (["download", "nowhere.parquet", "--dataset", "d"], ["nowhere.parquet"]),
    (["download", "note.txt", "--dataset", "d", "--input-format", "parquet"], ["note.txt"]),
    ([*TRAIN, "--vocab", "nowhere.txt"], ["--vocab", "nowhere.txt"]),
    ([*TRAIN, "--vision-init", "nowhere"], ["--vision-init", "nowhere"]),
    (["evaluate", "--images", "web", "--model", "note.txt"], ["note.txt"]),
    (["run", "note.yaml"], ["note.yaml"]),
    (["run", "photograps", "--set", "data=x"], ["photograps"]),
    (["run", "photographs", "--set", "dat=x"], ["dat"]),
    (["run", "photographs", "--set", "data=x", "--only", "scroe"], ["scroe"]),
    (["recipe", "show", "nowhere"], ["nowhere"]),
    # What belongs together, and what does not.
    ([*TRAIN, "--micro-batch", "1", "--accumulate", "2"], ["--micro-batch", "--accumulate"]),
    (["retrain", "clip", "--human", "web", "--queue-size", "5"], ["--queue-size"]),
    (["retrain", "blip", "--human", "web", "--verdicts", "capfilt"], ["--verdicts", "capfilt"]),
    (["evaluate", "--images", "web", "--model", "filter", "--tasks", "vqa"], ["--tasks", "--examples"]),
    (["caption", "--images", "web", "--yes"], ["--yes", "--overwrite"]),
    (["finetune", "vqa", "--images", "web"], ["examples"]),
    (["query", "SELECT nothing FROM images"], ["nothing"]),
    # Conditions.
    (["select", "--images", "web", "--require", "read_text('/etc/passwd') = ''"], ["--require", "read_text()"]),
    (["select", "--images", "web", "--require", "true; SELECT 1"], ["--require", "true; SELECT 1"]),
    (["select", "--images", "web", "--require", "itm_score > (SELECT 0.5)"], ["--require", "subquery"]),
    (["select", "--images", "web", "--require", "count(*) > 1"], ["--require", "count_star()"]),
    (["select", "--images", "web", "--require", "text = "], ["--require", "syntax"]),
    (["select", "--images", "web", "--signals", "duplicates"], ["--signals", "--require"]),
    (["select", "--images", "web", "--duplicates", "duplicates"], ["--duplicates"]),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    from capfilt.execution.inline import InlineExecutor
    from capfilt.execution.run import run_stage
    from capfilt.stages.duplicates import DuplicatesOptions
    from capfilt.stages.duplicates.stage import Duplicates

    place = Workspace(tmp_path_factory.mktemp("mistakes"))
    write_images(place.part("images", "web"), [image_rows("web", 4, split="test")])
    tiny_checkpoint(place.model("captioner"), seed=1)
    tiny_checkpoint(place.model("filter"), seed=2)
    run_stage(Duplicates(DuplicatesOptions(images="web"), place), InlineExecutor(), quiet=True)
    (place.path / "note.txt").write_text("buy milk\n")
    (place.path / "note.yaml").write_text("buy: milk\n")
    (place.path / "pictures").mkdir()
    return place


def said(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("capfilt: ")
    return err


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=lambda value: " ".join(value)[:60])
def test_a_mistake_is_one_line_that_quotes_it(place, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(place.path)
    before = sorted(place.path.rglob("*"))
    line = said(capsys, arguments)
    for word in words:
        assert word in line
    assert sorted(place.path.rglob("*")) == before


@pytest.mark.parametrize(
    ("package", "arguments", "words"),
    [
        ("ray", ["caption", "--images", "web", "--execution", "ray"], ["pip install", "--execution inline"]),
        ("img2dataset", ["download", "note.txt", "--dataset", "d", "--input-format", "txt"], ["img2dataset"]),
        ("tensorboard", [*TRAIN, "--tensorboard"], ["tensorboard"]),
    ],
)
def test_a_missing_extra_is_named(place, capsys, monkeypatch, package, arguments, words):
    monkeypatch.chdir(place.path)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
    )
    line = said(capsys, arguments)
    for word in words:
        assert word in line
