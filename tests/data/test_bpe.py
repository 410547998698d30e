"""Catches ids that CLIP would not have, texts that come back otherwise, a vocabulary that depends on the run."""

from __future__ import annotations

import html
import json

import pytest

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.cleaning import cleaned
from tests.refusals import refused

TEXTS = [
    "A photo of a dog, running on 2 beaches!",
    "two dogs' ball &amp;amp; co.",
    "the café isn't open — 日本 🐕",
    "A   dog\n\truns; a dog ran &lt;fast&gt; in 2024",
    "photo photo dog dog running",
]


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer.train(TEXTS * 3, 560)


def test_ids_are_those_of_transformers(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "vocab.json").write_text(json.dumps({each: i for i, each in enumerate(tokenizer._tokens)}))
    merges = "\n".join(" ".join(pair) for pair in tokenizer._merges)
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    theirs = transformers.CLIPTokenizer(
        vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt")
    )
    for text in [*TEXTS, "unseen Words, 12:30 o'clock they'll"]:
        (mine,) = tokenizer.encode_ragged([text])
        # It leaves HTML as it is; the released code does not.
        assert mine == theirs(html.unescape(html.unescape(text)))["input_ids"], text
    assert BpeTokenizer.from_published(tmp_path / "merges.txt").fingerprint == tokenizer.fingerprint


def test_ids_are_laid_out_as_clips(tokenizer):
    # CLIP, released code: 256 bytes, those that end a word, merges, start, end.
    assert tokenizer._tokens[:3] == ["!", '"', "#"]
    assert tokenizer._tokens[256] == "!</w>"
    assert (tokenizer.start_id, tokenizer.end_id) == (tokenizer.vocab_size - 2, tokenizer.vocab_size - 1)
    ids, mask = tokenizer.encode(["a dog", "a photo of a dog running"])
    assert mask.sum(1).tolist() == [4, 8] if ids.shape[1] == 8 else mask.sum(1).min() == 4
    assert (ids[~mask] == 0).all()
    (cut,) = tokenizer.encode_ragged(["dog " * 100], max_length=6)
    assert len(cut) == 6
    assert cut[-1] == tokenizer.end_id


def test_a_text_comes_back(tokenizer):
    for text in TEXTS:
        (ids,) = tokenizer.encode_ragged([text])
        assert "".join(tokenizer.decode(ids).split()) == "".join(cleaned(text, "clip").split())


def test_the_same_texts_in_any_order_give_one_vocabulary_and_it_survives_the_disk(tokenizer, tmp_path):
    assert BpeTokenizer.train(TEXTS[::-1] * 3, 560).fingerprint == tokenizer.fingerprint
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    loaded = BpeTokenizer.load(tmp_path)
    assert loaded.fingerprint == tokenizer.fingerprint
    loaded.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        '{"model": {"vocab": {"a": 0}, "merges": []}}',
        '{"model": {"vocab": {"a": 7}, "merges": ["x"]}}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with refused("tokenizer.json"):
        BpeTokenizer.load(tmp_path)
    with refused(tmp_path / "absent"):
        BpeTokenizer.from_published(tmp_path / "absent")
    with refused("vocab_size 500"):
        BpeTokenizer.train(TEXTS, 500)
