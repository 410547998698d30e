"""Catches a model without a text side that cannot be kept, a start that loses weights, and a frozen part that moves."""

from __future__ import annotations

import json

import pytest
import torch

from capfilt import models
from capfilt.catalog.artefacts import checkpoint_fingerprint as told
from capfilt.cli import main
from capfilt.data.tokenizer import NoTexts
from capfilt.errors import UserError
from capfilt.models import build, checkpoint, families, family_named
from capfilt.tables.workspace import Workspace
from tests.picto import CODE, RECORD, use_families
from tests.worlds import image_rows, write_images

TRAIN = (
    "--human",
    "human",
    "--batch-size",
    "4",
    "--warmup-steps",
    "1",
    "--image-size",
    "32",
    "--vocab-size",
    "600",
)


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path / "workspace")
    write_images(made.part("images", "human"), [image_rows("human", 8, source="human")])
    return made


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    use_families(tmp_path / "site", monkeypatch)
    yield
    models._foreign.cache_clear()


def run(*words):
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    assert stopped.value.code == 0


def command(workspace, family, *words, out="made", steps=2, preset="tiny"):
    chosen = ("--preset", preset) if preset else ()
    place = ("-w", str(workspace.path), "--execution", "inline", "-q")
    return ["retrain", family, *TRAIN, *chosen, "--steps", str(steps), "--out", out, *words, *place]


def retrain(workspace, family, *words, out="made", **more):
    run(*command(workspace, family, *words, out=out, **more))
    return workspace.model(out)


def refused(capsys, workspace, family, *words, preset="tiny"):
    """What a training says that is refused: one line, exit code 2, nothing written."""
    with pytest.raises(SystemExit) as stopped:
        main(command(workspace, family, *words, out="refused", preset=preset))
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1
    assert not workspace.model("refused").exists()
    return said


# ------------------------------------------------------------------ no text side


def test_a_family_that_sees_pictures_alone_is_trained_and_kept(foreign, workspace, capsys):
    """Catches a checkpoint that is refused for want of a tokenizer.json, and one that loads with another's."""
    path = retrain(workspace, "picto")
    assert {each.name for each in path.iterdir()} == {
        "config.json", "model.safetensors", "log.jsonl", "exposures.parquet",
    }  # fmt: skip
    contents, meta = checkpoint.open_any(path)
    assert set(meta["files"]) == {"model.safetensors", "log.jsonl"}
    assert isinstance(contents.tokenizer, NoTexts)
    shape = checkpoint.shape_of(path)
    assert (shape.vocab_size, shape.image_size, shape.reading) == (0, 32, {})
    assert type(shape).from_dict(json.loads(json.dumps(shape.to_dict()))) == shape
    assert checkpoint.fingerprint(path) == told(path)
    checkpoint.check(path, full=True)
    # It is saved again as it was, trained on, exported, and found sound.
    checkpoint.save(path / "again", contents.model, contents.tokenizer, contents.extra)
    assert checkpoint.open_any(path / "again")[1]["config"] == meta["config"]
    retrain(workspace, "picto", "--init", "made", out="more", preset="")
    run("export", str(path), "--to", "capfilt", "--out", str(workspace.path / "exported"))
    assert not list(workspace.path.glob("**/tokenizer.json"))
    capsys.readouterr()
    run("doctor", "--verify", "-w", str(workspace.path))
    assert "BAD" not in capsys.readouterr().out
    assert retrain(workspace, "picto") == path  # done already


def test_another_packages_model_is_finetuned_as_a_filter(foreign, workspace, capsys):
    """Catches the name of its class of models taken for its family's, and another family's option taken for its own."""
    retrain(workspace, "reader", preset="reading")
    place = ("-w", str(workspace.path), "--execution", "inline", "-q")
    words = ["finetune", "filter", "--init", "made", "--human", "human", "--batch-size", "4", "--steps", "1"]
    words += ["--out", "filter", *place]
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--queue-size", "64"])
    assert stopped.value.code == 2
    assert "--queue-size 64: does not apply to reader; remove it" in capsys.readouterr().err
    run(*words)
    assert json.loads((workspace.model("filter") / "config.json").read_text())["model_type"] == "reader-base"


def test_a_vocabulary_for_a_model_without_texts_is_refused(foreign, workspace, capsys, tmp_path):
    (tmp_path / "vocab.txt").write_text("a\n")
    said = refused(capsys, workspace, "picto", "--vocab", str(tmp_path / "vocab.txt"))
    assert "--vocab" in said
    with pytest.raises(UserError, match="vocab"):
        NoTexts.open(tmp_path / "vocab.txt")


def test_a_checkpoint_with_texts_still_needs_its_tokenizer(workspace):
    path = retrain(workspace, "blip", steps=1)
    (path / "tokenizer.json").unlink()
    for use in (checkpoint.open_any, checkpoint.fingerprint):
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            use(path)


# ------------------------------------------------------------------ starts


@pytest.mark.parametrize("start", ["picto", "blip"])
def test_a_family_starts_from_another_as_its_record_says(start, foreign, workspace):
    """Catches a start that is dropped for fresh weights, and a vocabulary of a family that has another one, or none."""
    theirs = checkpoint.open_any(retrain(workspace, start, out="theirs"))[0]
    path = retrain(workspace, "reader", "--init", "theirs", "--freeze", "vision", preset="")
    made = checkpoint.open_any(path)[0]
    assert type(made.model).__name__ == "Reader"
    for name, tensor in theirs.model.visual_encoder.state_dict().items():
        assert torch.equal(made.model.visual_encoder.state_dict()[name], tensor), name
    same = made.tokenizer.fingerprint == theirs.tokenizer.fingerprint
    assert same == (start == "blip")
    assert made.tokenizer.vocab_size > 10
    identity = made.extra["identity"]
    assert identity["init"] == checkpoint.fingerprint(workspace.model("theirs"))
    assert identity.get("vocab") == ("corpus" if start == "picto" else None)


@pytest.mark.parametrize(
    ("family", "start", "choices"),
    [
        ("picto", "blip", ("Picto",)),
        ("picto", "reader", ("Picto",)),
        ("clip", "picto", ("CLIP",)),
        ("reader", "clip", ("Reader", "Picto", "BLIP")),
    ],
)
def test_a_start_that_the_family_does_not_allow_is_refused_with_the_choices(
    family, start, choices, foreign, workspace, capsys
):
    preset = "reading" if start == "reader" else "tiny"
    retrain(workspace, start, out="theirs", steps=1, preset=preset)
    capsys.readouterr()
    said = refused(capsys, workspace, family, "--init", "theirs", preset="")
    assert "--init" in said
    for choice in choices:
        assert choice in said.partition("start from")[2]


@pytest.mark.parametrize("family", ["blip", "clip", "vilt", "albef", "picto"])
def test_an_unknown_preset_is_refused_with_the_choices(family, foreign, workspace, capsys):
    said = refused(capsys, workspace, family, preset="enormous")
    assert "--preset" in said
    for name in family_named(family).presets:
        assert name in said


@pytest.mark.parametrize("name", ["toy", "BLIP", "bli"])
def test_an_unknown_family_is_refused_with_the_choices(name, workspace, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["retrain", name, "--human", "human", "-w", str(workspace.path)])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert len(said.splitlines()) == 1
    for family in families():
        assert family.name in said
    with pytest.raises(UserError, match="vilt"):
        family_named(name)


BROKEN = {
    "a module that is missing": (
        RECORD.replace('picto.model:Picto"', 'pictures_net.model:Picto"'),
        CODE,
        "pictures_net",
    ),
    "a class that is missing": (
        RECORD.replace('picto.model:Picto"', 'picto.model:Pictures"'),
        CODE,
        "Pictures",
    ),
    "a package that it needs": (RECORD, "import pictures_net\n" + CODE, "pictures_net"),
    "code that fails": (RECORD, "raise ValueError('broken\\nin two lines')\n" + CODE, "picto.model"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_record_whose_class_cannot_be_imported_is_one_line_with_its_package(
    case, workspace, tmp_path, monkeypatch, capsys
):
    """In a training, and where a checkpoint of such a family is opened: neither says more than a line."""
    record, code, named = BROKEN[case]
    use_families(tmp_path / "whole", monkeypatch)
    path = retrain(workspace, "picto", steps=1)
    use_families(tmp_path / "broken", monkeypatch, record, code)
    said = refused(capsys, workspace, "picto")
    assert named in said
    assert "package" in said
    with pytest.raises(UserError) as caught:
        checkpoint.open_any(path)
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    models._foreign.cache_clear()


# ------------------------------------------------------------------ frozen parts


def parts():
    return [(family.name, part) for family in models.FAMILIES for part in family.kinds[0].parts]


@pytest.mark.parametrize(("family", "part"), parts())
def test_a_frozen_part_does_not_move_and_the_rest_does(family, part, workspace):
    """Catches a part whose name in the record is no attribute of the model, and one that weight decay moves."""
    path = retrain(workspace, family, "--freeze", part, "--weight-decay", "0.1", "--min-lr", "0.0001")
    trained = checkpoint.open_any(path)[0].model
    kind = family_named(family).kinds[0]
    before, after = dict(build(trained.config, seed=0).named_parameters()), dict(trained.named_parameters())
    held = tuple(f"{name}." for name in kind.parts[part])
    frozen = {name for name in after if name.startswith(held) or name in kind.parts[part]}
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert frozen
    assert not moved & frozen
    assert moved - frozen


@pytest.mark.parametrize("family", ["blip", "clip", "vilt", "albef", "picto"])
def test_an_unknown_part_is_refused_with_the_choices(family, foreign, workspace, capsys):
    said = refused(capsys, workspace, family, "--freeze", "legs")
    assert "--freeze legs" in said
    for part in family_named(family).kinds[0].parts:
        assert part in said.partition("choose")[2]


def test_parts_are_those_of_the_model_that_is_trained_and_not_of_its_start(foreign, workspace, capsys):
    """Catches a part of another family's start that is taken for one of the model's, and the reverse."""
    retrain(workspace, "picto", out="theirs", steps=1)
    capsys.readouterr()
    said = refused(capsys, workspace, "reader", "--init", "theirs", "--freeze", "head", preset="")
    assert "vision, words" in said
    path = retrain(workspace, "reader", "--init", "theirs", "--freeze", "words", preset="")
    made = checkpoint.open_any(path)[0].model
    assert torch.equal(made.words.weight, build(made.config, seed=0).words.weight)
