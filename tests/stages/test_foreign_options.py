"""Catches an option that a model takes and ignores: one that means nothing to it, or one that never reaches it."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest

from capfilt import recipe as recipes
from capfilt.data.bpe import BpeTokenizer
from capfilt.stages import options as o
from capfilt.stages.registry import stage_command
from capfilt.stages.retrain_albef import RetrainAlbef
from capfilt.stages.retrain_clip import RetrainClip
from capfilt.stages.train import FinetuneFilter
from tests.refusals import refused
from tests.worlds import image_rows, tiny_checkpoint, tiny_vilt, write_images

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
KNOWN = o.RetrainOptions.__dataclass_fields__
MEANT = [
    (model, name) for model in o.RETRAINED for name in KNOWN if model not in KNOWN[name].metadata["models"]
]


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


def retrain(place, **given):
    options = o.RetrainOptions(human=("human",), preset="tiny", out="made", **given)
    command = stage_command("retrain")
    return command.build(command.classes(options)[0], options, place)


@pytest.mark.parametrize(("model", "name"), MEANT)
def test_what_means_nothing_is_refused_by_name(place, model, name):
    with refused(f"--{name.replace('_', '-')}", model):
        retrain(place, model=model, **{name: other(KNOWN[name])})
    retrain(place, model=model, **{name: KNOWN[name].default})


def test_the_table_says_what_the_models_are():
    by_model = {model: {name for each, name in MEANT if each == model} for model in o.RETRAINED}
    assert by_model["blip"] == {"contrast", "contrast_chunk", "mask_share", "alignment", "max_patches"}
    assert {
        "queue_size",
        "momentum",
        "alpha",
        "hardness_ramp_steps",
        "vision_init",
        "mask_share",
    } <= by_model["clip"]
    assert {"queue_size", "momentum", "contrast", "text_init"} <= by_model["vilt"]
    assert by_model["albef"] == {"contrast", "contrast_chunk", "alignment", "max_patches", "label_smoothing"}


def test_a_filter_that_is_a_vilt_has_neither_queue_nor_towers(place):
    tiny_vilt(place.model("vilt"))
    given = {"human": ("human",), "init": "vilt"}
    FinetuneFilter(o.FinetuneFilterOptions(**given), place)
    for name in (
        "queue_size",
        "momentum",
        "alpha",
        "alpha_ramp_epochs",
        "hardness_ramp_steps",
        "collapse_steps",
    ):
        value = other(o.FinetuneFilterOptions.__dataclass_fields__[name])
        with refused(f"--{name.replace('_', '-')}", "vilt"):
            FinetuneFilter(o.FinetuneFilterOptions(**given, **{name: value}), place)
    tiny_checkpoint(place.model("blip"))
    FinetuneFilter(o.FinetuneFilterOptions(human=("human",), init="blip", queue_size=4), place)
    with refused("--label-smoothing", 0.2):
        FinetuneFilter(o.FinetuneFilterOptions(human=("human",), init="blip", label_smoothing=0.2), place)


def test_patches_and_hidden_words_are_as_asked(place):
    tokenizer = BpeTokenizer.train(["a photo of a dog"] * 3, 530)
    options = o.RetrainOptions(model="clip", human=("human",), preset="base", patch_size=16, out="made")
    assert RetrainClip(options, place).sized(tokenizer).vision.patch_size == 16
    with refused("--patch-size 16", "tiny"):
        RetrainClip(dataclasses.replace(options, preset="tiny"), place)
    stage = retrain(place, model="albef", mask_share=0.4, vocab_size=200)
    assert isinstance(stage, RetrainAlbef)
    model, made = stage.initial(stage.data(48))
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
        if step.stage != "retrain":
            continue
        assert not o.foreign(options, options.model)
        kept = {
            name: value
            for name, value in vars(options).items()
            if options.model in KNOWN[name].metadata["models"]
        }
        own = {"model", "out", "web", "pairs", "verdicts", "steps", *benchmark.MODELS[options.model]}
        assert {n: v for n, v in kept.items() if n not in own} == {
            n: v for n, v in train.items() if n in kept and n not in own
        }
