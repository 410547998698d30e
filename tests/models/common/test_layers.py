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


def biased_by_hand(query, keys, values, allowed, bias):
    """softmax(q k / sqrt(d) + bias) v in fp64; of a query that is allowed nothing, zeros."""
    logits = query.double() @ keys.double().transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias.double()
    logits = logits.masked_fill(~allowed, -math.inf)
    return logits.softmax(-1).nan_to_num() @ values.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grads", [False, True])  # bf16 takes another kernel where it has gradients
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_a_bias_is_added_to_the_logits_whatever_kernel_runs(dtype, grads, causal, masked, shared):
    """Catches a bias of another batch, head or place, and one that is lost beside a mask or the past."""
    torch.manual_seed(0)
    query, keys, values = (torch.randn(3, 2, 5, 8).to(dtype).requires_grad_(grads) for _ in range(3))
    bias = torch.randn(1 if shared else 3, 2, 5, 5, requires_grad=grads)
    allowed = torch.ones(3, 1, 5, 5, dtype=torch.bool)
    mask = MASK[:, None, None] if masked else None
    allowed = allowed & mask if masked else allowed
    allowed = allowed.tril() if causal else allowed
    with torch.set_grad_enabled(grads):
        got = m.attention(query, keys, values, attn_mask=mask, is_causal=causal, bias=bias)
        want = biased_by_hand(query, keys, values, allowed, bias)
    assert got.dtype == dtype
    close = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(got.double(), want, **close)
    if grads:
        inputs = (query, keys, values, bias)
        for one, other in zip(
            torch.autograd.grad(got.float().square().sum(), inputs),
            torch.autograd.grad(want.square().sum(), inputs),
            strict=True,
        ):
            torch.testing.assert_close(one.float(), other.float(), atol=close["atol"] * 5, rtol=close["rtol"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [-1e4, -1e8, -math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_large_negative_bias_forbids_and_never_gives_nan(dtype, value, everywhere):
    """Catches a bias of -1e8 that is infinite in fp16: a query all of whose keys have it would be NaN."""
    query, keys, values = (torch.randn(2, 2, 3, 8).to(dtype) for _ in range(3))
    bias = torch.zeros(1, 2, 3, 3)
    bias[..., 1:] = value
    if everywhere:
        bias[..., 0] = value
    found = m.attention(query, keys, values, bias=bias)
    assert found.isfinite().all()
    if not everywhere:
        torch.testing.assert_close(found, values[:, :, :1].expand_as(found))


def test_attention_without_a_bias_runs_nothing_more():
    """Catches a bias of zeros, or a mask, that every model would pay for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorded(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names.append(str(function))
            return function(*args, **(kwargs or {}))

    query, keys, values = (torch.randn(2, 2, 3, 8) for _ in range(3))
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.ones(2, 1, 1, 3, dtype=torch.bool)}):
        with Recorded() as plain:
            want = nn.functional.scaled_dot_product_attention(query, keys, values, **options)
        with Recorded() as ours:
            got = m.attention(query, keys, values, **options)
        assert torch.equal(got, want)
        assert ours.names == plain.names
    block = m.PreNormBlock(8, 2, 16)
    assert not [name for name in block.state_dict() if "gamma" in name]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
@torch.no_grad()
def test_a_block_gives_its_attention_the_bias(causal, rows):
    torch.manual_seed(0)
    block = m.PreNormBlock(8, 2, 16, causal=causal).eval()
    bias = torch.randn(rows, 2, 5, 5)
    whole = block(X, MASK[:, None, None], bias=bias)
    x = block.norm1(X)
    query, keys, values = block.attn.qkv(x).view(3, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    allowed = MASK[:, None, None].expand(3, 1, 5, 5)
    seen = biased_by_hand(query, keys, values, allowed.tril() if causal else allowed, bias).float()
    x = X + block.attn.proj(m.merge_heads(seen))
    torch.testing.assert_close(whole, x + block.mlp(block.norm2(x)))
    torch.testing.assert_close(block(X, MASK[:, None, None], True, bias), whole[:, :1])
    recomputed = m.run_layer(block, X, MASK[:, None, None], False, bias, recompute=True)
    assert torch.equal(recomputed, whole)


def test_a_scaled_block_adds_its_branches_times_their_factors():
    """Catches a factor that is missing in the state, has another start, or scales what is not the branch."""
    torch.manual_seed(0)
    block = m.PreNormBlock(8, 2, 16, layer_scale=0.1).eval()
    state = block.state_dict()
    assert {name: tensor.tolist() for name, tensor in state.items() if "gamma" in name} == {
        "gamma_1": [pytest.approx(0.1)] * 8,
        "gamma_2": [pytest.approx(0.1)] * 8,
    }
    with torch.no_grad():
        block.gamma_1.copy_(torch.randn(8))
        block.gamma_2.copy_(torch.randn(8))
    x = X + block.gamma_1 * block.attn(block.norm1(X))
    want = x + block.gamma_2 * block.mlp(block.norm2(x))
    torch.testing.assert_close(block(X), want)
    torch.testing.assert_close(block(X, first=True), want[:, :1])
    block(X).sum().backward()
    assert block.gamma_1.grad.abs().sum() > 0
    assert block.gamma_2.grad.abs().sum() > 0
    # Drop path stays: a sample whose branches are both dropped is as it was.
    dropping = m.PreNormBlock(8, 2, 16, drop_path=0.5, layer_scale=0.1).train()
    torch.manual_seed(1)
    many = X[:1].expand(64, 5, 8)
    unchanged = (dropping(many) == many).flatten(1).all(1)
    assert 4 <= unchanged.sum() <= 32


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 5), st.sampled_from([(8, 8), (8, 12), (16, 6)]))
@settings(max_examples=20)
def test_pooling_with_queries_is_its_formula(batch, length, queries, widths):
    """Catches a norm on the wrong side, a residual, a head that is split otherwise, and keys of the queries' width."""
    torch.manual_seed(0)
    width, source = widths
    pooling = m.QueryPooling(width, source, queries, 2)
    state = {name: torch.randn_like(each) for name, each in pooling.state_dict().items()}
    pooling.load_state_dict(state)
    tokens = torch.randn(batch, length, source)

    def normed(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    if width == source:
        weights = state["attn.in_proj_weight"].chunk(3)
    else:
        weights = [state[f"attn.{name}_proj_weight"] for name in "qkv"]
    bias = state["attn.in_proj_bias"].chunk(3)
    read = normed(tokens, "ln_k")
    inputs = (normed(state["query"], "ln_q").expand(batch, -1, -1), read, read)
    query, keys, values = (
        (x @ weight.T + b).unflatten(-1, (2, width // 2)).transpose(1, 2)
        for x, weight, b in zip(inputs, weights, bias, strict=True)
    )
    shares = (query @ keys.transpose(-1, -2) / math.sqrt(width // 2)).softmax(-1)
    want = (shares @ values).transpose(1, 2).flatten(2) @ state["attn.out_proj.weight"].T
    want = want + state["attn.out_proj.bias"]
    torch.testing.assert_close(pooling(tokens), want, atol=1e-4, rtol=1e-4)


def test_pooling_has_the_released_names():
    names = {"query", "ln_q.weight", "ln_q.bias", "ln_k.weight", "ln_k.bias"}
    names |= {"attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}
    apart = {"attn.q_proj_weight", "attn.k_proj_weight", "attn.v_proj_weight"}
    assert set(m.QueryPooling(8, 8, 3, 2).state_dict()) == names | {"attn.in_proj_weight"}
    assert set(m.QueryPooling(8, 12, 3, 2).state_dict()) == names | apart
