"""Would catch: a capability that is promised and not there, a probability that is not the filter's own score, a text matched
with its neighbour's image when batches are sorted and cut, [CLS] left at position 0 where the matcher wants [ENC], dropout
left on in evaluation, and a model left in evaluation mode in mid-training."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from capfilt.data.tokenizer import ADDED, SPECIALS, Tokenizer
from capfilt.inference.adapters import adapted, opened
from capfilt.inference.capabilities import (
    AnswersQuestions,
    EmbedsImagesAndTexts,
    GeneratesText,
    MatchesPairs,
)
from capfilt.inference.captioner import Captioner
from capfilt.inference.filter import Filter
from capfilt.models import build, preset
from capfilt.models.blip.tasks import nlvr_from_blip, vqa_from_blip
from capfilt.models.common.layouts.contents import Contents
from capfilt.models.vilt.tasks import pair_from_vilt
from capfilt.tasks.captioning import evaluate_captioning
from capfilt.tasks.retrieval import evaluate_retrieval, from_embeddings
from tests.refusals import refused

WORDS = ["a", "dog", "cat", "red", "blue", "runs", "sits", "on", "grass"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer([*SPECIALS, *WORDS, *ADDED])


@pytest.fixture(scope="module")
def model(tokenizer):
    config = preset("blip", "tiny", tokenizer.vocab_size)
    # Dropout on, so that a forgotten eval() shows as noise.
    text = dataclasses.replace(config.text, dropout=0.5)
    built = build(dataclasses.replace(config, text=text))
    with torch.no_grad():
        # A fresh head hardly tells pairs apart; this one does.
        built.itm_head.weight.mul_(50)
    return built


@pytest.fixture(scope="module")
def images():
    return torch.randint(
        0, 256, (5, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


TEXTS = ["a dog", "a red cat sits on grass", "a", "a blue dog runs on red grass", "cat", "a dog runs"]


def test_blip_is_what_the_protocols_ask_for(model, tokenizer):
    able = adapted(model, tokenizer)
    assert isinstance(able, EmbedsImagesAndTexts)
    assert isinstance(able, MatchesPairs)
    assert not isinstance(able, AnswersQuestions)


@pytest.mark.parametrize(
    ("ability", "methods", "why"),
    [
        ("draw", (), "'draw' features, embed, match"),
        ("match", ("encode_image", "prefill_cross"), "'match' match_logits"),
        ("match", ("encode_image", "match_logits"), "'match' prefill_cross"),
    ],
)
def test_a_model_is_refused_whose_ability_is_unknown_or_lacks_a_method(ability, methods, why):
    able = type("Able", (), {"abilities": (ability,), **dict.fromkeys(methods)})
    with refused("Able", why):
        adapted(able(), None)


def test_the_captioner_is_what_captioning_asks_for(model, tokenizer, images):
    captioner = Captioner(copy.deepcopy(model), tokenizer)
    assert isinstance(captioner, GeneratesText)
    references = [[text] for text in TEXTS[:5]]
    whole = evaluate_captioning(captioner, images, references, method="nucleus", max_new_tokens=5, seed=3)
    parts = evaluate_captioning(
        captioner, images.split(2), references, method="nucleus", max_new_tokens=5, seed=3
    )
    assert whole.captions == parts.captions
    assert len(set(whole.captions)) > 1
    assert whole.captions != evaluate_captioning(captioner, images, references, max_new_tokens=5).captions


@pytest.mark.parametrize("pair_batch", [1, 2, 256])
def test_every_pair_scores_as_it_does_alone(model, tokenizer, images, pair_batch):
    able = adapted(model, tokenizer, pair_batch=pair_batch)
    tokens = able.encode_images(images)
    index = torch.tensor([0, 0, 0, 0, 0, 2, 2, 4])
    texts = [*TEXTS[:5], TEXTS[5], TEXTS[3], TEXTS[0]]
    logits = able.match(tokens, index, texts)
    assert logits.dtype == torch.float32
    assert logits.shape == (8,)
    model.eval()
    with torch.inference_mode():
        for row, (image, text) in enumerate(zip(index.tolist(), texts, strict=True)):
            ids, mask = tokenizer.encode([text], 35)
            alone = model.match_logits(ids, mask, model.encode_image(images[image : image + 1]))
            assert logits[row].item() == pytest.approx(alone[0, 1].item(), abs=1e-4)
    model.train()
    assert logits.std() > 1e-3


@pytest.mark.parametrize("pair_batch", [1, 256])
def test_an_albef_reads_texts_without_their_end(tokenizer, images, pair_batch):
    """[SEP], which every text has here, was never read by a released ALBEF."""
    model = build(preset("albef", "tiny", tokenizer.vocab_size)).eval()
    with torch.no_grad():
        model.itm_head.weight.mul_(50)
    able = adapted(model, tokenizer, pair_batch=pair_batch)
    can = opened(Contents(model, tokenizer)).can
    assert can == ("embeds images and texts", "embeds images", "matches pairs")
    logits = able.match(able.encode_images(images), torch.tensor([0, 0, 0, 3]), TEXTS[:4])
    embeds = able.embed_texts(TEXTS[:4])
    with torch.inference_mode():
        for row, (image, text) in enumerate(zip([0, 0, 0, 3], TEXTS[:4], strict=True)):
            words = [tokenizer.cls_id, *(WORDS.index(word) + len(SPECIALS) for word in text.split())]
            ids = torch.tensor([words])
            alone = model.match_logits(ids, None, model.encode_image(images[image : image + 1]))
            assert logits[row].item() == pytest.approx(alone[0, 1].item(), abs=1e-4)
            assert torch.allclose(embeds[row], model.embed_text(ids)[0], atol=1e-5)
    assert logits.std() > 1e-3


def test_embeddings_are_unit_vectors_whatever_the_batch(model, tokenizer, images):
    able = adapted(model, tokenizer)
    together, alone = able.embed_texts(TEXTS), torch.cat([able.embed_texts([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(len(TEXTS)), atol=1e-5)
    vision = able.embed_images(able.encode_images(images))
    assert vision.shape == (5, model.config.embed_dim)
    assert torch.allclose(vision.norm(dim=1), torch.ones(5), atol=1e-5)


def test_training_goes_on_where_it_was(model, tokenizer, images):
    model.train()
    model.visual_encoder.eval()
    before = [module.training for module in model.modules()]
    able = adapted(model, tokenizer)
    assert torch.equal(able.embed_texts(TEXTS), able.embed_texts(TEXTS))  # no dropout
    able.match(able.encode_images(images), torch.tensor([0]), ["a"])
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()
    model.train()


def test_retrieval_end_to_end_equals_the_whole_matrix(model, tokenizer, images):
    able = adapted(model, tokenizer, pair_batch=3)
    owners = [0, 0, 1, 2, 4, 4]
    found = evaluate_retrieval(able, images.split(2), range(5), TEXTS, owners, rerank_k=100, token_memory=0)
    tokens = able.encode_images(images)
    cosine = able.embed_images(tokens) @ able.embed_texts(TEXTS).T
    assert (
        found.itc.metrics
        == from_embeddings(able.embed_images(tokens), able.embed_texts(TEXTS), owners).metrics
    )
    index = torch.arange(5).repeat_interleave(len(TEXTS))
    fused = able.match(tokens, index, TEXTS * 5).view(5, -1) + cosine
    for j, owner in enumerate(owners):
        assert found.itm.text_ranks[j] == 1 + int((fused[:, j] > fused[owner, j]).sum())
    assert found.itm.image_ranks[3] == 0


def test_the_probability_of_a_match_is_the_filter_s_score(model, tokenizer, images):
    able = adapted(model, tokenizer, pair_batch=2)
    index = [0, 0, 1, 1, 4]
    found = able.match_probability(able.encode_images(images), torch.tensor(index), TEXTS[:5])
    scores = Filter(copy.deepcopy(model), tokenizer).score_texts(images, index, TEXTS[:5])
    assert found.tolist() == pytest.approx([score.itm_score for score in scores], abs=1e-5)


def test_what_each_model_can_do(model, tokenizer):
    whole = opened(Contents(copy.deepcopy(model), tokenizer))
    assert whole.image_size == 48
    assert whole.can == ("embeds images and texts", "embeds images", "matches pairs", "generates text")
    judges = opened(Contents(copy.deepcopy(model).halved("filter"), tokenizer))
    assert judges.can == ("embeds images and texts", "embeds images", "matches pairs")
    writes = opened(Contents(copy.deepcopy(model).halved("captioner"), tokenizer))
    assert writes.can == ("embeds images", "generates text")
    assert opened(Contents(vqa_from_blip(model), tokenizer)).can == ("embeds images", "answers questions")
    assert opened(Contents(nlvr_from_blip(model), tokenizer)).can == ("embeds images", "classifies pairs")


@pytest.fixture(scope="module")
def vilt(tokenizer):
    config = dataclasses.replace(preset("vilt", "tiny", tokenizer.vocab_size), dropout=0.5)
    built = build(config)
    with torch.no_grad():
        built.itm_head.weight.mul_(50)
    return built


@pytest.mark.parametrize("pair_batch", [1, 3, 256])
def test_every_pair_of_a_vilt_scores_as_it_does_alone(vilt, tokenizer, images, pair_batch):
    able = adapted(vilt, tokenizer, pair_batch=pair_batch)
    tokens = able.encode_images(images)
    index = torch.tensor([0, 0, 0, 0, 0, 2, 2, 4])
    texts = [*TEXTS[:5], TEXTS[5], TEXTS[3], TEXTS[0]]
    logits, chances = able.match(tokens, index, texts), able.match_probability(tokens, index, texts)
    vilt.eval()
    with torch.inference_mode():
        for row, (image, text) in enumerate(zip(index.tolist(), texts, strict=True)):
            ids, mask = tokenizer.encode([text], 40)
            alone = vilt.match_logits(vilt.fuse(ids, mask, vilt.encode_image(images[image : image + 1])))[0]
            assert logits[row].item() == pytest.approx(alone[1].item(), abs=1e-4)
            assert chances[row].item() == pytest.approx(alone.softmax(0)[1].item(), abs=1e-4)
    vilt.train()
    assert logits.std() > 1e-3


def test_a_vilt_matches_and_its_classifiers_classify(vilt, tokenizer, images):
    assert opened(Contents(copy.deepcopy(vilt), tokenizer)).can == ("matches pairs",)
    judges = opened(Contents(pair_from_vilt(vilt), tokenizer))
    assert judges.can == ("classifies pairs",)
    assert (judges.model.labels, judges.model.pictures) == (("false", "true"), 2)
    with torch.no_grad():
        judges.model._model.modality.mul_(50)  # a fresh second picture is seen as the first one is
        judges.model._model.modality[2].neg_()
    pairs = torch.stack([images[:3], images[1:4]], dim=1)
    logits = judges.model.classify(pairs, TEXTS[:3])
    for row in range(3):
        alone = judges.model.classify(pairs[row : row + 1], TEXTS[row : row + 1])[0]
        assert torch.allclose(alone, logits[row], atol=1e-4)
    assert not torch.allclose(judges.model.classify(pairs.flip(1), TEXTS[:3]), logits, atol=1e-4)


def test_features_are_the_first_token_before_any_projection(model, tokenizer, images):
    able = opened(Contents(copy.deepcopy(model), tokenizer)).model
    found = able.image_features(images)
    assert (found.dtype, found.shape) == (torch.float32, (5, model.config.vision.width))
    alone = torch.cat([able.encode_images(images[row : row + 1])[:, 0] for row in range(5)])
    assert torch.allclose(found, alone, atol=1e-5)


def test_answers_are_written_and_ranked_whatever_the_batch(model, tokenizer, images):
    able = opened(Contents(vqa_from_blip(model), tokenizer)).model
    questions = ["what runs", "what sits on the red grass", "a", "cat", "dog"]
    together = able.answer(images, questions, num_beams=2, max_new_tokens=3)
    alone = [
        able.answer(images[row : row + 1], questions[row : row + 1], num_beams=2, max_new_tokens=3)[0]
        for row in range(5)
    ]
    assert together == alone
    answers = ["a red cat", "dog", "blue", "grass"]
    best = able.rank_answers(images, questions, answers, k=2)
    assert best.shape == (5,)
    assert [
        able.rank_answers(images[r : r + 1], questions[r : r + 1], answers, k=2).item() for r in range(5)
    ] == best.tolist()


def test_statements_are_classified_with_their_own_two_pictures(model, tokenizer, images):
    able = opened(Contents(nlvr_from_blip(model), tokenizer)).model
    assert (able.labels, able.pictures) == (("false", "true"), 2)
    pairs = torch.stack([images[:3], images[1:4]], dim=1)
    logits = able.classify(pairs, TEXTS[:3])
    assert (logits.dtype, logits.shape) == (torch.float32, (3, 2))
    for row in range(3):
        assert torch.allclose(
            able.classify(pairs[row : row + 1], TEXTS[row : row + 1])[0], logits[row], atol=1e-5
        )
    assert not torch.allclose(able.classify(pairs.flip(1), TEXTS[:3]), logits, atol=1e-4)
