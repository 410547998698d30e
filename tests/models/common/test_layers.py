"""Catches a building block that computes another thing than its formula: attention, a recomputed layer, a dropped branch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capfilt.models.common import layers as m

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.arange(5) < torch.tensor([5, 2, 4])[:, None]


def by_hand(attention, x, allowed):
    """Softmax attention, one query at a time. allowed: bool [B, L, L]."""
    batch, length, width = x.shape
    depth = width // attention.heads
    query, key, value = attention.qkv(x).view(batch, length, 3, attention.heads, depth).unbind(2)
    out = torch.zeros(batch, length, attention.heads, depth)
    for row in range(batch):
        for place in range(length):
            for head in range(attention.heads):
                scores = key[row, :, head] @ query[row, place, head] / math.sqrt(depth)
                weights = scores.masked_fill(~allowed[row, place], -math.inf).softmax(0)
                out[row, place, head] = weights @ value[row, :, head]
    return attention.proj(out.flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_attention_is_its_formula(causal):
    attention = m.FusedAttention(8, 2, causal)
    allowed = torch.ones(3, 5, 5, dtype=torch.bool)
    if causal:
        torch.testing.assert_close(attention(X), by_hand(attention, X, allowed.tril()))
        return
    torch.testing.assert_close(attention(X), by_hand(attention, X, allowed))
    masked = attention(X, MASK[:, None, None])
    torch.testing.assert_close(masked, by_hand(attention, X, MASK[:, None].expand(3, 5, 5)))
    torch.testing.assert_close(attention(X, MASK[:, None, None], first=True), masked[:, :1])


@torch.no_grad()
def test_a_block_adds_both_branches_to_what_it_was_given():
    block = m.PreNormBlock(8, 2, 16, activation="quick_gelu").eval()
    x = X + block.attn(block.norm1(X))
    inner = block.mlp.fc1(block.norm2(x))
    expected = x + block.mlp.fc2(inner * torch.sigmoid(1.702 * inner))
    torch.testing.assert_close(block(X), expected)
    torch.testing.assert_close(block(X, first=True), expected[:, :1])


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5))
@settings(max_examples=30)
def test_heads_are_split_and_merged_without_mixing(batch, length, heads, depth):
    x = torch.arange(batch * length * heads * depth, dtype=torch.float32).view(batch, length, heads * depth)
    apart = m.split_heads(x, heads)
    assert apart.shape == (batch, heads, length, depth)
    assert torch.equal(apart[:, 0], x[..., :depth])
    assert torch.equal(m.merge_heads(apart), x)


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.9])
def test_a_dropped_branch_is_dropped_whole_and_the_others_make_up_for_it(probability):
    torch.manual_seed(0)
    x = torch.ones(4000, 3, 2)
    drop = m.DropPath(probability)
    assert torch.equal(drop.eval()(x), x)
    out = drop.train()(x)
    values = out[:, 0, 0]
    assert torch.equal(out, values[:, None, None].expand_as(out))
    keep = 1.0 - probability
    assert ((values == 0) | torch.isclose(values, torch.tensor(1 / keep))).all()
    assert (values > 0).float().mean().item() == pytest.approx(keep, abs=0.04)


class Layer(nn.Module):
    """Dropout and batch normalisation: what a second pass could draw or move twice."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x)))


def test_a_recomputed_layer_has_the_same_gradients_draws_and_statistics():
    found = []
    for recompute in (False, True):
        torch.manual_seed(1)
        layer = Layer().train()
        x = X[0].clone().requires_grad_()
        torch.manual_seed(2)
        m.run_layer(layer, x, recompute=recompute).square().sum().backward()
        gradients = [x.grad, *(each.grad for each in layer.parameters())]
        found.append([*gradients, *(each.clone() for each in layer.buffers())])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert found[0][-1] == 1  # batches that were tracked


def test_statistics_are_kept_inside_whatever_happens_there():
    layer = Layer().train()
    assert set(m.running(layer)) == {"norm.running_mean", "norm.running_var"}
    assert m.running(layer.eval()) == {}
    layer.train()
    before = layer.norm.running_mean.clone()
    with pytest.raises(RuntimeError), m.statistics_kept(layer):
        nn.Sequential(layer, nn.Linear(7, 7))(X[0])  # of another width than the layer's
    assert torch.equal(layer.norm.running_mean, before)
    layer(X[0])
    assert not torch.equal(layer.norm.running_mean, before)


@pytest.mark.parametrize(("width", "std"), [(768, 0.02), (1024, 0.02), (192, 0.04), (48, 0.08)])
def test_narrow_layers_are_initialised_wider(width, std):
    assert m.init_std(width) == pytest.approx(std)


def test_initialisations_leave_biases_and_padding_at_zero():
    torch.manual_seed(0)
    module = nn.ModuleDict(
        {"linear": nn.Linear(50, 50), "words": m.blank_embedding(60, 50, 3), "norm": nn.LayerNorm(50)}
    )
    assert not module["words"].weight.any()
    m.init_normal(module, 0.1)
    assert not module["linear"].bias.any()
    assert not module["words"].weight[3].any()
    assert module["words"].weight[4].any()
    assert module["linear"].weight.std().item() == pytest.approx(0.1, rel=0.1)
    m.init_truncated(module, 0.5)
    assert (
        module["linear"].weight.abs().max() <= 2.0
    )  # the published bounds are -2 and 2, whatever the deviation
    assert module["linear"].weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_an_exact_layer_is_free_of_autocast():
    linear, x = nn.Linear(8, 2), X[:, 0]
    expected = linear(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x).dtype == torch.bfloat16
        assert torch.equal(m.exact(linear, x), expected)
        assert m.exact(linear, x.bfloat16()).dtype == torch.float32
