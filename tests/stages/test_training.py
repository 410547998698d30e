"""Would catch: a model trained for a day that no other project reads, of which nobody was told; a target named that export
refuses, or refused that export takes; a cure that is no option."""

from __future__ import annotations

import dataclasses
import re

import pytest

from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import MissingInput, UserError
from capfilt.execution.inline import InlineExecutor
from capfilt.execution.run import run_stage
from capfilt.models import checkpoint, kind_of, layouts, preset
from capfilt.models.export import export, homes, places
from capfilt.models.family import CLASSES
from capfilt.stages.registry import STAGES, stage_command
from capfilt.stages.starts import ForTask
from capfilt.tables.workspace import Workspace
from tests.refusals import refused
from tests.worlds import image_rows, tiny_checkpoint, write_images

FAST = {"preset": "tiny", "steps": 1, "batch_size": 2, "vocab_size": 600, "precision": "fp32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = Workspace(tmp_path_factory.mktemp("places"))
    write_images(place.part("images", "human"), [image_rows("human", 8, source="human", split="train")])
    tiny_checkpoint(place.model("init"))
    return place


def built(place, name, **options):
    command = stage_command(name)
    given = command.options(**options)
    return command.build(command.classes(given)[0], given, place)


@pytest.mark.parametrize(
    ("model", "options", "can", "cannot"),
    [
        ("blip", {}, [], "cannot go to transformers: .*; --stem patch"),
        ("blip", {"stem": "patch"}, ["transformers"], ""),
        ("clip", {}, ["openai"], ""),
        ("vilt", {}, ["transformers"], ""),
        ("albef", {}, [], "cannot go to original: .*; --stem patch"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_training_says_where_its_model_can_go(place, tmp_path, capsys, model, options, can, cannot):
    out = f"{model}-{'-'.join(options)}"
    extra = {"queue_size": 0, "momentum": 0.0} if model in ("blip", "albef") else {}
    stage = built(place, f"retrain-{model}", human=("human",), out=out, **{**FAST, **options, **extra})
    summary = run_stage(stage, InlineExecutor(), quiet=False)
    early, late = capsys.readouterr().err, "\n".join(summary.lines())
    (line,) = re.findall("can(?:not)? go to .*", early + late)
    assert bool(re.match(cannot or "can go to", line)), line
    assert (line in early) == (not can)
    assert re.findall(r"can go to ([a-z, ]+):", late) == ([", ".join(can)] if can else [])
    for layout in layouts.names()[1:]:
        if layout in can:
            export(place.model(out), layout, tmp_path / layout)
        else:
            with pytest.raises(UserError):
                export(place.model(out), layout, tmp_path / layout)
    # What the start did not say, the end does: also of a training that stands.
    again = "\n".join(run_stage(stage, InlineExecutor(), quiet=True).lines())
    assert re.findall("can(?:not)? go to .*", again) == [line]


def config_of(kind, tokenizer):
    with_vocabulary = tokenizer.vocab_size
    return {
        "blip": preset("blip", "base", with_vocabulary), "albef": preset("albef", "base", with_vocabulary),
        "clip": preset("clip", "base", with_vocabulary), "vilt": preset("vilt", "base", with_vocabulary),
        "trunk": preset("blip", "trunk", with_vocabulary), "resnet": preset("clip", "tiny", with_vocabulary),
        "sigmoid": dataclasses.replace(preset("clip", "base", with_vocabulary), logit_bias=True),
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "vocab", "open_"),
    [
        ("blip", 30524, ["transformers", "original"]),
        ("blip", 4096, ["transformers"]),
        ("albef", 30524, ["original"]),
        ("albef", 4096, []),
        ("vilt", 30524, ["transformers"]),
        ("clip", 49408, ["transformers", "openai"]),
        ("sigmoid", 49408, ["openai"]),
        ("resnet", 49408, ["openai"]),
        ("trunk", 30524, []),
    ],
)
def test_where_a_config_can_go_and_what_would_have_helped(kind, vocab, open_):
    class Vocabulary:
        vocab_size = vocab

    found = places(config_of(kind, Vocabulary))
    assert [layout for layout, error in found.items() if error is None] == open_
    (line,) = homes("x", found)
    assert line.startswith("can go to " + ", ".join(open_) if open_ else "cannot go to ")
    options = {name for command in STAGES for name in command.options.__dataclass_fields__}
    for error in found.values():
        for option in re.findall(r"--([a-z-]+)", error.cure if error else ""):
            assert option.replace("-", "_") in options


def test_a_learned_vocabulary_of_the_same_size_is_not_berts():
    """Would catch: a vocabulary that is judged by its size where it is known."""
    tokenizer = Tokenizer.train(["a b c"], 60)
    config = config_of("blip", type("V", (), {"vocab_size": 30524}))
    assert places(config)["original"] is None
    assert places(config, tokenizer)["original"] is not None


@pytest.mark.parametrize(
    ("command", "closed", "ends_as"),
    [
        ("finetune-vqa", {}, "blip_vqa"),
        ("finetune-vqa", {"closed": True}, "blip_classifier"),
        ("finetune-nlvr", {}, "blip_nlvr"),
        ("finetune-nlvr", {"single": True}, "blip_classifier"),
        ("finetune-entailment", {}, "blip_classifier"),
        ("finetune-classification", {}, "blip_classifier"),
    ],
)
@pytest.mark.parametrize("start", ["blip", "albef", "vilt"])
def test_what_a_task_ends_as_is_known_before_its_examples(place, command, closed, ends_as, start):
    from capfilt.stages.task_training import Finetune

    if start == "vilt" and ends_as == "blip_vqa":
        return  # no ViLT answers in words
    directory = place.model(f"start-{start}")
    if not directory.exists():
        from capfilt.models import build

        tokenizer = Tokenizer.train(["a b c"], 60)
        make = {
            "blip": lambda: checkpoint.load(place.model("init"))[0],
            "albef": lambda: build(preset("albef", "tiny", tokenizer.vocab_size), seed=0),
            "vilt": lambda: build(preset("vilt", "tiny", tokenizer.vocab_size), seed=0),
        }
        tokenizer = checkpoint.load(place.model("init"))[1] if start == "blip" else tokenizer
        checkpoint.save(directory, make[start](), tokenizer)
    module, _, name = (
        stage_command(command).classes(stage_command(command).options(**closed))[0].partition(":")
    )
    kind = getattr(__import__(module, fromlist=[name]), name)
    assert issubclass(kind, Finetune)
    options = stage_command(command).options(**closed, init=directory.name)
    found = kind_of(ForTask(place, options, kind.form, kind.task, command).planned()).name
    family = "vilt_classifier" if start == "vilt" else ends_as.replace("blip", start)
    assert found == family
    assert (kind.form == CLASSES) == ("classifier" in ends_as)


PAIRED, ASKED = {"human": ("later",)}, {"examples": ("later",), "images": ("later",)}
"""Parts that an earlier step of a recipe makes."""


@pytest.mark.parametrize(
    ("command", "parts", "wrong"),
    [
        ("finetune-captioner", PAIRED, "--freeze legs"),
        ("finetune-filter", PAIRED, "--freeze legs"),
        ("finetune-text-assignment", PAIRED, "--init"),  # of no ALBEF
        ("finetune-vqa", ASKED, "--freeze legs"),
        ("finetune-nlvr", ASKED, "--freeze legs"),
        ("retrain-blip", PAIRED, "--freeze legs"),
    ],
)
def test_a_wrong_start_is_told_before_its_inputs_are_there(place, command, parts, wrong):
    """Would catch: a recipe that runs for a day, and then refuses the start of its last step."""
    with refused(wrong):
        built(place, command, **parts, init="init", freeze=("legs",))


@pytest.mark.parametrize(
    ("command", "options", "said"),
    [
        ("finetune-captioner", {**PAIRED, "mix": ("human",)}, "--mix human"),
        ("finetune-vqa", {**ASKED, "answer_weight": ("later",)}, "--answer-weight later"),
    ],
)
def test_wrong_options_of_the_rows_are_told_before_their_start_is_there(place, command, options, said):
    """Would catch: the same of the rows, while an earlier step's checkpoint is missed."""
    with refused(said):
        built(place, command, **options, init="nowhere")


def test_a_start_that_is_missed_is_missed_once_the_rows_are_there(place):
    """Would catch: a training that is built without its start."""
    with refused("nowhere", error=MissingInput):
        built(place, "finetune-captioner", human=("human",), init="nowhere")
