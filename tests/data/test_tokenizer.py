"""Catches: a vocabulary that differs between two runs, [DEC] and [ENC] at the wrong ids (the 30522/30524 crash), a lost
[SEP] on long texts, a prompt mask off by one, special ids injected by web text, and a file that is not what it says.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.cleaning import clean
from capfilt.data.tokenizer import Tokenizer
from tests.refusals import refused

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange"]
SHAPES = ["circle", "square", "triangle", "star"]
TEXTS = [
    f"A {size} {colour} {shape} is {side} of a {other}, isn't it?"
    for size in ("small", "large")
    for colour in COLOURS
    for shape in SHAPES
    for side in ("left", "right")
    for other in SHAPES
] + ["a picture of a café's t-shirt", "ein kleines Bild für dich", "写真 of a 犬"]


@functools.cache
def learned(vocab_size: int) -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=vocab_size)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return learned(600)


def bert_like(directory: Path) -> Path:
    """A made-up vocabulary with bert-base-uncased's layout: pad 0, unk 100, cls 101, sep 102, mask 103, 30522 lines."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens += ["a", "picture", "of", "dog", "##gy"]
    tokens += [f"word{i}" for i in range(30522 - len(tokens))]
    path = directory / "vocab.txt"
    path.write_text("\n".join(tokens) + "\n")
    return path


# ------------------------------------------------------------------ clean


def blip_pre_caption(text: str, max_words: int) -> str:
    """The rules as BLIP's paper code states them, step by step."""
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text


@given(st.text(st.sampled_from(" aB9.!\"()*#:;~,?'-é"), max_size=120), st.integers(1, 8))
def test_clean_follows_blip(text: str, max_words: int) -> None:
    assert clean(text, max_words) == blip_pre_caption(text, max_words)


def test_clean_known_answers() -> None:
    assert clean('A (small) DOG... "runs"!  #1;~') == "a small dog runs 1"
    assert clean("tab\tand\nnewline\x00 and\u200b zero") == "tab and newline and zero"
    assert clean("\x00\x1b\u200b\ud800 . ") == ""
    assert len(clean("word " * 100).split()) == 30
    assert len(clean("word " * 100, None).split()) == 100


@given(st.text(st.characters(), max_size=60))
def test_clean_twice_is_clean_once(text: str) -> None:
    assert clean(clean(text)) == clean(text)


# ------------------------------------------------------------------ ids


def test_order_of_special_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token(i) for i in range(5)] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 1, 2, 3)
    assert tokenizer.dec_id == tokenizer.vocab_size - 2
    assert tokenizer.enc_id == tokenizer.vocab_size - 1 == len(tokenizer) - 1


def test_bert_vocabulary_gives_blips_ids(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_published(bert_like(tmp_path))
    assert (tokenizer.dec_id, tokenizer.enc_id, tokenizer.vocab_size) == (30522, 30523, 30524)
    assert (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id) == (0, 101, 102)
    ids, mask = tokenizer.encode(["A picture of: doggy!", "a"], max_length=30)
    assert ids.tolist() == [[101, 104, 105, 106, 107, 108, 102], [101, 104, 102, 0, 0, 0, 0]]
    assert mask.tolist() == [[True] * 7, [True] * 3 + [False] * 4]
    assert tokenizer.prompt_length("a picture of ") == 4
    again = Tokenizer.load(tokenizer.save(tmp_path / "kept"))
    assert again.fingerprint == tokenizer.fingerprint


def test_from_vocab_keeps_ids_already_there(tmp_path: Path) -> None:
    path = bert_like(tmp_path)
    path.write_text(path.read_text() + "[DEC]\n[ENC]\n")
    assert Tokenizer.from_published(path).vocab_size == 30524


def test_encode_shapes_and_truncation(tokenizer: Tokenizer) -> None:
    texts = ["red circle", "red " * 29 + "star", ""]
    ids, mask = tokenizer.encode(texts, max_length=12)
    assert ids.dtype == torch.int64
    assert mask.dtype == torch.bool
    assert ids.shape == mask.shape == (3, 12)
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert ids[1, 11] == tokenizer.sep_id
    assert mask.sum(1).tolist() == [4, 12, 2]
    assert torch.equal(ids == tokenizer.pad_id, ~mask)
    padded, padded_mask = tokenizer.encode(texts, max_length=12, pad_to=16)
    assert padded.shape == (3, 16)
    assert torch.equal(padded[:, :12], ids)
    assert not padded_mask[:, 12:].any()
    with pytest.raises(ValueError, match="pad_to"):
        tokenizer.encode(texts, max_length=12, pad_to=11)


def test_prompt_is_prepended_and_not_counted_as_words(tokenizer: Tokenizer) -> None:
    prompt = "a picture of "
    lead = tokenizer.prompt_length(prompt)
    row = tokenizer.encode_ragged(["red circle"], prompt=prompt)[0]
    assert tokenizer.decode(row) == "a picture of red circle"
    assert tokenizer.decode(row[lead:]) == "red circle"
    assert tokenizer.prompt_length("") == 1
    words = tokenizer.encode_ragged(["red " * 40], max_length=60, prompt=prompt)[0]
    assert len(words) == 2 + (lead - 1) + 30


def test_web_text_cannot_inject_special_ids(tokenizer: Tokenizer) -> None:
    specials = {tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.dec_id, tokenizer.enc_id}
    row = tokenizer.encode_ragged(["[SEP] [PAD] [CLS][DEC] red [ENC] [MASK]"])[0]
    assert not specials & set(row[1:-1])


@settings(max_examples=200)
@given(st.lists(st.text(st.characters(), max_size=80), min_size=1, max_size=4), st.integers(2, 20))
def test_any_text_encodes(texts: list[str], max_length: int) -> None:
    tokenizer = learned(60)
    ids, mask = tokenizer.encode(texts, max_length=max_length)
    assert ids.shape[1] <= max_length
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    last = mask.sum(1) - 1
    assert (ids.gather(1, last[:, None]) == tokenizer.sep_id).all()
    assert (ids == tokenizer.sep_id).sum(1).eq(1).all()
    for row in ids:
        tokenizer.decode(row)


@given(
    st.lists(
        st.sampled_from([*COLOURS, *SHAPES, "isn't", "café's", "t-shirt", "small,", "of?", "a"]), max_size=12
    )
)
def test_decoding_loses_nothing_that_ids_hold(words: list[str]) -> None:
    tokenizer = learned(600)
    ids = tokenizer.encode_ragged([" ".join(words)])[0]
    assert tokenizer.unk_id not in ids
    assert tokenizer.encode_ragged([tokenizer.decode(ids)])[0] == ids


def test_decode(tokenizer: Tokenizer) -> None:
    ids, _ = tokenizer.encode(["A small red circle, isn't it?", "star"])
    assert tokenizer.decode(ids[0]) == "a small red circle, isn't it?"
    assert tokenizer.decode_batch(ids) == ["a small red circle, isn't it?", "star"]
    star = tokenizer.encode_ragged(["star"])[0][1:-1]
    assert tokenizer.decode([tokenizer.dec_id, *star, tokenizer.sep_id, *star]) == "star"
    assert tokenizer.decode([tokenizer.pad_id, tokenizer.enc_id, -7, 10**9]) == ""


# ------------------------------------------------------------------ training


def test_training_is_the_same_in_every_process(tmp_path: Path) -> None:
    texts = tmp_path / "texts.json"
    # Many rare pieces and equal counts: where ties are broken decides what is learned.
    rare = [hashlib.md5(str(i).encode()).hexdigest()[:9] for i in range(400)]
    texts.write_text(json.dumps(TEXTS + rare * 2))
    code = (
        "import json,sys;from capfilt.data.tokenizer import Tokenizer;"
        "sys.stdout.write(Tokenizer.train(json.load(open(sys.argv[1])),vocab_size=900).to_json())"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {
        **os.environ,
        "PYTHONPATH": root,
        "PYTHONHASHSEED": "7",
        "RAYON_NUM_THREADS": "3",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", code, str(texts)]
    run = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    orders = (TEXTS + rare * 2, (TEXTS + rare * 2)[::-1], sorted(TEXTS + rare * 2))
    trained = [Tokenizer.train(order, vocab_size=900).to_json() for order in orders]
    trained.append(run.communicate()[0])
    assert len(set(trained)) == 1
    assert json.loads(trained[0])["model"]["vocab"]["[ENC]"] == 899


def test_vocab_size_is_a_ceiling(tokenizer: Tokenizer) -> None:
    assert Tokenizer.train(TEXTS, vocab_size=100).vocab_size <= 100
    assert tokenizer.vocab_size <= 600
    assert Tokenizer.train([], vocab_size=100).vocab_size == 7
    with refused("vocab_size 10"):
        Tokenizer.train(TEXTS, vocab_size=10)


def test_rare_characters_do_not_fill_the_vocabulary() -> None:
    chinese = ["".join(chr(0x4E00 + i + j) for j in range(20)) for i in range(0, 4000, 20)]
    tokenizer = Tokenizer.train(TEXTS * 3 + chinese, vocab_size=200)
    assert tokenizer.decode(tokenizer.encode_ragged(["a red circle"])[0]) == "a red circle"
    assert tokenizer.vocab_size <= 200


# ------------------------------------------------------------------ files


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tokenizer.save(tmp_path / "model")
    assert [p.name for p in path.parent.iterdir()] == ["tokenizer.json"]
    for where in (path, path.parent):
        again = Tokenizer.load(where)
        assert again.to_json() == path.read_text()
        assert torch.equal(again.encode(TEXTS)[0], tokenizer.encode(TEXTS)[0])
    first = path.read_bytes()
    tokenizer.save(tmp_path / "model")
    assert path.read_bytes() == first


def test_file_opens_in_the_library_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tokenizers.Tokenizer.from_file(str(tokenizer.save(tmp_path)))
    assert other.encode("a red circle").ids == tokenizer.encode_ragged(["a red circle"])[0]


def hostile_files(good: dict[str, object]) -> dict[str, bytes]:
    def changed(change: object) -> bytes:
        copy = json.loads(json.dumps(good))
        change(copy)  # type: ignore[operator]
        return json.dumps(copy).encode()

    def regex(copy: dict[str, object]) -> None:
        copy["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}

    return {
        "empty": b"",
        "binary": b"\x80\x04\x95\xff",
        "not json": b"{",
        "deep": b"[" * 200_000,
        "a list": b"[]",
        "null": b"null",
        "no model": b"{}",
        "evil normalizer": changed(regex),
        "another model": changed(lambda c: c["model"].update(type="BPE")),
        "vocab list": changed(lambda c: c["model"].update(vocab=["a"])),
        "ids as text": changed(lambda c: c["model"]["vocab"].update(a="7")),
        "gap": changed(lambda c: c["model"]["vocab"].update(zzz=10**9)),
        "twice": changed(lambda c: c["model"]["vocab"].update(zzz=4)),
        "no pad": changed(lambda c: c["model"]["vocab"].update({"[pod]": c["model"]["vocab"].pop("[PAD]")})),
        "no dec": changed(lambda c: c["model"]["vocab"].update({"[dec]": c["model"]["vocab"].pop("[DEC]")})),
    }


def test_hostile_files_are_one_line_errors_that_name_them(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, data in hostile_files(json.loads(tokenizer.to_json())).items():
        path = tmp_path / f"{name}.json"
        path.write_bytes(data)
        with refused(path.name):
            Tokenizer.load(path)


def test_missing_and_wrong_vocabularies(tmp_path: Path) -> None:
    with refused("tokenizer.json"):
        Tokenizer.load(tmp_path)
    with refused(tmp_path / "nowhere.txt"):
        Tokenizer.from_published(tmp_path / "nowhere.txt")
    path = tmp_path / "vocab.txt"
    for text in ("", "a\nb\n", "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\na\n"):
        path.write_text(text)
        with refused(path):
            Tokenizer.from_published(path)
