"""Bugs caught here: hidden [CLS], [SEP] or padding; half a word hidden where whole words were asked for; labels beside the
tokens they belong to; shares that are not 15%, 80%, 10% and 10%; draws that a seed does not repeat.
"""

from __future__ import annotations

import pytest
import torch

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.models.common.masking import IGNORED, Masking
from tests.refusals import refused

PIECES = ["a", "b", "c", "d", "##e", "##f", "##g", *(f"w{i}" for i in range(200))]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([*SPECIALS, *PIECES, *ADDED])


def texts(tokenizer, rows=400):
    # "a ##e b c ##f ##g d" and padding.
    ids = [tokenizer.cls_id, 5, 9, 6, 7, 10, 11, 8, tokenizer.sep_id, tokenizer.pad_id, tokenizer.pad_id]
    whole = torch.tensor(ids).repeat(rows, 1)
    return whole, whole != tokenizer.pad_id


@pytest.mark.parametrize("whole_words", [False, True])
def test_what_is_hidden_is_named_by_its_label_and_nothing_else_changes(tokenizer, whole_words):
    ids, mask = texts(tokenizer, 8000)
    hidden, labels = Masking.of(tokenizer, whole_words=whole_words)(
        ids, mask, torch.Generator().manual_seed(0)
    )
    chosen = labels != IGNORED
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(hidden[~chosen], ids[~chosen])
    for special in (tokenizer.cls_id, tokenizer.sep_id, tokenizer.pad_id):
        assert not chosen[ids == special].any()
    assert hidden[chosen].unique().numel() > 150  # others come from the whole vocabulary
    others = hidden[chosen & (hidden != tokenizer.mask_id)]
    assert not torch.isin(others, torch.tensor([tokenizer.cls_id, tokenizer.sep_id, tokenizer.enc_id])).any()


def test_the_shares_are_the_published_ones(tokenizer):
    ids, mask = texts(tokenizer, 8000)
    hidden, labels = Masking.of(tokenizer)(ids, mask, torch.Generator().manual_seed(0))
    chosen = labels != IGNORED
    free = 7 * len(ids)
    assert chosen.sum().item() / free == pytest.approx(0.15, abs=0.006)
    of_chosen = chosen.sum().item()
    masked = ((hidden == tokenizer.mask_id) & chosen).sum().item() / of_chosen
    kept = ((hidden == ids) & chosen).sum().item() / of_chosen
    assert masked == pytest.approx(0.8, abs=0.015)
    assert kept == pytest.approx(0.1, abs=0.01)


def test_a_word_is_hidden_whole_or_not_at_all(tokenizer):
    ids, mask = texts(tokenizer, 4000)
    labels = Masking.of(tokenizer, whole_words=True)(ids, mask, torch.Generator().manual_seed(1))[1]
    chosen = labels != IGNORED
    assert torch.equal(chosen[:, 1], chosen[:, 2])
    assert torch.equal(chosen[:, 4], chosen[:, 5])
    assert torch.equal(chosen[:, 4], chosen[:, 6])
    # Words by themselves: 15% of each, independent of the word before.
    both = (chosen[:, 1] & chosen[:, 3]).float().mean().item()
    assert chosen[:, 1].float().mean().item() == pytest.approx(0.15, abs=0.02)
    assert both == pytest.approx(0.0225, abs=0.01)
    # Without the option, pieces are drawn apart.
    apart = Masking.of(tokenizer)(ids, mask, torch.Generator().manual_seed(1))[1] != IGNORED
    assert not torch.equal(apart[:, 1], apart[:, 2])


def test_a_seed_repeats_its_draw_and_a_share_must_be_one(tokenizer):
    ids, mask = texts(tokenizer)
    made = [Masking.of(tokenizer)(ids, mask, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(made[0][0], made[1][0])
    assert torch.equal(made[0][1], made[1][1])
    with refused("masking", 1.5):
        Masking.of(tokenizer, share=1.5)
