"""Catches an average that is lost, shared with the live weights, or left in the model after it was looked at. Its formula over
a run is `test_loop.py`'s."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from capfilt.training.average import WeightAverage, averaged, swapped


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()


def average_of(made, decay=0.9):
    return WeightAverage(averaged(made, dict(made.named_parameters())), decay)


@pytest.mark.parametrize(("done", "decay"), [(0, 1 / 10), (1, 2 / 11), (79, 80 / 89), (80, 0.9), (1000, 0.9)])
def test_one_update_is_its_formula(done, decay):
    made = model()
    average = average_of(made)
    before = {name: each.clone() for name, each in average.tensors.items()}
    with torch.no_grad():
        for each in average.live.values():
            each.add_(1.0)
    average.update(done)
    for name, each in average.tensors.items():
        torch.testing.assert_close(each, before[name] + (1 - decay), atol=1e-6, rtol=0)


def test_running_statistics_are_averaged_where_they_move():
    made = model()
    assert {name for name in average_of(made).tensors if "running" in name} == {
        "1.running_mean",
        "1.running_var",
    }
    assert not [name for name in average_of(made.eval()).tensors if "running" in name]


def test_half_precision_weights_have_an_average_in_full():
    made = model().to(torch.bfloat16)
    average = average_of(made, 0.999)
    assert {each.dtype for each in average.tensors.values()} == {torch.float32}


def test_the_model_has_its_own_weights_again_bit_for_bit_whatever_happens_inside():
    made = model()
    average = average_of(made)
    for each in average.tensors.values():
        each.fill_(0.5)
    before = {name: each.clone() for name, each in made.state_dict().items()}
    with swapped(made, average.tensors):
        assert all((made.state_dict()[name] == 0.5).all() for name in average.tensors)
    assert all(torch.equal(each, before[name]) for name, each in made.state_dict().items())
    with pytest.raises(RuntimeError), swapped(made, average.tensors):
        made(torch.zeros(2, 7))  # of another width than the model's
    assert all(torch.equal(each, before[name]) for name, each in made.state_dict().items())


def test_a_saved_average_is_taken_back_whole_or_not_at_all():
    made = model()
    one, other = average_of(made), average_of(made)
    saved = {name: each + 1 for name, each in one.tensors.items()}
    other.load(saved)
    assert all(torch.equal(each, saved[name]) for name, each in other.tensors.items())
    saved["0.weight"].zero_()
    assert not torch.equal(other.tensors["0.weight"], saved["0.weight"])  # a copy
    with pytest.raises(KeyError):
        other.load({name: each for name, each in saved.items() if name != "1.running_var"})
