"""Catches a locked CLIP over a CLIP's towers that takes other weights or tokens than the checkpoint's, whose features are of
another text or made twice, that is another model after it was saved, or that takes what is no CLIP."""

from __future__ import annotations

import json

import pytest
import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.tokenizer import Tokenizer
from capfilt.models import build, checkpoint, preset
from capfilt.models.clip.model import ClipConfig, ClipTextConfig, ClipVisionConfig
from capfilt.models.common import memo as memos
from capfilt.models.export import export
from capfilt.models.locked.model import LockedTraining
from capfilt.models.locked.over import Over, OverConfig
from capfilt.stages.registry import stage_command
from capfilt.stages.train import Retrain
from capfilt.tables.workspace import Workspace
from tests.golden.families import CLASSES, MODELS
from tests.refusals import refused
from tests.worlds import image_rows, write_images

TEXT = ["a red dog", "a blue cat on a mat", "red", "a green dog on a green mat"]


@pytest.fixture(scope="module")
def tokenizer():
    return BpeTokenizer.train(TEXT * 3, 540)


@pytest.fixture(scope="module")
def clip(tokenizer):
    vision = ClipVisionConfig(32, 16, 32, 1, 2, 64)
    text = ClipTextConfig(tokenizer.vocab_size, 16, 32, 1, 2, 64, pad_id=tokenizer.pad_id)
    return build(ClipConfig(vision, text, embed_dim=24), 7).eval()


@pytest.fixture
def workspace(tmp_path, clip, tokenizer):
    made = Workspace(tmp_path)
    write_images(made.part("images", "human"), [image_rows("human", 24, source="human", texts=2)])
    checkpoint.save(made.model("clip"), clip, tokenizer)
    return made


def trained(workspace, out, encoders="clip", **more):
    given = {
        "preset": "tiny", "human": ("human",), "steps": 8, "batch_size": 8, "warmup_steps": 1, "learning_rate": 1e-2,
        "out": out, **more,
    }  # fmt: skip
    if encoders:
        given["encoders"] = str(workspace.model(encoders))
    return Retrain(stage_command("retrain-locked").options(**given), workspace)


def run(stage):
    stage.run(lambda *_: None)
    return checkpoint.open_any(stage.output)[0]


@pytest.mark.parametrize("layout", ["capfilt", "transformers", "openai"])
def test_it_takes_a_clips_towers_and_tokens_and_is_the_same_after_it_was_saved(
    layout, workspace, clip, tokenizer
):
    if layout != "capfilt":
        export(workspace.model("clip"), layout, workspace.model(layout))
    contents = run(trained(workspace, "made", "clip" if layout == "capfilt" else layout))
    made = contents.model
    assert isinstance(made, Over)
    assert contents.tokenizer.cleaning == tokenizer.cleaning
    ids, mask = tokenizer.encode(TEXT, **made.config.reading)
    assert torch.equal(contents.tokenizer.encode(TEXT, **made.config.reading)[0], ids)
    for name in ("visual_encoder", "text_encoder"):
        given = getattr(clip, name).state_dict()
        for key, each in getattr(made, name).tower.state_dict().items():
            assert torch.equal(each, given[key])
    pixels = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        seen, read = clip.encode_image(pixels).half(), clip.encode_text(ids).half()
        assert torch.equal(made.visual_encoder(pixels)[:, 0], seen)
        assert torch.equal(made.text_encoder(ids, mask), read)
        assert made.embed_text(ids, mask).shape == (4, made.config.embed_dim)


def test_features_are_made_once_and_those_of_another_geometry_are_others(workspace, monkeypatch, clip):
    made = []
    monkeypatch.setattr(
        "capfilt.stages.remembering.Memo", lambda *given: made.append(memos.Memo(*given)) or made[-1]
    )
    first = run(trained(workspace, "one"))
    distinct = made[1].computed
    assert [each.computed for each in made] == [24, distinct]
    assert 1 < distinct <= 48
    run(trained(workspace, "two"))
    assert [each.computed for each in made[2:]] == [0, 0]
    plain = run(trained(workspace, "three", cache_features=False))
    assert [each.computed for each in made[4:]] == [0, 0]
    weights = [contents.model.state_dict() for contents in (first, plain)]
    assert all(torch.equal(each, weights[1][name]) for name, each in weights[0].items())
    names = set()
    for activation in ("gelu", "quick_gelu"):
        other = build(OverConfig(ClipConfig(clip.config.vision, clip.config.text, 24, activation)))
        names |= {other.visual_encoder.encoder_name, other.text_encoder.encoder_name}
    assert len(names) == 4


def test_towers_learn_at_a_rate_of_their_own_and_are_gone_on_with(workspace, clip):
    learning = {"encoder_lr": 1e-4, "cache_features": False}
    once = {"steps": 1, "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}
    made = run(trained(workspace, "made", **learning, **once)).model
    for name in ("visual_encoder", "text_encoder"):
        given = dict(getattr(clip, name).named_parameters())
        moved = [
            float((each - given[key]).detach().abs().max())
            for key, each in getattr(made, name).tower.named_parameters()
        ]
        assert max(moved) == pytest.approx(1e-4, rel=0.05)
    assert not (workspace.path / "features").exists()
    further = run(trained(workspace, "further", "", init="made", **learning, **once)).model
    assert isinstance(further, Over)
    assert not torch.equal(further.text_encoder.tower.proj.weight, made.text_encoder.tower.proj.weight)


def test_frozen_towers_have_no_gradient_and_stay_in_evaluation(clip):
    model = build(OverConfig(clip.config)).train()
    assert not any(each.training for each in model.visual_encoder.modules())
    assert model.image_head.training
    module = LockedTraining(model)
    learns = [name for name, each in module.named_parameters() if each.requires_grad]
    assert all(
        name.startswith(("model.image_head", "model.text_head", "model.logit_scale")) for name in learns
    )


def test_what_does_not_fit_is_refused_with_what_does(workspace, tmp_path):
    locked = preset("locked", "tiny", 10)
    words = Tokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "[DEC]", "[ENC]"], "as-found"
    )
    checkpoint.save(workspace.model("locked"), build(locked), words)
    with refused("--encoders", "locked", "transformers", "open_clip"):
        trained(workspace, "x", "locked")
    siglip = workspace.model("siglip")
    siglip.mkdir()
    (siglip / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    with refused("--encoders", "SigLIP", "open_clip"):
        trained(workspace, "x", "siglip")
    with refused("--encoders", "none", "no such file"):
        trained(workspace, "x", "none")
    with refused("--encoders", "--init"):
        trained(workspace, "x", init="locked")
    with refused("--vocab-size 600", "encoder"):
        trained(workspace, "x", vocab_size=600)


@pytest.mark.parametrize("towers", [None, 3, [1, 2], {"unheard": 1}])
def test_towers_that_are_no_clips_config_are_refused(towers):
    assert "locked_over" in CLASSES
    config = MODELS["locked_over"]().config
    with refused("model config"):
        type(config).from_dict({**config.to_dict(), "towers": towers})
