"""Bugs caught here: weight decay on biases, LayerNorms or the temperature; clipping that reports the norm after itself or
touches small gradients.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from capfilt.training import optim
from tests.refusals import refused


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.twin = self.linear
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_decay():
    parameters = optim.trainable(Small())
    assert set(parameters) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias", "temperature"}
    decayed = optim.AdamW(parameters, weight_decay=0.05).weight_decay
    assert {name for name, rate in decayed.items() if rate} == {"linear.weight"}
    assert set(optim.AdamW(parameters, weight_decay=0.05, decay="all").weight_decay.values()) == {0.05}
    with refused("decay"):
        optim.AdamW(parameters, decay="biases")


def test_nothing_to_train_is_said():
    module = nn.Linear(2, 2).requires_grad_(False)
    with refused("frozen"):
        optim.trainable(module)


def test_adamw_step_by_hand():
    weight = nn.Parameter(torch.tensor([[2.0]]))
    optimizer = optim.AdamW({"weight": weight}, weight_decay=0.5)
    weight.grad = torch.tensor([[3.0]])
    optimizer.step(0.1)
    # Decay first, 2 * (1 - 0.1 * 0.5); then a first Adam step of the learning rate in the gradient's direction.
    assert weight.item() == pytest.approx(1.9 - 0.1, abs=1e-6)
    optimizer.zero_grad()
    assert weight.grad is None


def test_a_factor_makes_the_steps_of_its_parameters_longer_and_of_no_others():
    weights = {name: torch.ones(2, 2).requires_grad_() for name in ("body", "head", "frozen")}
    optimizer = optim.AdamW(weights, weight_decay=0.0, factors={"head": 10.0})
    for name in ("body", "head"):
        weights[name].grad = torch.ones(2, 2)
    optimizer.step(1e-3)
    torch.testing.assert_close(1 - weights["head"].detach(), 10 * (1 - weights["body"].detach()))
    assert (weights["body"] < 1).all()
    assert (weights["frozen"] == 1).all()


def test_what_is_loaded_is_copied():
    """A state that goes on changing with the run that was continued from it."""
    weight = nn.Parameter(torch.ones(2, 2))
    first, second = (optim.AdamW({"weight": weight}) for _ in range(2))
    weight.grad = torch.ones(2, 2)
    first.step(0.1)
    before = {name: each.clone() for name, each in first.state_dict().items()}
    second.load_state_dict(first.state_dict())
    second.step(0.1)
    for name, each in first.state_dict().items():
        assert torch.equal(each, before[name]), name
        assert not torch.equal(second.state_dict()[name], each), name


def test_adamw_by_the_paper():
    """Against the algorithm in Python floats (arXiv 1711.05101, algorithm 2); a parameter without a gradient is neither
    moved nor decayed, and its first step is its own.
    """
    weight, late = nn.Parameter(torch.tensor([[2.0]])), nn.Parameter(torch.tensor([[-1.0]]))
    optimizer = optim.AdamW({"weight": weight, "late": late}, betas=(0.8, 0.95), weight_decay=0.3)
    by_hand = {"weight": [2.0, 0.0, 0.0, 0], "late": [-1.0, 0.0, 0.0, 0]}
    for step in range(6):
        rate = 0.1 / (step + 1)
        for name, parameter in (("weight", weight), ("late", late)):
            parameter.grad = None
            if name == "late" and step < 3:
                continue
            gradient = math.sin(3.0 * step + len(name))
            parameter.grad = torch.tensor([[gradient]])
            value, first, second, count = by_hand[name]
            count += 1
            first, second = 0.8 * first + 0.2 * gradient, 0.95 * second + 0.05 * gradient**2
            value -= rate * 0.3 * value
            value -= rate * (first / (1 - 0.8**count)) / (math.sqrt(second / (1 - 0.95**count)) + 1e-8)
            by_hand[name] = [value, first, second, count]
        optimizer.step(rate)
        assert weight.item() == pytest.approx(by_hand["weight"][0], abs=1e-5)
        assert late.item() == pytest.approx(by_hand["late"][0], abs=1e-5)


def test_clipping():
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert optim.clip_gradients(parameters, 10.0).item() == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == [3.0, 0.0]
    assert optim.clip_gradients(parameters, 0.0).item() == pytest.approx(5.0)
    assert parameters[1].grad.tolist() == [4.0]
    assert optim.clip_gradients(parameters, 1.0).item() == pytest.approx(5.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.6, 0.0], abs=1e-5)
    parameters[0].grad = torch.tensor([math.nan, 1.0])
    assert math.isnan(optim.clip_gradients(parameters, 1.0).item())
