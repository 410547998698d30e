"""Catches: a checkpoint that comes back different, that loads with a file swapped, cut or missing, that unpickles, or
that hides which tensors do not fit."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from capfilt.data import bpe, tokenizer
from capfilt.data.bpe import BpeTokenizer
from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.errors import UserError
from capfilt.models import build, checkpoint, preset
from capfilt.models.blip.model import BlipConfig
from capfilt.models.clip.model import ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.export import export
from capfilt.tables.ids import file_sha256
from capfilt.training import state
from tests import limits
from tests.refusals import refused
from tests.sweeps.disk import durable_steps

CONFIG = BlipConfig(
    vision=VisionConfig(16, 8, 16, 1, 2, 32), text=TextConfig(40, 16, 2, 2, 32, max_positions=8), embed_dim=8
)


@pytest.fixture
def saved(tmp_path, tokenizer_of):
    model = build(CONFIG, seed=5).eval()
    checkpoint.save(tmp_path / "run", model, tokenizer_of(40), {"step": 7, "note": "é"})
    return tmp_path / "run", model


def redigest(directory):
    """Makes the digests in config.json fit again, so that the check behind them is reached."""
    content = json.loads((directory / "config.json").read_text())
    content["files"] = {name: file_sha256(directory / name) for name in content["files"]}
    del content["sealed"]  # as before there was a seal
    (directory / "config.json").write_text(json.dumps(content))


def test_round_trip_is_exact(saved):
    directory, model = saved
    loaded, tokenizer, meta = checkpoint.load(directory)
    assert not loaded.training
    assert loaded.config == model.config
    assert meta["extra"] == {"step": 7, "note": "é"}
    assert meta["model_type"] == "blip"
    assert tokenizer.vocab_size == 40
    before, after = checkpoint.tensors(model), checkpoint.tensors(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        for function in (model, loaded):
            tokens = function.encode_image(pixels)
            outputs = (function.match_logits(ids, None, tokens), function.lm_logits(ids, None, tokens))
            if function is model:
                expected = outputs
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))


def test_sharing_survives_and_training_goes_on(saved):
    directory, _ = saved
    loaded, _, _ = checkpoint.load(directory)
    shared = loaded.text_decoder.bert.embeddings.word_embeddings.weight
    assert shared is loaded.text_encoder.embeddings.word_embeddings.weight
    assert all(each.requires_grad for each in loaded.parameters())
    loaded.train().lm_logits(
        torch.zeros(1, 3, dtype=torch.int64),
        None,
        loaded.encode_image(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
    ).sum().backward()
    assert shared.grad is not None


def test_each_shared_tensor_is_stored_once(saved):
    directory, model = saved
    stored = load_file(directory / "model.safetensors")
    assert sum(each.numel() for each in stored.values()) == sum(each.numel() for each in model.parameters())


def test_saving_twice_gives_the_same_bytes_and_the_fingerprint_sees_any_change(saved, tmp_path, tokenizer_of):
    directory, model = saved
    checkpoint.save(tmp_path / "again", model, tokenizer_of(40), {"step": 7, "note": "é"})
    assert checkpoint.fingerprint(directory) == checkpoint.fingerprint(tmp_path / "again")
    assert sorted(each.name for each in directory.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    with torch.no_grad():
        model.itm_head.bias[0] += 1e-3
    checkpoint.save(tmp_path / "again", model, tokenizer_of(40), {"step": 7, "note": "é"})
    assert checkpoint.fingerprint(directory) != checkpoint.fingerprint(tmp_path / "again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("fault", ["missing", "cut", "flipped", "garbage"])
def test_a_damaged_file_is_named_in_one_line(saved, name, fault):
    directory, _ = saved
    path = directory / name
    data = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "flipped":
        data[0 if name == "config.json" else -1] ^= 0x55
        path.write_bytes(data)
    else:
        path.write_bytes(pickle.dumps({"weights": 1}))
    with refused(path):
        checkpoint.load(directory)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_garbage_with_a_fitting_digest_is_still_refused(saved, name):
    directory, _ = saved
    (directory / name).write_bytes(pickle.dumps(print))
    redigest(directory)
    with refused(name):
        checkpoint.load(directory)


def test_tensors_that_do_not_fit_are_listed(saved):
    directory, _ = saved
    weights = load_file(directory / "model.safetensors")
    del weights["itm_head.bias"]
    weights["surplus"] = torch.zeros(2)
    weights["vision_proj.bias"] = torch.zeros(3)
    save_file(weights, directory / "model.safetensors")
    redigest(directory)
    with refused("missing: itm_head.bias", "unexpected: surplus", "vision_proj.bias [3] [8]"):
        checkpoint.load(directory)


def test_config_of_another_kind_is_refused(saved):
    directory, _ = saved
    content = json.loads((directory / "config.json").read_text())
    del content["sealed"]
    for change in (
        {"model_type": "clip"},
        {"config": None},
        {"files": {}},
        {"config": {"text": {"vocab_size": "x"}}},
    ):
        (directory / "config.json").write_text(json.dumps({**content, **change}))
        with refused("config.json"):
            checkpoint.load(directory)


def test_a_tokenizer_of_another_size_is_refused(saved, tokenizer_of):
    directory, model = saved
    with refused(41):
        checkpoint.save(directory, model, tokenizer_of(41))
    tokenizer_of(41).save(directory)
    redigest(directory)
    with refused("tokenizer.json"):
        checkpoint.load(directory)


def family(kind, directory, cleaning, extra):
    """A tiny checkpoint of the kind, whose tokenizer cleans so."""
    if kind == "clip":
        words = BpeTokenizer.train(["a photo of a dog"] * 3, 530, cleaning=cleaning)
        model = build(
            ClipConfig(
                ClipVisionConfig(32, 16, 128, 1, 2, 64),
                ClipTextConfig(words.vocab_size, 16, 64, 1, 1, 64),
                embed_dim=8,
            )
        )
    else:
        words = Tokenizer([*SPECIALS, "a", "man", "s", "shirt", *ADDED], cleaning)
        model = build(preset(kind, "tiny", words.vocab_size))
    checkpoint.save(directory, model, words, extra)


@pytest.mark.parametrize(
    ("kind", "published", "before"),
    [("albef", "albef", "blip"), ("vilt", "as-found", "blip"), ("clip", "clip", "clip-unrepaired")],
)
def test_a_checkpoint_cleans_texts_as_it_was_trained_with(tmp_path, kind, published, before):
    # Catches: a checkpoint of before whose texts are cleaned otherwise than when it was trained, one that forgets how on
    # its way to another layout and back, and a published one whose texts are cleaned by another family's rule.
    trained = {"stage": "retrain"}
    for extra in ({}, trained):
        for cleaning in (published, before):
            here = tmp_path / f"{cleaning}-{len(extra)}"
            family(kind, here, cleaning, extra)
            assert checkpoint.open_any(here)[0].tokenizer.cleaning == cleaning
            if kind != "albef":
                export(here, "transformers", tmp_path / f"{here.name}-exported")
                there = checkpoint.open_any(tmp_path / f"{here.name}-exported")[0]
                assert there.tokenizer.cleaning == cleaning
            path = here / "config.json"
            content = json.loads(path.read_text())
            del content["sealed"]
            assert content.pop("cleaning") == cleaning
            path.write_text(json.dumps(content))
            assert checkpoint.open_any(here)[0].tokenizer.cleaning == (before if extra else published)
            path.write_text(json.dumps({**content, "cleaning": "by-hand"}))
            with refused("config.json", "cleaning by-hand"):
                checkpoint.open_any(here)


def test_a_blips_files_say_nothing_new(saved):
    # Catches: fingerprints of all checkpoints of BLIP changed by what never differed.
    content = json.loads((saved[0] / "config.json").read_text())
    assert "cleaning" not in content
    assert checkpoint.load(saved[0])[1].cleaning == "blip"


def test_every_byte_of_every_file_counts(saved):
    """Catches a file that is read though it changed: config.json itself, and what lies beside the weights.

    A bit of every byte of the small files is flipped, which makes white space of white space too.
    """
    directory, model = saved
    (directory / "log.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    (directory / "answers.json").write_text('["yes"]')
    checkpoint.save(directory, model, checkpoint.load(directory)[1], {"note": "a  b"})
    assert set(checkpoint.read_config(directory)["files"]) == {
        "model.safetensors", "tokenizer.json", "log.jsonl", "answers.json",
    }  # fmt: skip

    def flipped(path, place, flip):
        data = bytearray(path.read_bytes())
        data[place] ^= flip
        path.write_bytes(data)
        with refused(path):
            checkpoint.open_any(directory)
        data[place] ^= flip
        path.write_bytes(data)

    for name in ("config.json", "log.jsonl", "answers.json"):
        path = directory / name
        for place, byte in enumerate(path.read_bytes()):
            flipped(path, place, ord(" ") ^ ord("\t") if byte == ord(" ") else 1)
    for name in ("model.safetensors", "tokenizer.json"):
        for place in (0, 8, 100, -1):
            flipped(directory / name, place, 1)
    checkpoint.load(directory)
    # Nobody needs the log to caption: it may go.
    (directory / "log.jsonl").unlink()
    checkpoint.load(directory)


def test_a_checkpoint_from_before_there_was_a_seal_is_read(saved):
    directory, _ = saved
    redigest(directory)
    checkpoint.load(directory)


def test_files_are_for_whom_the_umask_says(saved, tmp_path, tokenizer_of):
    """Catches weights that their owner alone can read, in a group's workspace."""
    _, model = saved
    before = os.umask(0o027)
    try:
        checkpoint.save(tmp_path / "shared", model, tokenizer_of(40))
        state.write(tmp_path / "shared" / "state.safetensors", {"x": torch.zeros(1)}, {})
        for layout in ("original", "transformers"):
            with contextlib.suppress(UserError):
                export(tmp_path / "shared", layout, tmp_path / layout, only="filter")
    finally:
        os.umask(before)
    found = [path for path in tmp_path.rglob("*") if not path.is_relative_to(saved[0])]
    assert len(found) > 10
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in found} == {
        path.name: "0o750" if path.is_dir() else "0o640" for path in found
    }


def test_leftovers_of_killed_saves_are_found_and_swept(saved):
    """Catches gigabytes that a killed training leaves for good: a half-written checkpoint, best weights, state, table."""
    directory, _ = saved
    for name in (".partial-1/model.safetensors", "best/.partial-2/config.json", "live/.tmpAbc123", "state.safetensors.part",
                 ".exposures.parquet.0123.tmp", ".tmpXyz"):  # fmt: skip
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"half")
    kept = {"config.json", "model.safetensors", "tokenizer.json", "best", "live"}
    assert len(checkpoint.torn(directory)) == 6
    checkpoint.sweep(directory)
    assert {path.name for path in directory.iterdir()} == kept
    assert checkpoint.torn(directory) == []
    checkpoint.load(directory)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["visual_encoder.norm.weight", "temperature"])
def test_weights_that_are_no_numbers_are_refused_by_name(saved, value, name):
    """Catches a model that answers every question with NaN, which is kept or counted right somewhere."""
    directory, model = saved
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] = value
    checkpoint.save(directory, model, checkpoint.load(directory)[1])
    with refused("model.safetensors", "1 tensors", "finite", name):
        checkpoint.load(directory)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_config_has_finite_numbers(saved, value):
    directory, _ = saved
    redigest(directory)
    path = directory / "config.json"
    text = re.sub(r'"dropout": [\d.]+', f'"dropout": {value}', path.read_text())
    assert value in text
    path.write_text(text)
    with refused("dropout"):
        checkpoint.load(directory)


def bombs(root, saved, tokenizer_of):
    """Directories of checkpoints that are small, and would keep a reader busy or fill the memory."""

    def made(name, config=None, tokenizer=None):
        directory = root / name
        shutil.copytree(saved, directory)
        content = json.loads((directory / "config.json").read_text())
        del content["sealed"]
        if tokenizer:
            (directory / "tokenizer.json").write_text(tokenizer)
            content["files"]["tokenizer.json"] = file_sha256(directory / "tokenizer.json")
        if config:
            config(content)
        (directory / "config.json").write_text(json.dumps(content))
        return directory

    def sized(side, name, value):
        return lambda content: content["config"][side].update({name: value})

    for side, name, value in (
        ("text", "depth", 10**9), ("vision", "depth", 10**9), ("text", "width", 2**24),
        ("text", "vocab_size", 2**24), ("vision", "image_size", 2**24), ("text", "hidden", 10**400), ("text", "heads", 10**12),
    ):  # fmt: skip
        yield made(f"{side}-{name}-{len(str(value))}", sized(side, name, value))
    for name, text in (
        ("nested", "[" * 100_000),
        ("long", json.dumps({"x": [[]] * 1_300_000})),
        ("binary", "\0" * 1000),
    ):
        directory = made(name)
        (directory / "config.json").write_text(text)
        yield directory
    yield made("words", tokenizer=tokenizer_of(40).to_json() + " " * 2**24)
    directory = made("tensors", lambda content: content["files"].pop("model.safetensors"))
    head = b"{" + b" " * 17_000_000 + b"}"
    (directory / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head)
    redigested = json.loads((directory / "config.json").read_text())
    redigested["files"]["model.safetensors"] = file_sha256(directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(redigested))
    yield directory
    for name, kind, values in (
        ("clip", "CLIPModel", {"vision_config": {"num_hidden_layers": 10**9}}),
        ("clip-heads", "CLIPModel", {"vision_config": {"num_attention_heads": 0}}),
        ("blip", "BlipForConditionalGeneration", {"text_config": {"num_hidden_layers": 10**9}}),
        ("vilt", "ViltForMaskedLM", {"num_hidden_layers": 10**9}),
    ):
        (root / name).mkdir()
        content = {"model_type": name.partition("-")[0], "architectures": [kind], **values}
        (root / name / "config.json").write_text(json.dumps(content))
        (root / name / "vocab.txt").write_text("a\n")
        save_file({"a": torch.zeros(1)}, root / name / "model.safetensors")
        yield root / name
    (root / "packed").mkdir()
    torch.save({"model": {"a": torch.zeros(5_000_000)}}, root / "plain.pth")
    with (
        zipfile.ZipFile(root / "plain.pth") as plain,
        zipfile.ZipFile(root / "packed" / "m.pth", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed,
    ):
        for each in plain.namelist():
            packed.writestr(each, plain.read(each))
    (root / "plain.pth").unlink()
    yield root / "packed"
    (root / "expanded").mkdir()
    torch.save(
        {"model": {"visual_encoder.x": torch.zeros(1).expand(10**5, 10**5)}}, root / "expanded" / "m.pth"
    )
    yield root / "expanded"


def test_a_checkpoint_that_explodes_is_refused_in_one_line(saved, tmp_path, tokenizer_of):
    """Catches layers without end, vocabularies of millions, nested or packed files: minutes, gigabytes or a traceback."""
    found = [str(each) for each in bombs(tmp_path, saved[0], tokenizer_of)]
    code = "from capfilt.models import checkpoint\ndef read(path): checkpoint.open_any(path)"
    for path, told in zip(found, limits.refused(code, found), strict=True):
        assert path in told


def test_a_vocabulary_of_millions_is_refused_before_it_is_built(saved, monkeypatch):
    """Catches a tokenizer.json of some megabytes that becomes gigabytes of tables."""
    monkeypatch.setattr(tokenizer, "MAX_VOCABULARY", 39)
    with refused("tokenizer.json", "40 tokens", 39):
        checkpoint.load(saved[0])
    monkeypatch.setattr(tokenizer, "MAX_VOCABULARY", 3)
    with pytest.raises(ValueError, match="4 tokens"):
        bpe.BpeTokenizer(["a", "b", bpe.START, bpe.END], [])


def test_files_are_on_the_disk_before_their_names_and_the_config_is_named_last(saved, monkeypatch):
    """A power cut after a save left a checkpoint of empty files, or one of which the training's state was gone already."""
    directory, model = saved
    tokenizer = checkpoint.load(directory)[1]
    steps = durable_steps(monkeypatch, directory)
    checkpoint.save(directory, model, tokenizer)
    assert steps[-7:] == [
        step
        for name in ("model.safetensors", "tokenizer.json", "config.json")
        for step in (f"sync partial/{name}", f"name {name}")
    ] + ["sync ."]
