"""Catches locked towers that learn, and features that depend on whether they were remembered."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.cli import main
from capfilt.models import build, checkpoint, preset
from capfilt.models.common import memo as memos
from capfilt.models.common.trunk import TRUNKS, TrunkRecipe
from capfilt.models.locked import model as locked
from capfilt.stages.registry import stage_command
from capfilt.stages.remembering import remembering
from capfilt.stages.train import Retrain
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, write_images


class SmallTrunk(torch.nn.Module):
    """A trunk that needs no package: one convolution with fixed weights."""

    def __init__(self, image_size):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 8, 8)
        with torch.no_grad():
            self.conv.weight.copy_(
                torch.linspace(-1, 1, self.conv.weight.numel()).view_as(self.conv.weight).sin()
            )
            self.conv.bias.zero_()

    def extract_features(self, x):
        return self.conv(x).relu()


@pytest.fixture(autouse=True)
def trunk(monkeypatch):
    recipe = TrunkRecipe(SmallTrunk, 5, 8, (0.5,) * 3, (0.5,) * 3)
    monkeypatch.setitem(TRUNKS, "small", recipe)
    monkeypatch.setitem(
        locked.PRESETS,
        "tiny",
        locked.LockedConfig(
            locked.LockedVisionConfig(32, "small", cells=2), locked.PRESETS["tiny"].text, 16, 8, 0.1
        ),
    )


@pytest.fixture
def workspace(tmp_path):
    made = Workspace(tmp_path)
    write_images(made.part("images", "human"), [image_rows("human", 24, source="human", texts=2)])
    return made


def trained(workspace, out, **more):
    given = {
        "preset": "tiny", "human": ("human",), "steps": 8, "batch_size": 8, "warmup_steps": 1, "vocab_size": 600,
        "learning_rate": 1e-2, "out": out, "save_every": 3, **more,
    }  # fmt: skip
    return Retrain(stage_command("retrain-locked").options(**given), workspace)


def test_features_are_the_mean_and_the_cells_of_the_map():
    eye = locked.Eye(locked.LockedVisionConfig(32, "small", cells=2))
    pixels = torch.randint(
        0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    found = eye.trunk_features(pixels)
    whole = SmallTrunk(32).extract_features((pixels / 255 - 0.5) / 0.5)
    wanted = [whole.mean((2, 3))] + [
        whole[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((2, 3))
        for row in (0, 1)
        for column in (0, 1)
    ]
    assert found.dtype == torch.float16
    assert torch.allclose(found.float(), torch.stack(wanted, 1), atol=2e-3)


def test_locked_towers_stay_and_heads_learn(workspace):
    stage = trained(workspace, "made")
    losses = []
    stage.run(lambda step, steps, values: losses.append(values["contrast"]) and None)
    made = checkpoint.open_any(stage.output)[0].model
    fresh = build(made.config)
    assert losses[-1] < losses[0]
    for (name, one), (_, other) in zip(made.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(one, other) == name.startswith("visual_encoder."), name


def test_a_second_training_and_another_stage_compute_no_feature_again(workspace, monkeypatch):
    made = []
    plain = memos.Memo
    monkeypatch.setattr(
        "capfilt.stages.remembering.Memo", lambda *given: made.append(plain(*given)) or made[-1]
    )
    for out in ("one", "two"):
        trained(workspace, out).run(lambda *_: None)
    assert [each.computed for each in made] == [24, 0]
    same = [(workspace.model(out) / "model.safetensors").read_bytes() for out in ("one", "two")]
    assert same[0] == same[1]
    (folder,) = (workspace.path / "features").iterdir()
    assert pq.read_table(folder).num_rows == 24
    # A damaged shard is made again, and told.
    (shard,) = folder.glob("*.parquet")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.warns(RuntimeWarning, match="computed again"):
        trained(workspace, "three").run(lambda *_: None)
    assert made[-1].computed == 24
    assert (workspace.model("three") / "model.safetensors").read_bytes() == same[0]


def test_it_makes_no_difference_whether_a_feature_was_remembered(workspace):
    model = build(preset("locked", "tiny", 600)).eval()
    pixels = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        plain = model.encode_image(pixels)
        with remembering(model, workspace):
            assert torch.equal(model.encode_image(pixels), plain)
            assert torch.equal(model.encode_image(pixels), plain)
        assert model.visual_encoder.memo is None
        # A training's cache gives features in place of pixels.
        assert torch.equal(model.encode_image(model.visual_encoder.trunk_features(pixels)), plain)


def test_a_killed_training_goes_on_to_the_same_bytes(workspace):
    trained(workspace, "whole").run(lambda *_: None)
    stage = trained(workspace, "killed")

    def kill(step, steps, values):
        if step == 5:
            raise MemoryError

    with pytest.raises(MemoryError):
        stage.run(kill)
    stage.run(lambda *_: None)
    assert (stage.output / "model.safetensors").read_bytes() == (
        workspace.model("whole") / "model.safetensors"
    ).read_bytes()


def test_it_scores_and_is_evaluated(workspace, capsys):
    trained(workspace, "made").run(lambda *_: None)
    write_images(workspace.part("images", "held"), [image_rows("held", 12, source="human", split="test")])
    place = ("-w", str(workspace.path), "--execution", "inline", "-q")
    for words in (
        ("score", "--images", "human", "--filter", "made"),
        ("evaluate", "--model", "made", "--tasks", "retrieval", "--images", "held"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *place])
        assert stopped.value.code == 0, capsys.readouterr().err
    (table,) = workspace.part("scores", "made").tables(["itc_score"])
    assert table["itc_score"].null_count == 0
    assert json.loads(next((workspace.path / "runs").glob("*.json")).read_text())["metrics"]["tr@10"] > 0


def test_what_cannot_be_is_refused(workspace):
    with refused("vision.trunk", "pixels"):
        locked.LockedVisionConfig(64, "resnet")
    with refused("--patch-size 8"):
        trained(workspace, "made", patch_size=8)
    with refused("--vocab", "encoder"):
        trained(workspace, "made", preset="lite2-minilm", vocab="words.txt")


def test_encoders_that_learn_move_by_a_rate_of_their_own(workspace):
    """Catches encoders at the heads' rate, or at none: Adam's first step is the rate itself."""
    options = {"encoder_lr": 1e-4, "cache_features": False, "steps": 1, "warmup_steps": 0, "clip_norm": 0.0}
    stage = trained(workspace, "made", weight_decay=0.0, **options)
    stage.run(lambda *_: None)
    made = checkpoint.open_any(stage.output)[0].model
    fresh = dict(build(made.config).named_parameters())
    moved = {name: float((each - fresh[name]).detach().abs().max()) for name, each in made.named_parameters()}
    assert moved["visual_encoder.trunk.net.conv.weight"] == pytest.approx(1e-4, rel=0.05)
    assert moved["image_head.narrow.weight"] == pytest.approx(1e-2, rel=0.05)
    # A text side that is new is none of the pretrained ones.
    assert moved["text_encoder.transformer.embeddings.LayerNorm.weight"] == pytest.approx(1e-2, rel=0.05)
    # What changes is not remembered.
    assert not made.visual_encoder.encoder_name
    assert not (workspace.path / "features").exists()
    assert made.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).requires_grad


def test_a_pretrained_text_encoder_learns_or_is_frozen_with_the_trunk():
    text = locked.PRESETS["lite2-minilm"].text
    for frozen in (True, False):
        vision = locked.LockedVisionConfig(32, "small", trunk_frozen=frozen)
        with torch.device("meta"):
            model = locked.Locked(locked.LockedConfig(vision, text))
        sides = (model.visual_encoder, model.text_encoder)
        for side in sides:
            assert all(each.requires_grad != frozen for each in side.parameters())
        assert [bool(side.encoder_name) for side in sides] == [frozen, frozen]
        rates = locked.LockedTraining(model, encoder_rate=0.1).rates()
        assert len(rates) == sum(len([*side.parameters()]) for side in sides)


def test_rates_that_cannot_be_are_refused(workspace):
    with refused("--cache-features", "--encoder-lr"):
        trained(workspace, "made", encoder_lr=1e-4)
    with refused("--encoder-lr", "lite9"):
        locked.configured(
            locked.LockedConfig(
                locked.LockedVisionConfig(64, "pixels"), locked.PRESETS["lite2-scratch"].text
            ),
            SimpleNamespace(encoder_lr=1e-4, encoders="", preset="lite9"),
        )
    trained(workspace, "made").run(lambda *_: None)
    with refused("--encoder-lr", "made", "frozen"):
        trained(workspace, "more", init="made", encoder_lr=1e-4, cache_features=False).run(lambda *_: None)
