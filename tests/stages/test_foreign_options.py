"""Catches an option that a model takes and ignores: one that means nothing to it, or one that never reaches it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from capfilt import recipe as recipes
from capfilt.stages.train import FinetuneFilter, Retrain
from capfilt.stages.training_options import FinetuneFilterOptions, Retrain_albef, Retrain_clip
from tests.refusals import refused
from tests.worlds import image_rows, tiny_checkpoint, tiny_vilt, write_images

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def place(workspace):
    write_images(workspace.part("images", "human"), [image_rows("human", 4, source="human")])
    return workspace


def other(field):
    """A value that is not the default, and that a model which has the option takes."""
    default = field.default
    if field.metadata["choices"]:
        return next(value for value in reversed(field.metadata["choices"]) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, float):
        return default / 2 or 0.5
    return f"{default}x" if isinstance(default, str) else default + 1


def test_a_filter_that_is_a_vilt_has_neither_queue_nor_towers(place):
    tiny_vilt(place.model("vilt"))
    given = {"human": ("human",), "init": "vilt"}
    FinetuneFilter(FinetuneFilterOptions(**given), place)
    for name in (
        "queue_size",
        "momentum",
        "alpha",
        "alpha_ramp_epochs",
        "hardness_ramp_steps",
    ):
        value = other(FinetuneFilterOptions.__dataclass_fields__[name])
        with refused(f"--{name.replace('_', '-')}", "vilt"):
            FinetuneFilter(FinetuneFilterOptions(**given, **{name: value}), place)
    tiny_checkpoint(place.model("blip"))
    FinetuneFilter(FinetuneFilterOptions(human=("human",), init="blip", queue_size=4), place)
    # A filter writes nothing: there is no language model whose targets to smooth.
    assert "label_smoothing" not in FinetuneFilterOptions.__dataclass_fields__


def test_patches_and_hidden_words_are_as_asked(place):
    options = Retrain_clip(human=("human",), preset="base", patch_size=16, out="made")
    assert Retrain(options, place).planned().vision.patch_size == 16
    with refused("--patch-size 16", "tiny"):
        Retrain(dataclasses.replace(options, preset="tiny"), place).planned()
    given = {"human": ("human",), "preset": "tiny", "out": "made"}
    stage = Retrain(Retrain_albef(**given, mask_share=0.4, vocab_size=200), place)
    model, made = stage.initial(stage.source.data(48))
    assert stage.module(model, made, None).masking.share == 0.4


def test_the_benchmark_of_all_models_gives_each_what_it_takes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("retraining_benchmark", BENCHMARKS / "retraining.py")
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, benchmark)
    spec.loader.exec_module(benchmark)
    _, content = recipes.load_recipe("quickstart")
    needed = {name: "here" for name, known in content.inputs.items() if known.default is None}
    resolved = {
        s.label: values for s, values in recipes.resolve(content, [f"{k}={v}" for k, v in needed.items()])
    }
    train = vars(resolved["retrain-raw"])
    assert (train["queue_size"], train["momentum"], train["hardness_ramp_steps"]) == (0, 0.0, 900)
    evaluate = {"images": "human", "tasks": ["retrieval"]}
    steps = benchmark.compared(list(benchmark.MODELS), train, benchmark.CORPORA, evaluate)
    for step, options in recipes.resolve(recipes.Recipe(version=1, stages=steps), []):
        if not step.stage.startswith("retrain-"):
            continue
        model = step.stage.removeprefix("retrain-")
        own = {"out", "web", "pairs", "verdicts", "steps", *benchmark.MODELS[model]}
        kept = {name: value for name, value in vars(options).items() if name not in own and name in train}
        assert kept == {name: train[name] for name in kept}
