"""Catches an option without help, and options of inputs that slip into the fingerprint by name."""

from __future__ import annotations

import dataclasses

from capfilt.stages.base import option_values
from capfilt.stages.options import REQUIRED, CaptionOptions, PretrainOptions, missing
from capfilt.stages.registry import STAGES


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
