"""Catches an option without help, and options of inputs that slip into the fingerprint by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from capfilt.options import (
    INPUTS,
    MODEL,
    OPTIMISER,
    PANELS,
    REQUIRED,
    ROWS,
    SCHEDULE,
    SOURCES,
    SPLITS,
    missing,
    offered,
    panel_of,
)
from capfilt.stages.base import option_values
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.registry import STAGES
from capfilt.stages.select import SelectOptions
from capfilt.stages.sources import shares
from capfilt.stages.task_options import FinetuneVqaOptions
from capfilt.stages.training_options import PretrainOptions
from capfilt.tables import contracts
from tests.refusals import refused

NUMBERS = [
    (command.options, each)
    for command in STAGES
    for each in offered(command.options)
    if each.type in ("int", "float")
]
"""Every option of every stage that is a number."""


def no_value(options, **values):
    (name,) = values
    with refused(f"--{name.replace('_', '-')}"):
        options(**values)


@pytest.mark.parametrize(("options", "each"), NUMBERS, ids=[f"{o.__name__}.{e.name}" for o, e in NUMBERS])
def test_no_number_passes_that_is_none_or_out_of_its_range(options, each):
    """Catches NaN, which is in every range that is checked by comparing; an infinity; and what the help calls impossible."""
    options(**{each.name: each.default})
    for value in (math.nan, -math.inf, -1, *([] if each.default == math.inf else [math.inf])):
        # These may be below 0.
        if value != -1 or each.name not in ("threshold", "synthetic_threshold", "length_penalty"):
            no_value(options, **{each.name: value})
    marks = each.metadata
    for bound, out in (("most", 1.5), ("below", 0.0), ("least", -0.5), ("above", 0.0)):
        if math.isfinite(marks[bound]):
            no_value(options, **{each.name: marks[bound] + out})
            if bound == "most" or (bound == "least" and marks["above"] < marks["least"]):
                options(**{each.name: type(each.default)(marks[bound])})
    if each.type == "int":
        for value in (2**63, 10**30, 10**6000):
            no_value(options, **{each.name: value})


def test_shares_and_probabilities_end_at_one():
    """Catches 1.5 for a chance: every option that is named as one, whatever its stage."""
    shares_of = {
        "top_p", "keep_fraction", "mask_share", "label_smoothing", "share_from", "share_to", "wrong", "truncated", "file_name",
        "swap", "drop_path", "precision", "changed_word", "donors_from", "donors_to", "alpha", "momentum", "ema", "beta2",
        "decay_rate", "crop_scale", "caption_share", "synthetic_share",
    }  # fmt: skip
    found = {each.name for _, each in NUMBERS if min(each.metadata["most"], each.metadata["below"]) <= 1}
    assert found == shares_of


def test_choices_are_checked_one_by_one():
    for command in STAGES:
        for each in dataclasses.fields(command.options):
            if each.metadata["choices"]:
                value = ("dev",) if each.type.startswith("tuple") else "dev"
                no_value(command.options, **{each.name: value})
    assert (SOURCES, SPLITS) == (contracts.SOURCES, contracts.SPLITS)
    assert ExamplesOptions.__dataclass_fields__["task"].metadata["choices"] == ("auto", *contracts.TASKS)


def test_a_nul_is_in_no_text():
    """Catches a path that no operating system takes, from a recipe."""
    no_value(SelectOptions, images="a\0b")
    no_value(SelectOptions, out="\0")
    no_value(SelectOptions, captions=("a", "b\0"))
    assert SelectOptions(images=REQUIRED).images == REQUIRED


@pytest.mark.parametrize("weight", ["nan", "inf", "-1", "much", ""])
def test_a_weight_in_the_mix_is_a_number_of_0_or_more(weight):
    with refused(f"--mix web={weight}"):
        shares([f"web={weight}"])


def test_every_option_has_help_and_a_plain_type():
    for command in STAGES:
        assert command.options.__doc__
        for field in dataclasses.fields(command.options):
            assert field.metadata["help"], (command.name, field.name)
            assert field.type in ("str", "int", "float", "bool", "tuple[str, ...]"), (
                command.name,
                field.name,
            )


def test_names_of_inputs_and_outputs_do_not_decide_what_rows_come_out():
    one = option_values(CaptionOptions(images="a", captioner="x", out="p"))
    other = option_values(CaptionOptions(images="b", captioner="y", out="q"))
    assert one == other
    assert option_values(CaptionOptions(images="a", seed=1)) != one


def test_an_option_that_came_later_leaves_old_fingerprints_alone_until_it_is_used():
    """A checkpoint made before an option existed, made again because the option now has a default."""
    assert "accumulate" not in option_values(PretrainOptions())
    assert option_values(PretrainOptions(accumulate=2))["accumulate"] == 2
    assert option_values(PretrainOptions(keep_best=True, recompute=True)) == option_values(PretrainOptions())
    assert option_values(PretrainOptions())["batch_size"] == 64


def test_what_must_be_given_is_named():
    assert CaptionOptions().images == REQUIRED
    assert missing(CaptionOptions()) == ["images"]
    assert missing(CaptionOptions(images="web")) == []


def test_the_panel_of_an_option_is_that_of_the_class_that_first_has_it():
    """Would catch: an option that moves to another panel because a stage has a default of its own for it."""
    for options, name, panel in (
        (FinetuneVqaOptions, "learning_rate", OPTIMISER),  # declared again by a class of the panel "Model"
        (FinetuneVqaOptions, "epochs", SCHEDULE),
        (FinetuneVqaOptions, "alpha", MODEL),
        (FinetuneVqaOptions, "examples", INPUTS),  # by its kind
        (FinetuneVqaOptions, "out", INPUTS),  # by its name
        (FinetuneVqaOptions, "splits", INPUTS),  # by its own mark
        (SelectOptions, "by", ROWS),
    ):
        assert panel_of(options, options.__dataclass_fields__[name]) == panel, name
    for command in STAGES:
        found = {panel_of(command.options, each) for each in dataclasses.fields(command.options)}
        assert INPUTS in found <= set(PANELS), command.name
