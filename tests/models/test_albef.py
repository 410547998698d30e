"""Catches an ALBEF that looks at the image too early, reads the tokenizer's [SEP], is of another size than the published one,
or whose short ways (states and keys that are used again, position 0 alone) give other numbers than the long ones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from capfilt.data.tokenizer import ADDED
from capfilt.errors import UserError
from capfilt.models import build, preset
from capfilt.models.albef.model import PRESETS as ALBEF
from capfilt.models.albef.model import Albef, AlbefConfig, without_end
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.models.rows import rows

MICRO_ALBEF = AlbefConfig(
    vision=VisionConfig(16, 8, width=32, depth=1, heads=2, hidden=64),
    text=TextConfig(38, 32, 4, 2, 64, max_positions=16, dropout=0.0, attention_dropout=0.0),
    embed_dim=16,
)


@pytest.fixture
def model():
    made = build(MICRO_ALBEF).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, each in made.named_parameters():
            if name != "temperature":
                each.copy_(torch.randn(each.shape, generator=generator) * 0.2)
    return made


def texts(count=6):
    batch = rows(count)
    return batch.pixels, *without_end(batch.ids, batch.mask)


def test_the_published_size():
    # ALBEF, sec. 4: BERT with 123.7M parameters, its language head and token types (folded into the positions here) counted,
    # and ViT-B/16 with 85.8M.
    with torch.device("meta"):
        base = Albef(ALBEF["base"])
    counts = {
        name: sum(each.numel() for each in getattr(base, name).parameters())
        for name in ("visual_encoder", "text_encoder", "mlm_head")
    }
    assert counts["visual_encoder"] == pytest.approx(85.8e6, abs=5e4)
    assert counts["text_encoder"] + counts["mlm_head"] + 2 * 768 == pytest.approx(123.7e6, abs=5e4)
    assert base.config.vocab_size == 30522 + len(ADDED)


def test_every_preset_can_be_built_and_written_down():
    for name in ALBEF:
        config = preset("albef", name, 1000)
        assert AlbefConfig.from_dict(config.to_dict()) == config
        with torch.device("meta"):
            assert Albef(config).config.vocab_size == 1000
    with pytest.raises(UserError, match="tiny, small, trunk, base"):
        preset("albef", "huge", 1000)


def test_only_the_second_half_has_and_uses_cross_attention(model):
    having = [layer.crossattention is not None for layer in model.text_encoder.layers]
    assert having == [False, False, True, True]
    pixels, ids, mask = texts()
    cross = model.prefill_cross(model.encode_image(pixels))
    assert len(cross) == 2
    states = model.encode_text(ids, mask)
    whole = model.text_encoder(ids, mask, cross)
    assert torch.allclose(model.fuse(states, mask, cross), whole, atol=1e-6)
    # What the text side makes of a text alone is no matter of images; what it makes of it afterwards is.
    other = model.prefill_cross(model.encode_image(pixels.flip(0)))
    assert not torch.allclose(model.fuse(states, mask, other), whole, atol=1e-2)


def test_the_short_ways_are_the_long_ones(model):
    pixels, ids, mask = texts()
    tokens = model.encode_image(pixels)
    states = model.encode_text(ids, mask)
    assert torch.allclose(model.embed_text(ids, mask), model.embed_states(states), atol=1e-6)
    fused = model.fuse(states, mask, model.prefill_cross(tokens))
    logits = fused[:, 0] @ model.itm_head.weight.T + model.itm_head.bias
    assert torch.allclose(model.match_logits(ids, mask, tokens), logits, atol=1e-5)
    where = torch.zeros_like(mask)
    where[0, 3] = where[2, 1] = True
    some = model.mlm_logits(ids, mask, model.prefill_cross(tokens), where)
    everything = model.mlm_logits(ids, mask, model.prefill_cross(tokens))
    assert torch.allclose(some, everything[where], atol=1e-5)
    assert everything.shape == (*ids.shape, 38)


def test_texts_lose_their_end_and_nothing_else(model):
    """A [SEP] that is read shifts every number of the released checkpoints; padding must not matter."""
    ids = torch.tensor([[2, 7, 8, 3, 0, 0], [2, 9, 10, 11, 12, 3]])
    short, mask = without_end(ids, ids != 0)
    assert [row[keep].tolist() for row, keep in zip(short, mask, strict=True)] == [
        [2, 7, 8],
        [2, 9, 10, 11, 12],
    ]
    alone, _ = without_end(ids[:1, :4], None)
    assert torch.allclose(model.embed_text(short, mask)[0], model.embed_text(alone)[0], atol=1e-6)


def test_another_image_size_keeps_everything_but_the_positions(model):
    before = {name: each.clone() for name, each in model.state_dict().items()}
    model.resize_image(32)
    assert model.config.image_size == model.visual_encoder.config.image_size == 32
    changed = [
        name
        for name, each in model.state_dict().items()
        if each.shape != before[name].shape or not torch.equal(each, before[name])
    ]
    assert changed == ["visual_encoder.pos_embed"]
    assert model.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape == (1, 17, 32)


def test_recomputed_activations_change_no_gradient():
    found = []
    for on in (False, True):
        made = build(
            dataclasses.replace(
                MICRO_ALBEF, text=dataclasses.replace(MICRO_ALBEF.text, dropout=0.3, attention_dropout=0.3)
            )
        ).train()
        recompute_activations(made, on)
        torch.manual_seed(5)
        pixels, ids, mask = texts()
        made.match_logits(ids, mask, made.encode_image(pixels)).square().sum().backward()
        found.append({name: each.grad for name, each in made.named_parameters() if each.grad is not None})
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], atol=1e-6), name
