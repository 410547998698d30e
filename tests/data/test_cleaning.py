"""Catches: texts that reach a family's model in another form than its checkpoints were trained on: signs that are spaces
elsewhere, full stops that are gone, words counted otherwise, mis-decoded letters; a checkpoint that forgets its cleaning."""

from __future__ import annotations

import html
import json
import pickle
import re
import sys
import unicodedata
import warnings

import pyarrow.parquet as pq
import pytest

from capfilt.data import cleaning
from capfilt.data.bpe import BpeTokenizer
from capfilt.data.cleaning import CLEANINGS, clean, cleaned
from capfilt.data.tokenizer import Tokenizer

HARD = [
    "A man's dog, sitting on a t-shirt/towel; it isn't his.",
    '<PERSON> and <person>: 10:30 (p.m.) #1 "best" ~ ever!?',
    "a  word   and\ta tab\nand a line\n",
    " - / - ... !!! ",
    "one\u00a0two three\u2009four",
    "word " * 40 + "end.",
    "word  " * 40 + "end",
    "x\ty " * 20 + "and. so: on",
    "caf\u00e9 na\u00efve \u00c5ngstr\u00f6m e\u0301 \ufb01ne \uff21\uff22",
    "the caf\u00c3\u00a9 isn\u00e2\u20ac\u2122t \u00e2\u0153\u201d open \u00f0\u0178\u02dc\u201e",
    "&amp;amp; &lt;b&gt; e&#769; &eacute; \u201cquotes\u201d \u2026",
    "[SEP] [MASK] [sep] <|endoftext|> tail",
    "\u0391\u03a3 \u0130stanbul stra\u00dfe \u65e5\u672c \U0001f415",
    "\x00\x1b\u200b.",
    "",
]


def published_blip(text, most):
    """BLIP's `pre_caption` as its repository has it."""
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:most]) if len(words) > most else text


def published_blip_question(text, most):
    text = re.sub(r"([.!\"()*#:;~])", "", text.lower()).rstrip(" ")
    words = text.split(" ")
    return " ".join(words[:most]) if len(words) > most else text


def published_albef(text, most):
    """ALBEF's `pre_caption`: signs are removed, hyphens and slashes are spaces, <person> is a word."""
    text = re.sub(r"([,.'!?\"()*#:;~])", "", text.lower())
    text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
    text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:most]) if len(words) > most else text


def published_albef_question(text, most):
    text = re.sub(r"([,.'!?\"()*#:;~])", "", text.lower()).replace("-", " ").replace("/", " ").rstrip(" ")
    words = text.split(" ")
    return " ".join(words[:most]) if len(words) > most else text


def published_clip(text):
    """CLIP's `whitespace_clean(basic_clean(text)).lower()`."""
    ftfy = pytest.importorskip("ftfy", reason="CLIP's cleaning needs ftfy (capfilt[clip])")
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip().lower()


PUBLISHED = {
    "blip": published_blip,
    "blip-questions": published_blip_question,
    "albef": published_albef,
    "albef-questions": published_albef_question,
    "as-found": lambda text, most: text,
}


@pytest.fixture(scope="module")
def real(shared_data):
    """3,000 captions and 400 web texts, each a sample over all of them."""
    captions = json.loads((shared_data / "clean" / "captions.json").read_text())["annotations"]
    web = pq.read_table(shared_data / "web" / "urls.parquet")["caption"].to_pylist()
    web = [each for each in web if each]
    return [
        *(each["caption"] for each in captions[:: len(captions) // 3000][:3000]),
        *web[:: len(web) // 400][:400],
    ]


@pytest.fixture(params=["hard", "real"])
def texts(request):
    return HARD if request.param == "hard" else request.getfixturevalue("real")


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_of_berts_family_are_those_of_its_published_cleaning(name, texts):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train([*HARD, *texts], 3000, cleaning="as-found").cleaned_as(name)
    vocabulary = {tokenizer.token(index): index for index in range(tokenizer.vocab_size)}
    if name == "blip":
        # Its words are what any white space separates here, and single spaces there; only very long texts can differ.
        texts = [each.replace("\t", " ") for each in texts]
    # [SEP] in a text is a word here, where the published tokenizer would end it there.
    texts = [each.replace("[SEP]", "[sep]").replace("[MASK]", "[mask]") for each in texts]
    theirs = transformers.BertTokenizer(vocab=vocabulary, do_lower_case=True)
    most = None if name == "as-found" else 30
    mine = tokenizer.encode_ragged(texts, max_length=40, max_words=most)
    found = theirs([PUBLISHED[name](text, 30) for text in texts], truncation=True, max_length=40)
    different = [text for text, a, b in zip(texts, mine, found["input_ids"], strict=True) if a != b]
    assert not different


def test_ids_of_clip_are_those_of_its_published_cleaning(texts):
    transformers = pytest.importorskip("transformers")
    expected = [published_clip(text) for text in texts]
    tokenizer = BpeTokenizer.train(expected, 1500)
    vocabulary = {token: index for index, token in enumerate(tokenizer._tokens)}
    theirs = transformers.CLIPTokenizer(vocab=vocabulary, merges=list(tokenizer._merges))
    theirs.backend_tokenizer.normalizer = None
    mine = tokenizer.encode_ragged(texts)
    different = [
        text
        for text, ids, as_published in zip(texts, mine, expected, strict=True)
        if "<|" not in text and ids != theirs(as_published, truncation=True, max_length=77)["input_ids"]
    ]
    assert not different


def test_without_ftfy_clip_reads_texts_as_they_are_and_says_so_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    cleaning._ftfy.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"capfilt\[clip\]"):
            assert cleaned("the caf\u00c3\u00a9", "clip") == "the caf\u00e3\u00a9"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cleaned("e\u0301", "clip") == unicodedata.normalize("NFC", "e\u0301")
            assert cleaning.trained("clip") == "clip-unrepaired"
    finally:
        cleaning._ftfy.cache_clear()
    monkeypatch.undo()
    pytest.importorskip("ftfy")
    assert cleaning.trained("clip") == "clip"
    assert cleaned("the caf\u00c3\u00a9 \ufb01ne", "clip-unrepaired") == "the caf\u00e3\u00a9 \ufb01ne"


@pytest.mark.parametrize("name", CLEANINGS)
def test_every_cleaning_takes_every_text(name):
    tokenizer = Tokenizer.train(HARD, 300, min_frequency=1, cleaning=name)
    assert tokenizer.cleaning == name == pickle.loads(pickle.dumps(tokenizer)).cleaning
    rows = tokenizer.encode_ragged([*HARD, "\ud800 lone"], max_length=12, max_words=5)
    assert all(tokenizer.sep_id not in row[1:-1] and tokenizer.mask_id not in row for row in rows)
    assert tokenizer.cleaned_as("blip").encode_ragged(HARD) == Tokenizer(tokenizer._tokens).encode_ragged(
        HARD
    )
    assert tokenizer.fingerprint == tokenizer.cleaned_as("blip").fingerprint
    assert clean(HARD[0]) == cleaned(HARD[0], "blip", 30)
