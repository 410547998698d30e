"""Catches a ViLT that is not the published one: its layers, how it sees pictures of any size, what it must not see at all.

That its numbers are those of transformers' ViLT is `interop/test_vilt.py`'s.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from capfilt.models import build
from capfilt.models.common.layers import PreNormBlock, recompute_activations
from capfilt.models.vilt.model import Vilt, ViltConfig, ViltTextConfig, ViltVisionConfig
from tests.refusals import refused

CONFIG = ViltConfig(ViltVisionConfig(24, 8), ViltTextConfig(42, 12), 32, 2, 4, 64, dropout=0.0)
SIZES = ((3, 4), (2, 5), (3, 3))  # patches down and across


def widened(model):
    """Weights of the size that trained ones have, biases and norms too, so that no term hides behind another."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.3 + (1.0 if "orm" in name and name.endswith("weight") else 0.0)
    return model.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[2, 9, 11, 30, 3, 0], [2, 8, 3, 0, 0, 0], [2, 7, 17, 27, 37, 3]])
    return ids, ids > 0


def pictures(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels [3, 3, 24, 40] of three sizes, padded with zeros, and the mask of pixels."""
    generator = torch.Generator().manual_seed(seed)
    pixels, mask = torch.zeros(3, 3, 24, 40), torch.zeros(3, 24, 40, dtype=torch.bool)
    for row, (high, wide) in enumerate(SIZES):
        pixels[row, :, : 8 * high, : 8 * wide] = torch.randn(3, 8 * high, 8 * wide, generator=generator)
        mask[row, : 8 * high, : 8 * wide] = True
    return pixels, mask


def test_a_padded_picture_of_another_size_is_seen_as_it_is_alone():
    model = widened(build(CONFIG))
    (ids, mask), (pixels, there) = texts(), pictures()
    together = model.match_logits(model.fuse(ids, mask, model.encode_image(pixels, there)))
    by_patch = model.encode_image(pixels, there[:, ::8, ::8])
    torch.testing.assert_close(model.match_logits(model.fuse(ids, mask, by_patch)), together)
    for row, (high, wide) in enumerate(SIZES):
        length = int(mask[row].sum())
        image = model.encode_image(pixels[row : row + 1, :, : 8 * high, : 8 * wide])
        alone = model.match_logits(model.fuse(ids[row : row + 1, :length], None, image))
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_pooled_state_needs_no_other_state_of_the_last_block(recompute):
    """Would catch: a last block that drops what [CLS] attends to, or another token's residual."""
    model = widened(build(CONFIG)).train()
    recompute_activations(model, recompute)
    (ids, mask), (pixels, there) = texts(), pictures()
    found = []
    for first in (False, True):
        model.zero_grad()
        states = model.fuse(ids, mask, model.encode_image(pixels, there), first=first)
        logits = model.match_logits(states)
        logits[:, 1].sum().backward()
        assert states.text.shape[1] == (1 if first else ids.shape[1])
        found.append((logits.detach(), model.blocks[-1].attn.qkv.weight.grad.clone()))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)


def test_positions_are_interpolated_corner_to_corner():
    own = widened(build(CONFIG)).visual_encoder
    square = own.pos_embed[:, 1:].view(1, 3, 3, -1).permute(0, 3, 1, 2)
    high, wide = torch.tensor(SIZES).T
    found = own.positions(3, 5, high, wide)
    assert found.shape == (3, 16, 32)
    for row, size in enumerate(SIZES):
        expected = F.interpolate(square, size=size, mode="bilinear", align_corners=True)[0].permute(1, 2, 0)
        inside = found[row, 1:].view(3, 5, -1)[: size[0], : size[1]]
        torch.testing.assert_close(inside, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found[row, 0], own.pos_embed[0, 0])
    assert own.positions(3, 3) is own.pos_embed
    single = own.positions(1, 1)
    torch.testing.assert_close(single[0, 1], own.pos_embed[0, 1])


def test_a_drawn_share_of_patches_is_of_the_picture_and_each_is_as_likely():
    model = build(CONFIG)
    pixels, there = pictures()
    everything = model.encode_image(pixels, there)
    torch.manual_seed(0)
    drawn = [model.encode_image(pixels, there, limit=9) for _ in range(400)]
    counts = torch.zeros(3, 15)
    for tokens, mask in drawn:
        assert tokens.shape == (3, 10, 32)
        assert mask.all()
        for row in range(3):
            same = (tokens[row, 1:, None] == everything.tokens[row, None, 1:]).all(dim=2)
            assert same.any(dim=1).all()
            counts[row] += same.sum(dim=0)
    valid = everything.mask[:, 1:]
    assert not counts[~valid].any()
    expected = 400 * 9 / valid.sum(dim=1, keepdim=True)
    deviation = ((counts - expected).abs() * valid) / expected
    assert deviation.max() < 0.2
    few = model.encode_image(pixels, there, limit=11)
    assert few.mask[:, 1:].sum(dim=1).tolist() == [11, 10, 9]


def test_black_and_grey_pixels_are_no_padding_and_bytes_are_normalised_by_halves():
    model = build(CONFIG).eval()
    pixels = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    floats = (pixels.float() / 255 - 0.5) / 0.5
    torch.testing.assert_close(
        model.encode_image(pixels).tokens, model.encode_image(floats).tokens, atol=1e-5, rtol=1e-5
    )
    grey = model.encode_image(torch.zeros(1, 3, 24, 24))
    assert grey.mask is None
    with refused("[24, 30]", 8):
        model.encode_image(torch.zeros(1, 3, 24, 30))


def test_a_masked_key_is_as_good_as_absent():
    torch.manual_seed(0)
    block = PreNormBlock(16, 2, 32).eval()
    x, mask = torch.randn(2, 5, 16), torch.tensor([[1, 1, 1, 0, 0], [1, 0, 1, 1, 1]], dtype=torch.bool)
    found = block(x, mask[:, None, None, :])
    for row in range(2):
        torch.testing.assert_close(found[row][mask[row]], block(x[row][mask[row]][None])[0])
    torch.testing.assert_close(block(x, torch.ones(2, 1, 1, 5, dtype=torch.bool)), block(x))


def test_dropout_is_in_every_place_and_only_in_training():
    model = build(dataclasses.replace(CONFIG, dropout=0.5))
    rates = {name: each.p for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout)}
    assert set(rates.values()) == {0.5}
    assert len(rates) == 2 + 2 * CONFIG.depth  # texts, pictures; both branches of a block, and inside its MLP
    ids, mask = texts()
    pixels = torch.randn(3, 3, 24, 24)

    def logits() -> torch.Tensor:
        return model.match_logits(model.fuse(ids, mask, model.encode_image(pixels)))

    assert not torch.equal(logits(), logits())
    model.eval()
    torch.testing.assert_close(logits(), logits())


def test_another_square_is_what_interpolating_each_time_gives():
    model = widened(build(CONFIG))
    pixels = torch.randn(2, 3, 40, 40)
    before = model.encode_image(pixels).tokens
    model.resize_image(40)
    assert (model.config.image_size, model.visual_encoder.pos_embed.shape[1]) == (40, 26)
    torch.testing.assert_close(model.encode_image(pixels).tokens, before)


def test_recomputing_changes_no_gradient():
    ids, mask = texts()
    pixels = torch.randn(3, 3, 24, 24)
    gradients = []
    for recompute in (False, True):
        model = build(CONFIG, seed=2)
        recompute_activations(model, recompute)
        model.match_logits(model.fuse(ids, mask, model.encode_image(pixels))).sum().backward()
        gradients.append(model.blocks[0].attn.qkv.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "width 30"),
        ({"has": "itm"}, "has itm"),
        ({"vision": {"image_size": 20, "patch_size": 8}}, "vision.image_size 20"),
        ({"depth": "2"}, "depth"),
    ],
)
def test_shapes_that_cannot_be_are_named(changes, message):
    with refused(message):
        ViltConfig.from_dict({**CONFIG.to_dict(), **changes})


def test_a_missing_head_is_named():
    words = Vilt(dataclasses.replace(CONFIG, has="words"))
    words.require("words")
    with refused("ViLT", "matches"):
        words.require("match")
