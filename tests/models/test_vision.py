"""Catches: a position embedding resized the wrong way round, uint8 and float pixels that disagree, drop-path at
inference or without rescaling, and cached trunk features that are not the pixels' own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from capfilt.models import build
from capfilt.models.blip.model import BlipConfig
from capfilt.models.common.layers import DropPath
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig, VisionTower, resize_position_embedding
from tests.refusals import refused


def tower(**fields) -> VisionTower:
    torch.manual_seed(0)
    return VisionTower(
        VisionConfig(
            **{"image_size": 32, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "hidden": 32, **fields}
        )
    ).eval()


@pytest.mark.parametrize("grid", [2, 4, 7])
def test_resizing_is_bicubic_on_the_grid_and_keeps_cls(grid):
    embedding = torch.randn(1, 1 + 16, 5)
    out = resize_position_embedding(embedding, grid)
    planes = embedding[0, 1:].T.reshape(1, 5, 4, 4)  # rows of the image first, as flatten(2) orders patches
    direct = F.interpolate(planes, (grid, grid), mode="bicubic", align_corners=False)[0]
    assert torch.equal(out[:, 0], embedding[:, 0])
    assert torch.allclose(out[0, 1:].T.reshape(5, grid, grid), direct, atol=1e-6)
    with refused("18 rows"):
        resize_position_embedding(torch.randn(1, 18, 5), 3)


def test_resized_model_takes_the_new_size():
    model = build(BlipConfig(vision=tower().config, text=TextConfig(20, 16, 1, 2, 32)))
    model.resize_image(64)
    assert model.encode_image(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 65, 16)
    assert model.config.image_size == 64
    assert model.visual_encoder.pos_embed.requires_grad


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_bytes_and_normalised_floats_are_the_same_image(stem):
    made = tower(stem=stem, width=32)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(1, 3, 1, 1)
    std = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(1, 3, 1, 1)
    tokens = made(pixels)
    assert tokens.shape == (2, 17, 32)
    assert torch.allclose(tokens, made((pixels / 255 - mean) / std), atol=1e-5)


def test_published_initialisation():
    made = tower(width=768, depth=1, heads=12, hidden=1024)
    assert 0.0195 < made.blocks[0].attn.qkv.weight.std() < 0.0205  # truncated normal 0.02 (DeiT)
    assert 0.019 < made.pos_embed.std() < 0.021
    assert made.blocks[0].attn.qkv.bias.abs().max() == 0
    assert {each.eps for each in made.modules() if isinstance(each, torch.nn.LayerNorm)} == {1e-6}


def test_drop_path_grows_with_depth_and_keeps_the_mean():
    rates = [block.drop_path.probability for block in tower(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    torch.manual_seed(0)
    layer, x = DropPath(0.25), torch.ones(8000, 2, 3)
    out = layer.train()(x)
    values = out.flatten(1)
    assert torch.equal(values.amin(1), values.amax(1))  # a sample's branch goes as a whole
    assert values.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert abs(out.mean() - 1) < 0.03
    assert layer.eval()(x) is x


def test_wrong_input_is_named():
    with refused("pixels", "[B, 3, S, S]"):
        tower()(torch.zeros(2, 36, 1280))
    with refused("vision.trunk"):
        tower().trunk_features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with refused("vision.stem", "patch_size", 12):
        tower(image_size=36, patch_size=12, stem="conv")
