"""Catches a CLIP that is retrained on other pairs than a BLIP, is no checkpoint that can be opened, continued and evaluated,
or takes options that mean nothing to it."""

from __future__ import annotations

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command, run_stage
from capfilt.models import checkpoint
from capfilt.models.clip.model import Clip
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate
from capfilt.stages.registry import stage_command
from capfilt.stages.train import Retrain
from capfilt.stages.training_options import Retrain_clip
from tests.refusals import refused
from tests.worlds import image_rows, write_images

FAST = Retrain_clip(human=("human",), web=("web",), steps=4, batch_size=4, preset="tiny", vocab_size=540, augment=False,
    save_every=1, out="clip",
)  # fmt: skip


@pytest.fixture
def place(workspace):
    rows = [
        *image_rows("human", 6, source="human", texts=2, split="train"),
        *image_rows("human", 4, source="human", start=10, texts=3, split="test"),
    ]
    write_images(workspace.part("images", "human"), [rows])
    return workspace


def run(stage):
    return run_stage(stage, InlineExecutor(), quiet=True)


def test_a_clip_is_retrained_and_evaluated_like_a_blip(place):
    (summary,) = run_command(stage_command("retrain-clip"), FAST, place, "inline", quiet=True)
    assert summary.figures["steps"] == 4
    directory = place.model("clip")
    seen = pq.read_table(directory / "exposures.parquet").to_pylist()
    assert sum(row["exposures"] for row in seen) == 16
    assert {row["source"] for row in seen} == {"human", "web"}
    line = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "contrast", "accuracy", "scale", "image_cosine"} <= set(line)
    contents, meta = checkpoint.open_any(directory)
    assert meta["model_type"] == "clip"
    assert isinstance(contents.model, Clip)
    assert isinstance(contents.tokenizer, BpeTokenizer)
    choice = {"model": "clip", "images": "human", "out": "clip"}
    run(Evaluate(EvaluateOptions(tasks=("retrieval",), **choice), place))
    result = json.loads((place.path / "runs" / "clip.json").read_bytes())
    assert 0 <= result["metrics"]["tr@1"] <= 100
    assert "cosine" in result["tasks"]["retrieval"]["protocol"]
    with refused("--tasks captioning", "model"):
        run(Evaluate(EvaluateOptions(tasks=("captioning",), **{**choice, "out": "c"}), place))


def test_it_goes_on_from_a_checkpoint_and_is_no_captioner(place):
    run(Retrain(FAST, place))
    further = dataclasses.replace(FAST, init="clip", steps=1, learning_rate=1e-9, out="further")
    run(Retrain(further, place))
    old, new = (checkpoint.open_any(place.model(name))[0].model.state_dict() for name in ("clip", "further"))
    for name, tensor in old.items():
        if tensor.is_floating_point() and "running" not in name:
            torch.testing.assert_close(new[name], tensor, atol=1e-6, rtol=1e-5)
    with refused("clip", "embeds"):
        run(CaptionStage(CaptionOptions(images="web", captioner="clip"), place))
    with refused("captioner", "BLIP", "CLIP"):
        run(Retrain(dataclasses.replace(FAST, init="captioner", out="x"), place))


def test_the_sigmoid_loss_makes_a_model_with_a_bias_and_other_weights_are_refused(place):
    run(Retrain(dataclasses.replace(FAST, contrast="sigmoid", contrast_chunk=2, steps=1), place))
    assert checkpoint.open_any(place.model("clip"))[0].model.logit_bias is not None
    with refused("logit_bias"):
        run(Retrain(dataclasses.replace(FAST, init="clip", out="y"), place))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contrast": "hinge"}, "hinge"),
        ({"preset": "huge"}, "--preset huge"),
    ],
)
def test_wrong_options_are_named(place, changes, message):
    with refused(message):
        Retrain(dataclasses.replace(FAST, **changes), place)
