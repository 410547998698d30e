"""Would catch: a record that names a class which a move left behind, or the class of another stage."""

from __future__ import annotations

import importlib

import pytest

from capfilt.errors import UserError
from capfilt.stages.registry import STAGES, stage_command


@pytest.mark.parametrize("command", STAGES, ids=lambda command: command.name)
def test_every_class_that_a_record_names_is_there(command):
    paths = [*command.stages, *filter(None, [command.instead[1]])]
    for path in paths:
        module, _, name = path.partition(":")
        stage = getattr(importlib.import_module(module), name)
        assert callable(stage.identity), path
    for option in (command.positional, command.without, command.instead[0]):
        assert not option or option in command.options.__dataclass_fields__, option


def test_names_are_unique_and_an_unknown_one_is_told_which_there_are():
    names = [command.name for command in STAGES]
    assert len(names) == len(set(names))
    with pytest.raises(UserError, match=r"'captoin'.*caption.*grade"):
        stage_command("captoin")
