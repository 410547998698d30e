"""Catches ids that SentencePiece would not give, a text that says a special token, a file that runs or breaks what reads it.

The `.model` files are SentencePiece 0.2.3's, with a small table of characters; beside each are the ids that it gives.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.tokenizer import Subwords, Tokenizer
from capfilt.data.unigram import ASIDE, SPECIALS, UnigramTokenizer
from capfilt.errors import UserError
from capfilt.models.family import TOKENIZERS, found

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
PUBLISHED = ("unigram", "unigram-bytes")
TEXTS = [
    f"a {size} {colour} {shape}, isn't it? café"
    for size in ("small", "large", "tiny")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square", "star")
]


def published(name: str) -> UnigramTokenizer:
    return UnigramTokenizer.open(FIXTURES / f"{name}.model")


@pytest.fixture(scope="module")
def tokenizer() -> UnigramTokenizer:
    return UnigramTokenizer.train(TEXTS, 120)


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_sentencepiece(name):
    """Known answers: spaces at the ends, tables, unknown pieces, bytes, user defined pieces, names of control pieces."""
    known = json.loads((FIXTURES / f"{name}.json").read_text())
    rows = published(name).encode_ragged(list(known), 1000, raw=True)
    assert [row[1:-1] for row in rows] == list(known.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_of_a_published_model_stay_and_missing_specials_follow(name, tmp_path):
    made = published(name)
    assert [made.token(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (made.unk_id, made.start_id, made.end_id, made.pad_id) == (0, 1, 2, 3)
    assert (made.mask_id, made.token(made.mask_id)) == (made.vocab_size - 1, "<mask>")
    again = UnigramTokenizer.open(made.save(tmp_path))
    assert again.fingerprint == made.fingerprint
    texts = list(json.loads((FIXTURES / f"{name}.json").read_text()))
    assert again.encode_ragged(texts, raw=True) == made.encode_ragged(texts, raw=True)


@pytest.mark.parametrize("text", ["a small cat", "zebra 🐕 Ⅳ", "日本 ¼ \x00 é"])
def test_bytes_bring_back_what_has_no_piece(text):
    made = published("unigram-bytes")
    (row,) = made.encode_ragged([text], 100)
    assert made.unk_id not in row
    assert made.decode(row) == text.replace("Ⅳ", "IV")
    assert made.decode([*made.encode_ragged(["é"])[0][:-1], made._bytes[0xE2]]).endswith("\ufffd")


def test_no_text_says_a_special_token(tokenizer):
    every = " ".join([*SPECIALS, *(token.upper() for token in SPECIALS), "<0x41>", f"a{SPECIALS[1]}b"])
    for made in (tokenizer, *map(published, PUBLISHED)):
        special = {made.pad_id, made.end_id, made.start_id, made.mask_id}
        (row,) = made.encode_ragged([every], 1000, raw=True)
        assert not special & set(row[1:-1])
        for token in SPECIALS:
            (row,) = made.encode_ragged([token], 1000, raw=True)
            assert not special & set(row[1:-1]), token


@settings(max_examples=100)
@given(st.lists(st.text(st.characters(), max_size=40), min_size=1, max_size=3), st.integers(2, 20))
def test_any_text_encodes(texts, max_length):
    for made in (LEARNED, *map(published, PUBLISHED[1:])):
        ids, mask = made.encode(texts, max_length)
        assert ids.shape[1] <= max_length
        assert ((ids >= 0) & (ids < made.vocab_size)).all()
        assert (ids[:, 0] == made.start_id).all()
        assert (ids == made.end_id).sum(1).eq(1).all()
        assert torch.equal(ids == made.pad_id, ~mask)
        made.decode_batch(ids)


LEARNED = UnigramTokenizer.train(TEXTS, 120)


@given(
    st.lists(
        st.sampled_from([*["small", "large", "red", "blue", "circle", "star", "isn't", "café"], "a"]),
        max_size=9,
    )
)
def test_known_words_come_back(words):
    (row,) = LEARNED.encode_ragged([" ".join(words)])
    assert LEARNED.unk_id not in row
    assert LEARNED.decode(row) == " ".join(words)


# ------------------------------------------------------------------ training


def test_training_is_the_same_in_every_process_and_order(tmp_path):
    texts = TEXTS + [f"{i * 7919 % 10007:04x}{i:03d}" for i in range(300)] * 2
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json,sys;from capfilt.data.unigram import UnigramTokenizer as U;"
        "sys.stdout.write(U.train(json.load(open(sys.argv[1])),300).to_json())"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "3"}
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "texts.json")], env=env, stdout=subprocess.PIPE
    )
    trained = [UnigramTokenizer.train(order, 300).to_json() for order in (texts, texts[::-1], sorted(texts))]
    trained.append(run.communicate()[0].decode())
    assert len(set(trained)) == 1


def test_vocab_size_is_a_ceiling(tokenizer):
    assert tokenizer.vocab_size <= 120
    assert [tokenizer.token(i) for i in range(5)] == list(SPECIALS)
    many = ["".join(chr(0x4E00 + i + j) for j in range(20)) for i in range(0, 4000, 20)]
    assert UnigramTokenizer.train(TEXTS * 3 + many, 200).vocab_size <= 200
    for texts in ([], [""], ["a"], ["\x00", " "]):
        assert 5 <= UnigramTokenizer.train(texts, 13).vocab_size <= 13
    with pytest.raises(UserError, match="12"):
        UnigramTokenizer.train(TEXTS, 12)


def test_a_likelier_cut_wins():
    """A known answer by hand: of the cuts of "ab", the sum of the scores decides."""
    special = [(ASIDE + token, 0.0) for token in SPECIALS]
    for whole, want in ((-2.9, ["▁ab"]), (-3.1, ["▁", "a", "b"])):
        pieces = [*special, ("▁", -1.0), ("a", -1.0), ("b", -1.0), ("▁ab", whole)]
        made = UnigramTokenizer(pieces)
        (row,) = made.encode_ragged(["ab"])
        assert [made.token(i) for i in row[1:-1]] == want


# ------------------------------------------------------------------ files


def test_it_survives_the_disk_another_process_and_another_cleaning(tokenizer, tmp_path):
    for where in (tokenizer.save(tmp_path), tmp_path):
        again = UnigramTokenizer.open(where)
        assert again.to_json() == tokenizer.to_json()
        assert again.fingerprint == tokenizer.fingerprint
    sent = pickle.loads(pickle.dumps(published("unigram").cleaned_as("blip")))
    assert (sent.cleaning, sent.fingerprint) == ("blip", published("unigram").fingerprint)
    assert sent.encode_ragged(["A Cat!"]) == published("unigram").encode_ragged(["a cat"])


def field(number: int, value: bytes | int) -> bytes:
    def varint(rest: int) -> bytes:
        return bytes([rest]) if rest < 128 else bytes([rest & 127 | 128]) + varint(rest >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def model(*settings: bytes, pieces: int = 3) -> bytes:
    score = b"\x15" + struct.pack("<f", -1.0)
    return b"".join([*(field(1, field(1, f"p{i}".encode()) + score) for i in range(pieces)), *settings])


REFUSED = {
    "byte-pair": (model(field(2, field(3, 2))), "BPE"),
    "words": (model(field(2, field(3, 3))), "Word"),
    "characters": (model(field(2, field(3, 4))), "Char"),
    "no prefix": (model(field(3, field(3, 0))), "add_dummy_prefix"),
    "spaces kept": (model(field(3, field(4, 0))), "remove_extra_whitespaces"),
    "suffixes": (model(field(2, field(24, 1))), "treat_whitespace_as_suffix"),
    "no pieces": (model(pieces=0), "no pieces"),
    "twice": (model(field(1, field(1, b"p0"))), "p0"),
    "not finite": (model(field(1, field(1, b"x") + b"\x15" + struct.pack("<f", float("nan")))), "finite"),
    "table too short": (model(field(3, field(2, b"\x00"))), ""),
    "table of another form": (model(field(3, field(2, b"\x04\x00\x00\x00abcd"))), "table"),
    "cut off": (model()[:-1], ""),
    "a pickle": (b"\x80\x04\x95\xff", ""),
    "text": (b"a vocabulary", ""),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_read_is_one_line_that_names_it(case, tmp_path):
    data, why = REFUSED[case]
    path = tmp_path / "spm.model"
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        UnigramTokenizer.open(path)
    assert str(path) in str(caught.value)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)
    path.write_bytes(model())
    assert UnigramTokenizer.open(path).vocab_size == 3 + len(SPECIALS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_damaged_model_is_refused_or_read_and_never_more(name, tmp_path):
    """Catches a table whose lookups leave it: the library would stop the process with a panic, no exception."""
    data = (FIXTURES / f"{name}.model").read_bytes()
    table = published(name)._charsmap
    assert table
    start = data.index(table)
    drawn, path, read = random.Random(0), tmp_path / "spm.model", 0
    for trial in range(150):
        broken = bytearray(data)
        low, high = (start, start + len(table)) if trial % 2 else (0, len(data))
        for _ in range(drawn.choice([1, 3, 40])):
            broken[drawn.randrange(low, high)] = drawn.randrange(256)
        path.write_bytes(broken)
        try:
            made = UnigramTokenizer.open(path)
        except UserError:
            continue
        read += 1
        made.encode(["a small cat", "ﬁne Ⅳ ａｂ ½ zebra 🐕 cafe\u0301", "\u3000\u200b\t"])
    assert read


def changed(**parts):
    def change(content):
        for name, value in parts.items():
            content[name] = value

    return change


def regex(content):
    content["normalizer"]["normalizers"].append(
        {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    )


def a_table(content):
    table = base64.b64encode(struct.pack("<I", 1024) + b"\xff" * 1024).decode()
    content["normalizer"]["normalizers"] = [{"type": "Precompiled", "precompiled_charsmap": table}]


def a_special_in_texts(content):
    content["model"]["vocab"][1][0] = "</s>"


HOSTILE = {
    "a pattern": regex,
    "a table that leaves itself": a_table,
    "a special token in texts": a_special_in_texts,
    "another splitter": changed(pre_tokenizer={"type": "Whitespace"}),
    "no model": changed(model=None),
    "another model": changed(model={"type": "WordPiece", "vocab": {}}),
    "scores that are words": changed(model={"type": "Unigram", "vocab": [["a", "b"]]}),
    "a flat vocabulary": changed(model={"type": "Unigram", "vocab": ["a", "b"]}),
    "no normalizer": changed(normalizer=None),
    "a list": lambda content: content.clear(),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_one_line_that_names_it(case, tokenizer, tmp_path):
    content = json.loads(tokenizer.to_json())
    HOSTILE[case](content)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as caught:
        UnigramTokenizer.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ what all tokenizers share


@pytest.mark.parametrize("name", [name for name in TOKENIZERS if name])
def test_every_tokenizer_has_the_same_protocol(name, tmp_path):
    """Catches a tokenizer that a loader, a checkpoint or a family cannot use in place of another."""
    kind = found(TOKENIZERS[name])
    assert issubclass(kind, Subwords)
    made = kind.train(TEXTS, 600, cleaning="as-found")
    again = kind.open(made.save(tmp_path))
    assert (
        again.cleaned_as("as-found").fingerprint
        == made.fingerprint
        == pickle.loads(pickle.dumps(made)).fingerprint
    )
    assert made.cleaned_as("as-found") is made
    assert made.cleaned_as("blip").cleaning == "blip"
    rows = made.encode_ragged(["a small star", "star"], 50, "a large ", None, False)
    assert {row[0] for row in rows} == {made.first_id}
    assert {row[-1] for row in rows} == {made.last_id}
    ids, mask = made.pad(rows, 60)
    assert ids.shape == mask.shape == (2, 60)
    assert (ids[~mask] == made.pad_id).all()
    assert made.decode_batch(ids) == ["a large a small star", "a large star"]
    lead = made.prompt_length("a large ")
    assert rows[0][:lead] == rows[1][:lead]
    assert made.decode(rows[1][lead:]) == "star"
    assert len(made) == made.vocab_size
    assert made.token(made.vocab_size - 1)
    for outside in (-1, made.vocab_size):
        with pytest.raises(IndexError):
            made.token(outside)
    with pytest.raises(ValueError, match="1"):
        made.encode_ragged(["a"], max_length=1)
    longest = made.encode_ragged(["star " * 200], max_words=None)[0]
    assert len(longest) == made.longest


def test_a_model_without_texts_has_a_tokenizer_that_gives_no_ids(tmp_path):
    made = found(TOKENIZERS[""]).train(TEXTS, 600, cleaning="as-found")
    ids, mask = made.encode(["a small star", ""], 50)
    assert ids.shape == mask.shape == (2, 0)
    assert made.decode_batch(ids) == ["", ""]
    assert (made.vocab_size, len(made), made.cleaned_as("blip").cleaning) == (0, 0, "blip")
    made.save(tmp_path)
    assert not list(tmp_path.iterdir())
    assert pickle.loads(pickle.dumps(made)).fingerprint == made.fingerprint


def test_tokenizers_of_two_classes_never_share_a_fingerprint():
    prints = {kind.train(TEXTS, 600).fingerprint for kind in (Tokenizer, BpeTokenizer, UnigramTokenizer)}
    assert len(prints) == 3
    special = [(ASIDE + token, 0.0) for token in SPECIALS]
    one, other, table = (
        UnigramTokenizer([*special, ("a", score)], charsmap).fingerprint
        for score, charsmap in ((-1.0, None), (-1.5, None), (-1.0, b""))
    )
    assert len({one, other, table}) == 3
