"""Catches a ViLT that is retrained on other pairs than a BLIP, is no checkpoint that can be opened, continued and evaluated,
starts from nothing where it was given a ViT, or takes options that mean nothing to it."""

from __future__ import annotations

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from capfilt.data.tokenizer import Tokenizer
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_command, run_stage
from capfilt.models import checkpoint
from capfilt.models.vilt.model import Vilt
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionStage
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.evaluate.stage import Evaluate
from capfilt.stages.registry import stage_command
from capfilt.stages.train import FinetuneCaptioner, FinetuneFilter, Retrain
from capfilt.stages.training_options import FinetuneCaptionerOptions, FinetuneFilterOptions, Retrain_vilt
from tests.refusals import refused
from tests.worlds import image_rows, write_images

FAST = Retrain_vilt(human=("human",), web=("web",), steps=4, batch_size=4, preset="tiny", vocab_size=200, augment=False,
    save_every=1, out="vilt",
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


def test_a_vilt_is_retrained_and_evaluated_like_a_blip(place):
    (summary,) = run_command(stage_command("retrain-vilt"), FAST, place, "inline", quiet=True)
    assert summary.figures["steps"] == 4
    directory = place.model("vilt")
    seen = pq.read_table(directory / "exposures.parquet").to_pylist()
    assert sum(row["exposures"] for row in seen) == 16
    assert {row["source"] for row in seen} == {"human", "web"}
    line = json.loads((directory / "log.jsonl").read_text().splitlines()[-1])
    assert {"loss", "itm", "mlm", "wpa", "itm_balanced_accuracy", "mlm_accuracy"} <= set(line)
    contents, meta = checkpoint.open_any(directory)
    assert meta["model_type"] == "vilt"
    assert isinstance(contents.model, Vilt)
    assert isinstance(contents.tokenizer, Tokenizer)
    choice = {"model": "vilt", "images": "human", "out": "vilt"}
    run(Evaluate(EvaluateOptions(tasks=("retrieval",), **choice), place))
    result = json.loads((place.path / "runs" / "vilt.json").read_bytes())
    assert 0 <= result["metrics"]["tr@1"] <= 100
    assert "every image with every text, 4 x 12 pairs" in result["tasks"]["retrieval"]["protocol"]
    assert not any(name.startswith("itc_") for name in result["metrics"])
    with refused("--tasks captioning", "model"):
        run(Evaluate(EvaluateOptions(tasks=("captioning",), **{**choice, "out": "c"}), place))


def test_it_is_finetuned_for_retrieval(place):
    run(Retrain(FAST, place))
    made = FinetuneFilterOptions(
        init="vilt", human=("human",), steps=30, batch_size=6, learning_rate=2e-3, min_lr=1e-4, warmup_steps=2,
        augment=False, save_every=0, out="ranked",
    )  # fmt: skip
    figures = run(FinetuneFilter(made, place)).figures
    assert figures["accuracy"] > 0.7  # one of six by chance
    contents, _ = checkpoint.open_any(place.model("ranked"))
    assert isinstance(contents.model, Vilt)
    with refused("ViLT", "BLIP"):
        run(FinetuneCaptioner(FinetuneCaptionerOptions(init="vilt", human=("human",), out="c"), place))


def test_it_goes_on_from_a_checkpoint_and_is_no_captioner(place):
    run(Retrain(FAST, place))
    further = dataclasses.replace(FAST, init="vilt", steps=1, learning_rate=1e-9, min_lr=0.0, out="further")
    run(Retrain(further, place))
    old, new = (checkpoint.open_any(place.model(name))[0].model.state_dict() for name in ("vilt", "further"))
    for name, tensor in old.items():
        torch.testing.assert_close(new[name], tensor, atol=1e-6, rtol=1e-5)
    with refused("vilt", "matches"):
        run(CaptionStage(CaptionOptions(images="web", captioner="vilt"), place))
    with refused("captioner", "BLIP", "ViLT"):
        run(Retrain(dataclasses.replace(FAST, init="captioner", out="x"), place))


def test_the_same_seed_trains_the_same_model_and_options_reach_the_loss(place):
    for out in ("one", "two"):
        run(Retrain(dataclasses.replace(FAST, out=out, steps=2), place))
    states = [checkpoint.open_any(place.model(out))[0].model.state_dict() for out in ("one", "two")]
    assert all(torch.equal(states[1][name], tensor) for name, tensor in states[0].items())
    options = dataclasses.replace(FAST, alignment=0.0, mask_share=0.5, max_patches=7, patch_size=16, out="x")
    stage = Retrain(options, place)
    model, tokenizer = stage.initial(stage.source.data(48))
    module = stage.module(model, tokenizer, None)
    assert (module.config.alignment, module.config.max_patches, module.masking.share) == (0.0, 7, 0.5)
    assert module.masking.whole_words
    assert model.config.vision.patch_size == 16


def test_it_starts_from_a_vit(place, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 256}
    vit = transformers.ViTModel(transformers.ViTConfig(**shape, image_size=48, patch_size=8))
    vit.save_pretrained(tmp_path / "vit")
    options = dataclasses.replace(FAST, vision_init=str(tmp_path / "vit"))
    stage = Retrain(options, place)
    model = stage.initial(stage.source.data(48))[0]
    state = load_file(tmp_path / "vit" / "model.safetensors")
    torch.testing.assert_close(model.visual_encoder.pos_embed, state["embeddings.position_embeddings"])
    patches = state["embeddings.patch_embeddings.projection.weight"]
    torch.testing.assert_close(model.visual_encoder.patch_embed.weight, patches)
    torch.testing.assert_close(model.blocks[2].mlp.fc2.weight, state["encoder.layer.2.output.dense.weight"])
    torch.testing.assert_close(model.norm.bias, state["layernorm.bias"])
    with refused("hidden_size", 128, 256):
        Retrain(dataclasses.replace(options, preset="small"), place).initial(stage.source.data(48))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alignment": -1.0}, "--alignment -1"),
        ({"max_patches": -1}, "--max-patches -1"),
        ({"preset": "huge"}, "--preset huge"),
    ],
)
def test_wrong_options_are_named(place, changes, message):
    with refused(message):
        Retrain(dataclasses.replace(FAST, **changes), place)
