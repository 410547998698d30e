"""Catches a model, an objective or an initialisation that a rebuilding moved: another loss, logit, gradient, draw or weight,
a tensor of another name. `make.py` writes the numbers; below the loader everything here is made by hand."""

from __future__ import annotations

import pytest
import torch

from tests.golden import make
from tests.golden.families import MODELS, OBJECTIVES, filled, outputs

GOLDEN = make.recorded()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_three_steps_of_every_objective_have_the_losses_they_had(name):
    # The later steps' losses are of weights, towers and queues that the earlier ones moved.
    assert not list(make.differences(make.losses(name), GOLDEN["losses"][name], name))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_computes_what_it_did(name):
    assert not list(make.differences(make.computed(name), GOLDEN["outputs"][name], name))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_begins_with_the_weights_and_names_it_had(name):
    assert not list(make.differences(make.initial(name), GOLDEN["initial"][name], name))
    assert make.tensors(name) == GOLDEN["tensors"][name]


def test_every_number_recorded_is_compared():
    assert set(GOLDEN["losses"]) == set(OBJECTIVES)
    assert set(GOLDEN["outputs"]) == set(GOLDEN["initial"]) == set(GOLDEN["tensors"]) == set(MODELS)


@pytest.mark.parametrize("moved", [1 / 64, -1 / 64])
@pytest.mark.parametrize("name", ["blip", "clip", "vilt", "albef", "blip_nlvr"])
def test_the_numbers_tell_one_moved_weight(name, moved):
    """A sketch that rounds too much would let anything pass."""
    model = filled(MODELS[name]())
    weight = model.visual_encoder.pos_embed
    with torch.no_grad():
        weight[..., 0, 0] += moved
    assert list(make.differences(make.computed(name, model), GOLDEN["outputs"][name]))


@pytest.mark.parametrize("name", ["blip", "vilt_nlvr", "albef_assignment"])
def test_the_numbers_outlive_another_order_of_rounding(name):
    """In double precision every sum is rounded otherwise, as on another processor."""
    model = filled(MODELS[name]())
    double = outputs(name, model.double())
    found = {key: {"shape": list(each.shape), "values": make.sketch(each)} for key, each in double.items()}
    assert not list(make.differences(found, GOLDEN["outputs"][name]))
