"""Catches a text that is written otherwise than it is read: a cache that shows a token what is not its past, layers that are
shared or unshared by mistake."""

from __future__ import annotations

import pytest
import torch

from capfilt.errors import UserError
from capfilt.models.common.text import Attention, TextConfig, TextDecoder, TextTransformer

CONFIG = TextConfig(30, 16, 2, 2, 24, max_positions=12, dropout=0.0, attention_dropout=0.0)
IMAGES, WAYS, PROMPT, STEPS = 3, 2, 3, 4


@pytest.fixture(scope="module")
def scene():
    torch.manual_seed(0)
    decoder = TextDecoder(CONFIG, 10).eval()
    for each in decoder.parameters():
        torch.nn.init.normal_(each, std=0.4)
    with torch.no_grad():
        cross = decoder.bert.cross_keys_values(torch.randn(IMAGES, 5, 10))
    return decoder, cross


def whole(decoder, cross, texts):
    """The last state of each text, read at once; texts int64 [B * WAYS, L], those of an image side by side."""
    several = [(keys.repeat_interleave(WAYS, 0), values.repeat_interleave(WAYS, 0)) for keys, values in cross]
    return decoder.bert(texts, cross=several, causal=True)[:, -1]


@torch.no_grad()
def test_texts_written_token_by_token_are_the_texts_read_whole(scene):
    decoder, cross = scene
    texts = torch.randint(5, 28, (IMAGES, PROMPT))
    cache = decoder.bert.new_cache(IMAGES, WAYS, PROMPT + STEPS, cross[0][0])
    decoder.bert(texts, cross=cross, cache=cache)
    texts = texts.repeat_interleave(WAYS, 0)
    for step in range(STEPS):
        token = torch.randint(5, 28, (IMAGES * WAYS, 1))
        texts = torch.cat([texts, token], dim=1)
        states = decoder.bert(token, cross=cross, cache=cache)[:, -1]
        torch.testing.assert_close(states, whole(decoder, cross, texts), atol=1e-5, rtol=1e-5)
        # Beams change places, and one may take both.
        ways = (
            torch.tensor([[1, 0], [0, 0], [1, 1]])
            if step % 2 == 0
            else torch.tensor([[0, 0], [1, 0], [0, 1]])
        )
        cache.reorder(ways)
        texts = (
            texts.view(IMAGES, WAYS, -1)
            .gather(1, ways[:, :, None].expand(-1, -1, texts.shape[1]))
            .flatten(0, 1)
        )


@torch.no_grad()
def test_images_that_ended_are_forgotten_and_a_rewound_cache_goes_on_from_there(scene):
    decoder, cross = scene
    prompt, tokens = torch.randint(5, 28, (IMAGES, PROMPT)), torch.randint(5, 28, (3, IMAGES * WAYS, 1))
    cache = decoder.bert.new_cache(IMAGES, WAYS, PROMPT + STEPS, cross[0][0])
    decoder.bert(prompt, cross=cross, cache=cache)
    decoder.bert(tokens[0], cross=cross, cache=cache)
    place = cache.place
    decoder.bert(tokens[1], cross=cross, cache=cache)
    cache.rewind(place)
    kept = torch.tensor([2, 0])
    cache.keep(kept)
    assert cache.kept.tolist() == [2, 0]
    fewer = [(keys[kept], values[kept]) for keys, values in cross]
    rows = (kept[:, None] * WAYS + torch.arange(WAYS)).flatten()
    states = decoder.bert(tokens[2][rows], cross=fewer, cache=cache)[:, -1]
    texts = torch.cat([prompt.repeat_interleave(WAYS, 0), tokens[0], tokens[2]], dim=1)
    torch.testing.assert_close(states, whole(decoder, cross, texts)[rows], atol=1e-5, rtol=1e-5)
    cache.keep(torch.tensor([1]))
    assert cache.kept.tolist() == [0]
    cache.restart()
    assert cache.place == (0, 0)


@torch.no_grad()
def test_padding_changes_nothing_and_no_token_sees_what_comes_after(scene):
    decoder, cross = scene
    ids = torch.randint(5, 28, (IMAGES, 6))
    mask = torch.arange(6) < torch.tensor([6, 4, 2])[:, None]
    read = decoder.bert(ids, mask, cross)
    other = decoder.bert(ids.masked_fill(~mask, 7), mask, cross)
    torch.testing.assert_close(read[mask], other[mask])
    torch.testing.assert_close(
        decoder.bert(ids, mask, cross, first=True)[:, 0], read[:, 0], atol=1e-5, rtol=1e-5
    )
    changed = torch.cat([ids[:, :3], ids[:, 3:] % 5 + 20], dim=1)
    causal = [decoder.bert(each, None, cross, causal=True)[:, :3] for each in (ids, changed)]
    torch.testing.assert_close(*causal)


def test_a_decoder_shares_all_but_self_attention_with_the_encoder_it_is_given():
    encoder = TextTransformer(CONFIG, 10)
    decoder = TextDecoder(CONFIG, 10, encoder)
    assert decoder.bert.embeddings is encoder.embeddings
    for mine, theirs in zip(decoder.bert.layers, encoder.layers, strict=True):
        assert mine.crossattention is theirs.crossattention
        assert mine.intermediate is theirs.intermediate
        assert mine.output is theirs.output
        assert mine.attention is not theirs.attention
    apart = {id(each) for each in decoder.parameters()} - {id(each) for each in encoder.parameters()}
    names = {name for name, each in decoder.named_parameters() if id(each) in apart}
    assert all(".attention." in name or name.startswith("cls.") for name in names)


def test_layers_that_read_text_alone_take_no_image():
    stack = TextTransformer(CONFIG, 10, crossattention=lambda index: None)
    assert stack.cross_keys_values(torch.randn(2, 5, 10)) == []
    with pytest.raises(UserError, match=r"text\.width"):
        TextConfig(width=10, heads=3)


@pytest.mark.parametrize("rows", [1, IMAGES])
@pytest.mark.parametrize("ways", [1, WAYS])
@torch.no_grad()
def test_text_attention_adds_a_bias_also_where_rows_share_an_image(rows, ways):
    """Catches a bias that goes to another text's queries where the texts of an image share its keys."""
    torch.manual_seed(0)
    attention = Attention(CONFIG, 10).eval()
    source = attention.keys_values(torch.randn(IMAGES, 5, 10))
    x = torch.randn(IMAGES * ways, 3, CONFIG.width)
    bias, mask = torch.randn(rows, CONFIG.heads, ways * 3, 5), torch.rand(IMAGES, 1, 1, 5) > 0.3
    mask[..., 0] = True
    query = attention.self.query(x).view(IMAGES, ways * 3, CONFIG.heads, -1).transpose(1, 2)
    logits = query @ source[0].transpose(-1, -2) / query.shape[-1] ** 0.5 + bias
    seen = logits.masked_fill(~mask, -torch.inf).softmax(-1) @ source[1]
    want = attention.output(seen.transpose(1, 2).reshape(x.shape), x)
    torch.testing.assert_close(attention(x, source, mask, bias), want)
