"""Catches a bias that goes to another pair of patches, above all on grids that are no squares, and a table that a resize bends.

The numbers of the original code are read where they are beside the repository; their README says how they were made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from capfilt.models.common import relative
from capfilt.models.common.layers import PreNormBlock, run_layer
from capfilt.models.common.relative import RelativePositionBias, grid_index, offsets, resized_table

GOLDEN = Path(__file__).resolve().parents[4] / "shared" / "golden"
CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SIDE = st.integers(1, 5)
golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="the original code's numbers are not beside this repository"
)


def section(file: str, name: str, part: str) -> dict[str, torch.Tensor]:
    prefix = f"{name}/{part}/"
    return {k.removeprefix(prefix): v for k, v in load_file(GOLDEN / file).items() if k.startswith(prefix)}


@given(SIDE, SIDE)
def test_the_bias_of_two_patches_depends_on_their_difference_alone(height, width):
    """By hand, a pair at a time: the published row of every difference, and three rows for [CLS]."""
    made = RelativePositionBias((height, width), 2)
    with torch.no_grad():
        made.relative_position_bias_table.copy_(torch.randn(offsets((height, width)) + 3, 2))
    table = made.relative_position_bias_table
    bias = made()
    places = [(y, x) for y in range(height) for x in range(width)]
    assert bias.shape == (1, 2, len(places) + 1, len(places) + 1)
    for query, (y, x) in enumerate(places, 1):
        for key, (v, u) in enumerate(places, 1):
            row = (y - v + height - 1) * (2 * width - 1) + x - u + width - 1
            assert torch.equal(bias[0, :, query, key], table[row])
        assert torch.equal(bias[0, :, 0, query], table[-3])
        assert torch.equal(bias[0, :, query, 0], table[-2])
    assert torch.equal(bias[0, :, 0, 0], table[-1])


@settings(max_examples=25)
@given(SIDE, SIDE, SIDE, SIDE)
def test_a_resized_table_has_what_must_not_depend_on_the_way(height, width, rows, columns):
    """Properties: the rows of [CLS] stay, constants stay, sides are independent, mirrored tables are mirrored."""
    old, new = (height, width), (rows, columns)
    table = torch.randn(offsets(old) + 3, 2, generator=torch.Generator().manual_seed(height + 7 * width))
    made = resized_table(table, old, new)
    assert made.shape == (offsets(new) + 3, 2)
    assert torch.equal(made[-3:], table[-3:])
    assert torch.equal(resized_table(table, old, old), table)
    ones = torch.ones_like(table)
    torch.testing.assert_close(resized_table(ones, old, new), ones[:1].expand_as(made))

    def mirrored(x):
        return torch.cat([x[:-3].flip(0), x[-3:]])

    def turned(x, grid):
        square = x[:-3].view(2 * grid[0] - 1, 2 * grid[1] - 1, 2).transpose(0, 1)
        return torch.cat([square.reshape(-1, 2), x[-3:]])

    torch.testing.assert_close(resized_table(mirrored(table), old, new), mirrored(made), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(resized_table(turned(table, old), old[::-1], new[::-1]), turned(made, new))
    if rows >= height and columns >= width and min(height, width) > 1:
        # The bias of two patches that touch stays: differences of 0 and 1 are where they were.
        near, nearer = (
            x[:-3].view(2 * g[0] - 1, 2 * g[1] - 1, 2)[g[0] - 2 : g[0] + 1, g[1] - 2 : g[1] + 1]
            for x, g in ((table, old), (made, new))
        )
        torch.testing.assert_close(near, nearer, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_resized_module_takes_the_new_grid():
    made, block = RelativePositionBias((2, 3), 2), PreNormBlock(8, 2, 16, grid=(2, 3))
    for each in (made, block.attn):
        each.relative_position_bias_table.normal_()
        each.resize((4, 3))
        assert each.relative_bias().shape == (1, 2, 13, 13)
    assert block(torch.randn(2, 13, 8)).shape == (2, 13, 8)
    plain = PreNormBlock(8, 2, 16)
    plain.attn.resize((4, 3))
    assert not [name for name in plain.state_dict() if "relative" in name]
    with torch.device("meta"):
        blank = RelativePositionBias((2, 2), 2)
    blank.load_state_dict(RelativePositionBias((2, 2), 2).state_dict(), assign=True)
    assert blank().shape == (1, 2, 5, 5)  # no buffer is left on the meta device


def test_a_table_of_its_own_and_a_shared_bias_are_added():
    torch.manual_seed(0)
    own, plain = PreNormBlock(8, 2, 16, grid=(2, 2)), PreNormBlock(8, 2, 16)
    nn.init.normal_(own.attn.relative_position_bias_table)
    plain.load_state_dict(own.state_dict(), strict=False)
    x, shared = torch.randn(3, 5, 8), torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(own(x), plain(x, bias=own.attn.relative_bias()))
    torch.testing.assert_close(own(x, bias=shared), plain(x, bias=shared + own.attn.relative_bias()))
    run_layer(own, x, recompute=True).square().sum().backward()
    assert own.attn.relative_position_bias_table.grad.abs().sum() > 0


# ------------------------------------------------------------------ the original code's numbers


def block_of(weights, index, **options) -> PreNormBlock:
    """BEiT's block: queries and values have a bias, keys have none."""
    prefix = f"blocks.{index}."
    state = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    query, value = state.pop("attn.q_bias"), state.pop("attn.v_bias")
    state["attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    block = PreNormBlock(32, 4, 128, layer_scale=0.1, **options)
    block.load_state_dict(state)
    return block


def tokens_of(weights, images, mask=None):
    x = F.conv2d(images, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    if mask is not None:
        x = torch.where(mask[..., None].bool(), weights["mask_token"], x)
    return torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], dim=1)


@golden
@pytest.mark.parametrize(("name", "grid"), [("square", (4, 4)), ("wide", (3, 5))])
def test_a_shared_table_is_beits(name, grid):
    weights, given_, want = (section("beit.safetensors", name, part) for part in ("weights", "in", "out"))
    assert torch.equal(grid_index(grid, CPU), want["relative_position_index"])
    shared = RelativePositionBias(grid, 4)
    shared.load_state_dict(
        {"relative_position_bias_table": weights["rel_pos_bias.relative_position_bias_table"]}
    )
    torch.testing.assert_close(shared()[0], want["relative_position_bias"], **CLOSE)
    blocks = [block_of(weights, index) for index in range(3)]
    x, bias = tokens_of(weights, given_["image"], given_["mask"]), shared()
    for index, block in enumerate(blocks):
        x = block(x, bias=bias)
        torch.testing.assert_close(x, want[f"block{index}"], **CLOSE)
    x = F.layer_norm(x, (32,), weights["norm.weight"], weights["norm.bias"], 1e-6)
    logits = F.linear(x[:, 1:][given_["mask"].bool()], weights["lm_head.weight"], weights["lm_head.bias"])
    loss = F.cross_entropy(logits, want["labels"])
    torch.testing.assert_close(loss, want["loss"], **CLOSE)
    loss.backward()
    table, gamma = shared.relative_position_bias_table.grad, blocks[0].gamma_1.grad
    torch.testing.assert_close(table, want["grad/rel_pos_bias.relative_position_bias_table"], **CLOSE)
    torch.testing.assert_close(gamma, want["grad/blocks.0.gamma_1"], **CLOSE)


@golden
@torch.no_grad()
def test_a_table_in_every_block_is_beits():
    weights, given_, want = (
        section("beit.safetensors", "finetune_mean", part) for part in ("weights", "in", "out")
    )
    x = tokens_of(weights, given_["image"])
    for index in range(2):
        x = block_of(weights, index, grid=(4, 4))(x)
    pooled = F.layer_norm(x[:, 1:].mean(1), (32,), weights["fc_norm.weight"], weights["fc_norm.bias"], 1e-6)
    torch.testing.assert_close(pooled, want["pooled"], **CLOSE)
    logits = F.linear(pooled, weights["head.weight"], weights["head.bias"])
    torch.testing.assert_close(logits, want["logits"], **CLOSE)


@golden
def test_a_table_is_resized_as_released():
    table = section("vlmo.safetensors", "base", "weights")["relative_position_bias_table"]
    want = section("vlmo.safetensors", "resize", "out")
    found = resized_table(table, (4, 4), (5, 5))
    torch.testing.assert_close(found, want["base/relative_position_bias_table"], **CLOSE)
    patches = want["base/relative_position_index"]
    assert torch.equal(grid_index((5, 5), CPU), patches)


@pytest.mark.parametrize("count", [3, 4, 5, 9, 27])
def test_the_spline_is_scipys(count):
    """Would catch: another end condition, which only the outermost differences of a table would show."""
    interpolate = pytest.importorskip("scipy.interpolate")
    rng = np.random.default_rng(count)
    x = np.sort(rng.uniform(-5, 5, count))
    y, at = rng.normal(size=(count, 2)), np.linspace(x[0], x[-1], 40)
    wanted = interpolate.make_interp_spline(x, y, k=min(3, count - 1))(at)
    np.testing.assert_allclose(relative._spline(x, y, at), wanted, rtol=1e-7, atol=1e-8)
