"""Catches a skipped step that moves what stands beside the weights: statistics, queues, other buffers, extra state."""

from __future__ import annotations

import torch
from torch import nn

from capfilt.training.standing import Standing


class Counting(nn.Module):
    """A count that is neither parameter nor buffer."""

    def __init__(self):
        super().__init__()
        self.count = 0
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]

    def forward(self, x):
        self.count += 1
        self.seen += 1
        return x


def module():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Counting(), nn.Sequential(Counting()))


def state(found):
    return {
        name: each.clone() if isinstance(each, torch.Tensor) else each
        for name, each in found.state_dict().items()
    }


def test_everything_beside_the_weights_is_what_it_was():
    made = module().train()
    standing = Standing(made)
    made(torch.randn(4, 3))
    for _ in range(3):  # the same memory serves again
        standing.keep()
        before = state(made)
        made(torch.randn(4, 3))
        made(torch.randn(4, 3))
        assert any(
            not torch.equal(each, before[name]) for name, each in state(made).items() if "running" in name
        )
        standing.put_back()
        after = state(made)
        assert after.keys() == before.keys()
        for name, each in after.items():
            assert (
                torch.equal(each, before[name]) if isinstance(each, torch.Tensor) else each == before[name]
            ), name
        made(torch.randn(4, 3))  # a step that counts moves on from there
        assert made[2].count == before["2._extra_state"]["count"] + 1


def test_what_is_kept_is_a_copy_and_weights_are_left_alone():
    made = module().train()
    standing = Standing(made)
    standing.keep()
    with torch.no_grad():
        made[0].weight.fill_(7.0)
        made[1].running_mean.fill_(7.0)
    standing.put_back()
    assert (made[0].weight == 7.0).all()
    assert (made[1].running_mean == 0.0).all()


def test_a_module_with_nothing_beside_its_weights_costs_nothing():
    standing = Standing(nn.Linear(2, 2))
    standing.keep()
    standing.put_back()
