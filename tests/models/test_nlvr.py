"""Catches: a second image that is never looked at, merging that averages where it should concatenate or adds an
activation, twin projections that start apart, a head fed another position, padding that changes the answer, a start that
leaves a pretrained tensor behind without a word.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from capfilt.models import build
from capfilt.models.blip.model import BlipConfig
from capfilt.models.blip.tasks import NlvrConfig, nlvr_from_blip, vqa_from_blip
from capfilt.models.common.layers import recompute_activations
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.common.weights import start_from
from tests.models.interop.reference import loud
from tests.refusals import refused

VISION = VisionConfig(16, 8, 24, 1, 2, 48)
TEXT = TextConfig(30, 16, 4, 2, 40, max_positions=12)
CONFIG = NlvrConfig(VISION, TEXT)
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0], [2, 5, 6, 3, 0]])
MASK = IDS != 0


@pytest.fixture
def model():
    return loud(build(CONFIG))


def pictures(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 2, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-12).sqrt()
    return centred / scale * state[f"{name}.weight"] + state[f"{name}.bias"]


def attention(state, name, x, source, heads=2):
    """One sentence [L, D] over [N, S], a head and a query at a time."""
    query = linear(state, f"{name}.query", x)
    key, value = (linear(state, f"{name}.{part}", source) for part in ("key", "value"))
    size = query.shape[1] // heads
    out = torch.zeros_like(query)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(query)):
            scores = key[:, part] @ query[row, part] / math.sqrt(size)
            weights = (scores - scores.max()).exp()
            out[row, part] = (weights / weights.sum()) @ value[:, part]
    return out


def by_hand(model, ids, first, second):
    """Logits [2] of one sentence without padding, from image tokens [N, S]: the published description, read aloud."""
    state, depth = model.state_dict(), model.config.text.depth
    ids = [29, *ids[1:]]  # [ENC] first
    words = state["text_encoder.embeddings.word_embeddings.weight"][ids]
    x = words + state["text_encoder.embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(state, "text_encoder.embeddings.LayerNorm", x)
    for index in range(depth):
        at = f"text_encoder.encoder.layer.{index}"
        own = attention(state, f"{at}.attention.self", x, x)
        own = linear(state, f"{at}.attention.output.dense", own)
        x = norm(state, f"{at}.attention.output.LayerNorm", own + x)
        cross = f"{at}.crossattention"
        seen = [
            linear(state, f"{cross}.output.dense{side}", attention(state, f"{cross}.self{side}", x, image))
            for side, image in enumerate((first, second))
        ]
        if index < depth / 2:
            both = (seen[0] + seen[1]) / 2
        else:
            both = linear(state, f"{cross}.output.merge_layer", torch.cat(seen, dim=1))
        x = norm(state, f"{cross}.output.LayerNorm", both + x)
        wide = linear(state, f"{at}.intermediate.dense", x)
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        x = norm(state, f"{at}.output.LayerNorm", linear(state, f"{at}.output.dense", wide) + x)
    hidden = linear(state, "cls_head.0", x[0]).clamp(min=0)
    return linear(state, "cls_head.2", hidden)


@torch.no_grad()
def test_the_model_is_its_description(model):
    pairs = pictures()
    tokens = model.encode_image(torch.cat([pairs[:, 0], pairs[:, 1]]))
    found = model.truth_logits(IDS, MASK, tokens)
    for row, length in enumerate(MASK.sum(1).tolist()):
        expected = by_hand(model, IDS[row, :length].tolist(), tokens[row], tokens[3 + row])
        assert torch.allclose(found[row], expected, atol=1e-5), row
    assert torch.allclose(model.judge(IDS, MASK, pairs), found)


def test_merging_layers_are_in_the_second_half_of_the_published_depth():
    with torch.device("meta"):
        published = build(NlvrConfig())
    merged = [layer.crossattention.output.merge_layer for layer in published.text_encoder.layers]
    assert [each is not None for each in merged] == [False] * 6 + [True] * 6
    assert tuple(merged[6].weight.shape) == (768, 1536)


@torch.no_grad()
def test_each_image_counts_and_its_side_too(model):
    pairs, swapped = pictures(), pictures().flip(1)
    plain = model.judge(IDS, MASK, pairs)
    assert not torch.allclose(plain, model.judge(IDS, MASK, swapped), atol=1e-3)
    for side in (0, 1):
        other = pairs.clone()
        other[:, side] += 1
        assert not torch.allclose(plain, model.judge(IDS, MASK, other), atol=1e-3), side


@pytest.mark.parametrize("half", ["both", "filter"])
@torch.no_grad()
def test_it_starts_from_a_blip_with_both_sides_alike(half):
    blip = loud(build(BlipConfig(VISION, TEXT, half=half)), 3)
    model = nlvr_from_blip(blip, drop_path=0.0).eval()
    assert model.config == NlvrConfig(VISION, TEXT)
    theirs = blip.state_dict()
    for index, layer in enumerate(model.text_encoder.layers):
        cross = layer.crossattention
        at = f"text_encoder.encoder.layer.{index}.crossattention"
        for part in ("query", "key", "value"):
            for twin in (cross.self0, cross.self1):
                assert torch.equal(getattr(twin, part).weight, theirs[f"{at}.self.{part}.weight"])
        for twin in (cross.output.dense0, cross.output.dense1):
            assert torch.equal(twin.weight, theirs[f"{at}.output.dense.weight"])
        assert cross.self0.key.weight.data_ptr() != cross.self1.key.weight.data_ptr(), (
            "copies, not one tensor"
        )
    # With the same picture twice, averaging layers are the pretrained ones: the encoders must agree until they merge.
    image = pictures()[:, 0]
    tokens = blip.encode_image(image)
    for encoder, given in ((blip.text_encoder, tokens), (model.text_encoder, torch.cat([tokens, tokens]))):
        x = encoder.embeddings(IDS, 0)
        for layer, pair in list(zip(encoder.layers, encoder.cross_keys_values(given), strict=True))[:2]:
            x = layer(x, MASK[:, None, None, :], pair, None, None, 0, False)
        if encoder is blip.text_encoder:
            expected = x
    assert torch.allclose(x, expected, atol=1e-5)


def test_a_captioner_is_no_start():
    with refused("captioner", "filter"):
        nlvr_from_blip(build(BlipConfig(VISION, TEXT, half="captioner")))
    for half in ("captioner", "filter"):
        with refused(half, "filter", "captioner"):
            vqa_from_blip(build(BlipConfig(VISION, TEXT, half=half)))


@pytest.mark.parametrize("width", [16, 24])
def test_answering_starts_from_both_halves_and_unties_them(width):
    vision = dataclasses.replace(VISION, width=width)
    blip = loud(build(BlipConfig(vision, TEXT)), 3)
    model = vqa_from_blip(blip, seed=1)
    assert model.config.vision.drop_path == 0.1
    theirs, ours = blip.state_dict(), model.state_dict()
    fresh = [name for name in ours if not (name in theirs and torch.equal(ours[name], theirs[name]))]
    if width == 16:
        assert fresh == []
    else:
        assert len(fresh) == TEXT.depth * 4
        assert all("text_decoder" in name and "crossattention.self." in name for name in fresh)
    words = (model.text_encoder, model.text_decoder.bert)
    assert words[0].embeddings.word_embeddings.weight is not words[1].embeddings.word_embeddings.weight


def test_a_start_accounts_for_every_tensor(model):
    state = dict(model.state_dict())
    state.pop("cls_head.0.bias")
    with pytest.raises(ValueError, match=r"cls_head\.0\.bias"):
        start_from(model, state, new=lambda name: False)
    start_from(model, state, new=lambda name: name == "cls_head.0.bias")
    with pytest.raises(ValueError, match="stray"):
        start_from(model, {**model.state_dict(), "stray": torch.zeros(1)}, new=lambda name: False)


def test_recomputation_changes_no_gradient():
    model = build(
        dataclasses.replace(CONFIG, text=dataclasses.replace(TEXT, dropout=0.0, attention_dropout=0.0))
    )
    gradients = []
    for on in (False, True):
        recompute_activations(model, on)
        model.zero_grad()
        tokens = model.train().encode_image(pictures().transpose(0, 1).flatten(0, 1))
        model.truth_logits(IDS, MASK, tokens).square().sum().backward()
        gradients.append(
            [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        )
    assert len(gradients[0]) > 50
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
