"""Catches: a tensor, a setting, a vocabulary or a training state lost or changed on the way through a layout; an export
that its own project cannot open; a model written into a layout that has no place for it.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.errors import UserError
from capfilt.models import build, checkpoint
from capfilt.models.blip.model import Blip, BlipConfig
from capfilt.models.blip.tasks import BlipNlvr, NlvrConfig
from capfilt.models.common.answering import VqaConfig
from capfilt.models.common.layouts import vocabulary
from capfilt.models.common.layouts.contents import Contents
from capfilt.models.common.text import TextConfig
from capfilt.models.common.vision import VisionConfig
from capfilt.models.export import export, places, write
from tests.models.interop.reference import CLASSES, WORDS, loud
from tests.refusals import refused

KINDS = ("both", "captioner", "filter", "vqa")  # those that transformers has classes for
# Every ordered pair of layouts once, each with itself too.
TOUR = ("capfilt", "capfilt", "transformers", "transformers", "original", "original", "capfilt", "original",
        "transformers", "capfilt")  # fmt: skip
NLVR_TOUR = ("capfilt", "capfilt", "original", "original", "capfilt")


@pytest.fixture(scope="module")
def corpus() -> Tokenizer:
    return Tokenizer([*SPECIALS, *WORDS, *ADDED])


@pytest.fixture
def bert(corpus, monkeypatch) -> Tokenizer:
    """A small vocabulary that passes for bert-base-uncased's: thirty thousand words would be most of each test."""
    monkeypatch.setattr(vocabulary, "BERT_SIZE", corpus.vocab_size - len(ADDED))
    monkeypatch.setattr(vocabulary, "BERT_IDS", {name: getattr(corpus, name) for name in vocabulary.BERT_IDS})
    return corpus


def made(kind: str, tokenizer: Tokenizer, seed: int = 1) -> Contents:
    """A model none of whose settings is a default, with what a training run of the original code leaves in its file."""
    text = TextConfig(
        tokenizer.vocab_size, 16, 2, 2, 40, max_positions=20, dropout=0.25, attention_dropout=0.125
    )
    vision = VisionConfig(16, 8, 24 if kind != "vqa" else 16, 2, 4, 48, drop_path=0.0625, trunk_frozen=False)
    if kind == "vqa":
        model = loud(build(VqaConfig(vision, text, max_text_tokens=17)), seed)
        return Contents(model, tokenizer, {"note": kind})
    if kind == "nlvr":
        model = loud(build(NlvrConfig(vision, text, max_words=17)), seed)
        return Contents(model, tokenizer, {"note": kind})
    config = BlipConfig(vision, text, 12, 17, "an etching of ", kind)
    model = loud(build(config), seed)
    leftovers = {}
    if kind != "captioner":
        leftovers = {
            "vision_proj_m.weight": torch.randn(12, 24), "text_encoder_m.embeddings.position_ids": torch.arange(20)[None],
            "image_queue": torch.randn(12, 6), "text_queue": torch.randn(12, 6), "idx_queue": torch.full((1, 6), -100),
            "ptr_queue": torch.zeros(1, dtype=torch.int64),
        }  # fmt: skip
    return Contents(model, tokenizer, {"note": kind}, leftovers)


@torch.no_grad()
def outputs(model) -> list[torch.Tensor]:
    ids, mask = torch.tensor([[2, 7, 9, 3, 0]]), torch.tensor([[True, True, True, True, False]])
    side = model.config.image_size
    images = torch.linspace(-1, 1, 6 * side * side).view(2, 3, side, side)
    if isinstance(model, BlipNlvr):
        return [model.truth_logits(ids, mask, model.encode_image(images))]
    tokens = model.encode_image(images[:1])
    if not isinstance(model, Blip):
        states = model.encode_question(ids, mask, tokens)
        return [model.answer_logits(ids, mask, model.prefill_cross(states), mask)]
    found = []
    if model.config.half != "filter":
        found.append(model.lm_logits(ids, mask, tokens))
    if model.config.half != "captioner":
        found += [
            model.match_logits(ids, mask, tokens),
            model.embed_text(ids, mask),
            model.embed_image(tokens),
        ]
    return found


def same(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_tours_leave_no_pair_of_layouts_out():
    assert len(set(pairwise(TOUR))) == 9
    assert len(set(pairwise(NLVR_TOUR))) == 4


@pytest.mark.parametrize(("kind", "tour"), [*((kind, TOUR) for kind in KINDS), ("nlvr", NLVR_TOUR)])
def test_every_layout_into_every_other_keeps_everything(tmp_path, bert, kind, tour):
    start = made(kind, bert)
    expected = outputs(start.model)
    place = tmp_path / "0"
    place.mkdir()
    write(place, tour[0], start)
    for step, layout in enumerate(tour[1:], start=1):
        lines = export(place, layout, tmp_path / str(step))
        place = tmp_path / str(step)
        found, meta = checkpoint.open_any(place)
        where = f"{tour[step - 1]} to {layout}"
        assert meta.get("layout", "capfilt") == layout
        assert found.model.config == start.model.config, where
        assert same(found.model.state_dict(), start.model.state_dict()), where
        assert all(torch.equal(a, b) for a, b in zip(outputs(found.model), expected, strict=True)), where
        assert same(found.leftovers, start.leftovers), where
        assert (found.tokenizer.fingerprint, found.extra) == (bert.fingerprint, start.extra), where
        assert len(lines) == 1 + 3 * bool(start.leftovers), lines


def test_a_parameter_shared_before_is_shared_after(tmp_path, bert):
    source = tmp_path / "source"
    checkpoint.save(source, made("both", bert).model, bert)
    export(source, "transformers", tmp_path / "there")
    export(tmp_path / "there", "original", tmp_path / "back")
    model, _, _ = checkpoint.load(tmp_path / "back")
    assert (
        model.text_decoder.bert.embeddings.word_embeddings.weight
        is model.text_encoder.embeddings.word_embeddings.weight
    )
    assert all(each.requires_grad for each in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_transformers_opens_what_was_exported_for_it(tmp_path, corpus, kind):
    transformers = pytest.importorskip("transformers")
    source = made(kind, corpus)
    source.leftovers = {}
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", "capfilt", source)
    export(tmp_path / "source", "transformers", tmp_path / "out")
    halves = {"captioner": "captioning", "filter": "retrieval"} if kind == "both" else {kind: "."}
    images = torch.randn(2, 3, 16, 16)
    ids, mask = corpus.encode(["w1 w2 w9", "w4"])
    for half, name in halves.items():
        directory = tmp_path / "out" / name
        theirs, report = getattr(transformers, CLASSES[half]).from_pretrained(
            directory, output_loading_info=True
        )
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
        theirs.eval()
        their_tokens = transformers.AutoTokenizer.from_pretrained(directory)(
            ["w1 W2, w9", "w4"], padding=True, return_tensors="pt"
        )
        assert their_tokens.input_ids[1].tolist() == [
            *ids[1].tolist(),
            0,
        ]  # the comma is a token to BERT, not to BLIP
        assert (their_tokens.input_ids[0, :3] == ids[0, :3]).all()
        words = transformers.AutoTokenizer.from_pretrained(directory)
        assert words.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [corpus.dec_id, corpus.enc_id]
        assert len(words) == corpus.vocab_size
        tokens = source.model.encode_image(images)
        start = ids.clone()
        start[:, 0] = corpus.dec_id if half == "captioner" else corpus.enc_id
        given = {"pixel_values": images, "attention_mask": mask.long()}
        if half == "captioner":
            ours = source.model.lm_logits(ids, mask, tokens)[mask]
            reference = theirs(input_ids=start, **given).logits[mask]
        elif half == "filter":
            ours = source.model.match_logits(ids, mask, tokens)
            reference = theirs(input_ids=start, **given).itm_score
        else:
            ours = source.model.encode_question(ids, mask, tokens)
            reference = theirs.text_encoder(
                input_ids=start, attention_mask=mask.long(), encoder_hidden_states=tokens
            ).last_hidden_state
        assert torch.allclose(ours, reference, atol=1e-5)


def test_one_half_of_a_model_of_both(tmp_path, corpus):
    source = made("both", corpus)
    (tmp_path / "source").mkdir()
    write(tmp_path / "source", "capfilt", source)
    with pytest.raises(UserError, match="--only"):
        export(tmp_path / "source", "capfilt", tmp_path / "wrong", only="decoder")
    export(tmp_path / "source", "capfilt", tmp_path / "captioner", only="captioner")
    export(tmp_path / "source", "transformers", tmp_path / "filter", only="filter")
    captioner, filter_ = checkpoint.load(tmp_path / "captioner")[0], checkpoint.load(tmp_path / "filter")[0]
    expected = outputs(source.model)
    assert torch.equal(outputs(captioner)[0], expected[0])
    assert all(torch.equal(a, b) for a, b in zip(outputs(filter_), expected[1:], strict=True))
    with refused("captioner", "filter"):
        export(tmp_path / "captioner", "capfilt", tmp_path / "wrong", only="filter")
    assert not (tmp_path / "wrong").exists()


def test_halves_of_two_models_are_no_pair(tmp_path, corpus):
    for seed in (1, 2):
        source = made("both", corpus, seed)
        (tmp_path / f"{seed}").mkdir()
        write(tmp_path / f"{seed}", "transformers", source)
    (tmp_path / "1" / "retrieval").rename(tmp_path / "1" / "old")
    (tmp_path / "2" / "retrieval").rename(tmp_path / "1" / "retrieval")
    with refused("retrieval", "visual_encoder", "pair"):
        checkpoint.load(tmp_path / "1")


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_what_has_no_home_is_refused_by_name(tmp_path, corpus, layout):
    source = made("both", corpus)
    stem = dataclasses.replace(source.model.config.vision, stem="conv", width=32, patch_size=4)
    model = build(dataclasses.replace(source.model.config, vision=stem))
    checkpoint.save(tmp_path / "conv", model, corpus)
    with refused("vision.stem conv"):
        export(tmp_path / "conv", layout, tmp_path / "out")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["conv"], "nothing half-made may stay"
    trunk = dataclasses.replace(source.model.config.vision, trunk="efficientnet_lite0")
    error = places(dataclasses.replace(source.model.config, vision=trunk))[layout]
    assert "vision.trunk 'efficientnet_lite0' has no home" in str(error)


def test_a_vocabulary_with_berts_ids_is_at_home_in_the_original_layout(tmp_path):
    tokens = [f"t{index}" for index in range(30522)]
    for token, index in zip(SPECIALS, (0, 100, 101, 102, 103), strict=True):
        tokens[index] = token
    checkpoint.save(tmp_path / "source", made("captioner", real := Tokenizer([*tokens, *ADDED])).model, real)
    export(tmp_path / "source", "original", tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_text().count("\n") == 30522
    assert torch.load(tmp_path / "out" / "model.pth")["model"].keys() >= {
        "text_decoder.bert.embeddings.position_ids"
    }
    _, tokenizer, _ = checkpoint.load(tmp_path / "out")
    assert (tokenizer.fingerprint, tokenizer.dec_id, tokenizer.enc_id) == (real.fingerprint, 30522, 30523)


def test_a_corpus_vocabulary_has_no_home_in_the_original_layout(tmp_path, corpus):
    checkpoint.save(tmp_path / "source", made("captioner", corpus).model, corpus)
    with refused("30 tokens", "bert-base-uncased"):
        export(tmp_path / "source", "original", tmp_path / "out")


def test_an_answering_model_with_a_wider_tower_has_no_home_in_transformers(tmp_path, corpus):
    config = made("vqa", corpus).model.config
    wide = dataclasses.replace(config, vision=dataclasses.replace(config.vision, width=32))
    checkpoint.save(tmp_path / "source", build(wide), corpus)
    with refused("vision.width", 32, "text.width", 16):
        export(tmp_path / "source", "transformers", tmp_path / "out")


def test_a_model_of_two_images_has_no_class_in_transformers_and_no_halves(tmp_path, corpus):
    source = made("nlvr", corpus)
    checkpoint.save(tmp_path / "source", source.model, corpus)
    with refused("source", "BlipNlvr", "transformers"):
        export(tmp_path / "source", "transformers", tmp_path / "out")
    with refused("statements", "filter"):
        export(tmp_path / "source", "capfilt", tmp_path / "out", only="filter")
    with refused("statements", "checkpoint"):
        checkpoint.load(tmp_path / "source")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["source"]


def test_an_existing_directory_is_left_alone(tmp_path, corpus):
    checkpoint.save(tmp_path / "source", made("captioner", corpus).model, corpus)
    with refused(tmp_path / "source", "exists"):
        export(tmp_path / "source", "transformers", tmp_path / "source")
    with refused("--to onnx"):
        export(tmp_path / "source", "onnx", tmp_path / "out")
