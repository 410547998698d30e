"""Catches a tower that follows the wrong weights, or one that is frozen, and rows that a group of similar length loses. What
contrast and matching come to is `test_pretraining.py`'s and `test_albef_pretraining.py`'s."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capfilt.errors import UserError
from capfilt.models.common.momentum import CHUNK_ROWS, MAX_CHUNKS, AlignmentConfig, followed, length_chunks


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5 * CHUNK_ROWS))
def test_every_row_is_in_one_group_that_is_as_long_as_its_longest(lengths):
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    groups = length_chunks(mask)
    rows = torch.cat([some for some, _ in groups])
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    assert len(groups) == max(1, min(MAX_CHUNKS, len(lengths) // CHUNK_ROWS))
    if len(groups) > 1:
        assert [length for _, length in groups] == [int(mask[some].sum(dim=1).max()) for some, _ in groups]
        assert sorted(lengths) == [lengths[row] for row in rows.tolist()]
    else:
        assert groups[0][1] == mask.shape[1]


def test_a_tower_follows_the_tensors_of_its_own_names_and_no_frozen_one():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    model["b"].requires_grad_(False)
    towers = copy.deepcopy(model)
    del towers["c"]
    mine, live = followed(towers, model)
    assert [id(each) for each in mine] == [id(each) for each in towers["a"].parameters()]
    assert [id(each) for each in live] == [id(each) for each in model["a"].parameters()]


def test_a_tied_tensor_is_followed_under_the_name_that_the_tower_has():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    towers = copy.deepcopy(model)
    del towers["a"]
    _, live = followed(towers, model)
    assert {id(each) for each in live} == {id(model["a"].weight), id(model["b"].bias)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objectives": ()}, "objectives"),
        ({"objectives": ("itc", "lm")}, "objectives"),
        ({"weights": {"lm": 1.0}}, "weights"),
        ({"queue_size": -1}, "queue_size"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
    ],
)
def test_constants_that_cannot_be_are_refused_by_name(options, said):
    with pytest.raises(UserError, match=said):
        AlignmentConfig(**options)
