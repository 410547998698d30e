"""Catches: a wrong geometry (parameter counts), self-attention shared by mistake or the rest not shared, a decoder that
sees the future or another row's padding, an incremental decode that drifts from the full forward, fp16 leaking into
logits, and any difference from the published architecture as transformers implements it."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import UserError
from capfilt.models import build, preset
from capfilt.models.blip.model import CAPTIONER_PARTS, FILTER_PARTS, PRESETS, Blip, BlipConfig
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from tests.refusals import refused

VOCAB = 40


def parameters_of(model, parts=None):
    """How many parameters the named parts hold together, shared ones counted once; all of them by default."""
    modules = [model] if parts is None else [getattr(model, part) for part in parts]
    return sum({id(each): each.numel() for module in modules for each in module.parameters()}.values())


def small_config(**text) -> BlipConfig:
    return BlipConfig(
        vision=VisionConfig(32, 8, width=24, depth=2, heads=2, hidden=48),
        text=TextConfig(
            VOCAB, 32, 2, 4, 64, max_positions=16, **{"dropout": 0.0, "attention_dropout": 0.0, **text}
        ),
        embed_dim=12,
    )


@pytest.fixture(scope="module")
def model() -> Blip:
    made = build(small_config(), seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)  # away from the near-linear regime of a fresh initialisation
    return made.eval()


def batch(rows: int = 3, length: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    ids = torch.randint(5, VOCAB - 2, (rows, length), generator=generator)
    return pixels, ids, torch.ones(rows, length, dtype=torch.bool)


def on_meta(name: str, image_size: int) -> Blip:
    config = preset("blip", name, 30524)
    config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, image_size=image_size))
    with torch.device("meta"):
        return Blip(config)


@pytest.mark.parametrize(
    ("name", "captioner", "filter"),
    [("base", 223.97, 223.74), ("large", 446.29, 446.13)],  # the published 384 px models
)
def test_parameters_are_the_published_ones(name, captioner, filter):
    made = on_meta(name, 384)
    assert round(parameters_of(made, CAPTIONER_PARTS) / 1e6, 2) == captioner
    assert round(parameters_of(made, FILTER_PARTS) / 1e6, 2) == filter


def test_whole_base_is_the_papers_252_million():
    made = on_meta("base", 224)
    assert round(parameters_of(made) / 1e6) == 252
    assert round(parameters_of(on_meta("base", 384), ("visual_encoder",)) / 1e6, 2) == 86.09


def test_presets_have_their_sizes():
    assert set(PRESETS) == {"tiny", "small", "trunk", "base", "large"}
    assert 0.8e6 <= parameters_of(build(preset("blip", "tiny", 500))) <= 2.5e6
    assert 9e6 <= parameters_of(build(preset("blip", "small", 4000))) <= 16e6
    with pytest.raises(UserError, match="huge"):
        preset("blip", "huge", 100)


def test_only_self_attention_is_the_decoders_own(model):
    encoder, decoder = (
        dict(model.text_encoder.named_parameters()),
        dict(model.text_decoder.bert.named_parameters()),
    )
    assert encoder.keys() == decoder.keys()
    for name, mine in encoder.items():
        shared = mine.data_ptr() == decoder[name].data_ptr()
        assert shared == (".attention." not in name), name


def test_same_seed_same_weights_whatever_was_drawn_before():
    first = build(small_config(), seed=3)
    torch.rand(5)
    second = build(small_config(), seed=3)
    other = build(small_config(), seed=4)
    names = dict(first.named_parameters())
    assert all(torch.equal(names[name], each) for name, each in second.named_parameters())
    assert not torch.equal(first.itm_head.weight, other.itm_head.weight)


def test_embeddings_are_unit_vectors_in_fp32_under_autocast(model):
    pixels, ids, mask = batch()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.encode_image(pixels)
        outputs = {
            "image": model.embed_image(tokens),
            "text": model.embed_text(ids, mask),
            "match": model.match_logits(ids, mask, tokens),
            "lm": model.lm_logits(ids, mask, tokens),
        }
    assert {name: each.dtype for name, each in outputs.items()} == dict.fromkeys(outputs, torch.float32)
    for name in ("image", "text"):
        assert torch.allclose(outputs[name].norm(dim=-1), torch.ones(3), atol=1e-5)


def test_padding_changes_nothing(model):
    pixels, ids, mask = batch(3, 8)
    lengths = [3, 8, 5]
    for row, length in enumerate(lengths):
        mask[row, length:] = False
        ids[row, length:] = 0
    tokens = model.encode_image(pixels)
    embedded, matched = model.embed_text(ids, mask), model.match_logits(ids, mask, tokens)
    written = model.lm_logits(ids, mask, tokens)
    for row, length in enumerate(lengths):
        alone, image = ids[row : row + 1, :length], tokens[row : row + 1]
        assert torch.allclose(embedded[row], model.embed_text(alone)[0], atol=1e-5)
        assert torch.allclose(matched[row], model.match_logits(alone, None, image)[0], atol=1e-5)
        assert torch.allclose(written[row, :length], model.lm_logits(alone, None, image)[0], atol=1e-5)


def test_masked_image_tokens_equal_absent_ones(model):
    pixels, ids, mask = batch()
    tokens = model.encode_image(pixels)
    image_mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    image_mask[:, 9:] = False
    masked = model.match_logits(ids, mask, tokens, image_mask)
    assert torch.allclose(masked, model.match_logits(ids, mask, tokens[:, :9]), atol=1e-5)
    assert not torch.allclose(masked, model.match_logits(ids, mask, tokens), atol=1e-3)


def test_a_token_sees_nothing_after_it(model):
    pixels, ids, mask = batch()
    tokens = model.encode_image(pixels)
    changed = ids.clone()
    changed[:, 5:] = 7
    before, after = model.lm_logits(ids, mask, tokens), model.lm_logits(changed, mask, tokens)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-5)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_position_0_is_the_modes_own_and_the_callers_ids_stay(model):
    pixels, ids, mask = batch()
    tokens = model.encode_image(pixels)
    other, kept = ids.clone(), ids.clone()
    other[:, 0] = 2
    assert torch.equal(model.match_logits(ids, mask, tokens), model.match_logits(other, mask, tokens))
    assert torch.equal(model.lm_logits(ids, mask, tokens), model.lm_logits(other, mask, tokens))
    assert not torch.allclose(model.embed_text(ids, mask), model.embed_text(other, mask), atol=1e-4)
    assert torch.equal(ids, kept)


@settings(max_examples=15, deadline=None)
@given(prompt=st.integers(1, 5), samples=st.integers(1, 3), seed=st.integers(0, 99))
def test_decoding_with_the_cache_equals_the_full_forward(model, prompt, samples, seed):
    pixels, _, _ = batch(2, seed=seed)
    _, ids, _ = batch(2 * samples, 7, seed)
    ids[:, :prompt] = ids[::samples, :prompt].repeat_interleave(
        samples, 0
    )  # an image's texts share its prompt
    tokens = model.encode_image(pixels)
    full = model.lm_logits(ids, None, tokens.repeat_interleave(samples, 0))
    cross = model.prefill_cross(tokens)
    cache = model.new_cache(samples, 7, cross)
    logits = model.decode(ids[::samples, :prompt], cache, cross)
    assert torch.allclose(logits, full[::samples, prompt - 1], atol=1e-4)
    for step in range(prompt, 7):
        logits = model.decode(ids[:, step : step + 1], cache, cross)
        assert torch.allclose(logits, full[:, step], atol=1e-4)


def test_reordered_cache_goes_on_from_the_chosen_texts(model):
    """Of two images, three texts each; a text's past is what it chose at every step, not what lies in its slots."""
    pixels, ids, _ = batch(2, 6)
    steps = torch.randint(5, 30, (4, 6, 1), generator=torch.Generator().manual_seed(1))
    orders = [torch.tensor([[2, 2, 0], [1, 0, 1]]), torch.tensor([[1, 0, 2], [2, 2, 2]])]
    tokens = model.encode_image(pixels)
    cross = model.prefill_cross(tokens)
    cache = model.new_cache(3, 8, cross)
    model.decode(ids[:, :4], cache, cross)
    texts = ids[:, :4].repeat_interleave(3, 0)
    for step, order in zip(steps, [*orders, None, None], strict=True):
        logits = model.decode(step, cache, cross)
        texts = torch.cat([texts, step], dim=1)
        full = model.lm_logits(texts, None, tokens.repeat_interleave(3, 0))[:, -1]
        assert torch.allclose(logits, full, atol=1e-4)
        if order is not None:
            cache.reorder(order)
            texts = texts.view(2, 3, -1)[torch.arange(2)[:, None], order].view(6, -1)


def test_forgotten_images_leave_the_others_as_they_were(model):
    pixels, ids, _ = batch(3, 6)
    tokens = model.encode_image(pixels)
    cross = model.prefill_cross(tokens)
    cache = model.new_cache(2, 8, cross)
    model.decode(ids[:, :4], cache, cross)
    step = ids[:, 4:5].repeat_interleave(2, 0) + torch.tensor([[0], [1]] * 3)
    model.decode(step, cache, cross)
    kept = torch.tensor([0, 2])
    cache.keep(kept)
    cross = [(keys[kept], values[kept]) for keys, values in cross]
    more = torch.tensor([[7], [8], [9], [10]])
    logits = model.decode(more, cache, cross)
    rows = torch.tensor([0, 1, 4, 5])
    texts = torch.cat([ids[:, :4].repeat_interleave(2, 0)[rows], step[rows], more], dim=1)
    full = model.lm_logits(texts, None, tokens[kept].repeat_interleave(2, 0))[:, -1]
    assert torch.allclose(logits, full, atol=1e-4)
    assert cache.kept.tolist() == [0, 2]
    cache.keep(torch.tensor([1]))
    assert cache.kept.tolist() == [2]


def test_too_long_a_caption_is_refused(model):
    pixels, _, _ = batch(1)
    with refused("max_new_tokens"):
        model.new_cache(1, 17, model.prefill_cross(model.encode_image(pixels)))


def test_gradients_reach_every_parameter():
    made = build(small_config())
    pixels, ids, mask = batch()
    tokens = made.encode_image(pixels)
    loss = (
        made.lm_logits(ids, mask, tokens).logsumexp(-1).mean()
        + made.match_logits(ids, mask, tokens)[:, 1].mean()
    )
    loss = (
        loss + (made.embed_image(tokens) @ made.embed_text(ids, mask).T / made.temperature).diagonal().mean()
    )
    loss.backward()
    # A key's bias shifts every score of a query alike, so its gradient is zero up to rounding: presence is what counts.
    assert [name for name, each in made.named_parameters() if each.grad is None] == []


def test_config_goes_through_json_and_refuses_what_it_does_not_know():
    config = preset("blip", "tiny", 777)
    assert BlipConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for wrong, named in [
        ({"vision": {"depht": 3}}, "vision.depht"),
        ({"text": {"width": "768"}}, "text.width"),
        ({"text": {"depth": -1}}, "text.depth"),
        ({"text": {"heads": 7}}, "text.heads"),
        ({"vision": []}, "vision"),
        ({"colour": 1}, "colour"),
        ({"vision": {"stem": "x"}}, "vision.stem"),
        ({"vision": {"trunk": "resnet"}}, "vision.trunk"),
        ({"vision": {"image_size": 50}}, "vision.image_size"),
    ]:
        with refused(named):
            BlipConfig.from_dict(wrong)


def test_same_outputs_as_transformers(model, transformers_twins):
    """The published checkpoints' architecture, written by others: same tensors in, same numbers out."""
    reference = transformers_twins(model)
    pixels, ids, mask = batch(3, 7)
    mask[1, 4:] = False
    ids[:, 0] = VOCAB - 1
    floats = model.visual_encoder.normalise(pixels)
    with torch.no_grad():
        tokens = model.encode_image(pixels)
        theirs = reference["retrieval"](ids, floats, attention_mask=mask.long(), use_itm_head=True)
        assert torch.allclose(theirs.last_hidden_state, tokens, atol=1e-4)
        assert torch.allclose(theirs.itm_score, model.match_logits(ids, mask, tokens), atol=1e-4)
        ids[:, 0] = 2
        cosine = reference["retrieval"](ids, floats, attention_mask=mask.long(), use_itm_head=False).itm_score
        ours = model.embed_image(tokens) @ model.embed_text(ids, mask).T
        assert torch.allclose(cosine, ours, atol=1e-4)
        ids[:, 0] = VOCAB - 2
        logits = reference["captioner"](floats, ids, attention_mask=mask.long()).logits
        assert torch.allclose(logits[mask], model.lm_logits(ids, mask, tokens)[mask], atol=1e-4)
