"""Catches a checkpoint that people have and that can no longer be read, or that is read as another model. The fixtures were
written by the capfilt that wrote layout 2 of workspaces."""

from __future__ import annotations

import json

import pytest

from capfilt.models import checkpoint
from tests.golden import make
from tests.golden.families import CLASSES, MODELS, TOKENS

GOLDEN = make.recorded()["outputs"]


@pytest.mark.parametrize("name", make.SAVED)
def test_a_checkpoint_still_opens_and_computes_what_it_did(name):
    contents, meta = checkpoint.open_any(make.CHECKPOINTS / name)
    assert contents.extra == {"made": "for tests"} == meta["extra"]
    assert not list(make.differences(make.computed(name, contents.model), GOLDEN[name], name))
    # Tensor by tensor, so that a difference has a name.
    fresh = {key: each.shape for key, each in checkpoint.tensors(MODELS[name]()).items()}
    assert {key: each.shape for key, each in checkpoint.tensors(contents.model).items()} == fresh
    if not name.startswith(("clip", "locked_over")):
        assert [contents.tokenizer.token(index) for index in range(contents.tokenizer.vocab_size)] == list(
            TOKENS
        )


@pytest.mark.parametrize("name", make.SAVED)
def test_a_checkpoint_saved_again_is_the_same(name, tmp_path):
    """A new capfilt must not write files that the one before refuses, or drop what it does not know."""
    contents, before = checkpoint.open_any(make.CHECKPOINTS / name)
    checkpoint.save(tmp_path, contents.model, contents.tokenizer, contents.extra)
    weights = "model.safetensors"
    assert (tmp_path / weights).read_bytes() == (make.CHECKPOINTS / name / weights).read_bytes()
    after = checkpoint.read_config(tmp_path)
    assert after["model_type"] == before["model_type"]
    assert after["config"] == json.loads(json.dumps(before["config"]))


def test_every_class_of_model_is_among_the_fixtures():
    kinds = {
        json.loads((make.CHECKPOINTS / name / "config.json").read_text())["model_type"] for name in make.SAVED
    }
    assert kinds == set(CLASSES)
    assert {path.name for path in make.CHECKPOINTS.iterdir()} == set(make.SAVED)
