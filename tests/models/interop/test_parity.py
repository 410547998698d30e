"""Catches: a tensor of a transformers BLIP under another tensor's name, a mask or a start token that is not the
published one, a decoder that writes other texts than transformers from the same weights, a loss that is not its formula.

The reference is transformers itself on random weights. Where it is known to be wrong the test shows the difference.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from capfilt.data.loader import Batch
from capfilt.inference.decoding import Limits, beam_search, sample
from capfilt.models import checkpoint
from capfilt.models.blip.model import BlipPretraining, PretrainingConfig
from tests.models.interop.reference import DEC, ENC, SEP, pictures, saved, texts

pytest.importorskip("transformers")
CLS = 2
TOLERANCE = 1e-5


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.shape == theirs.shape and float((ours - theirs).abs().max()) < TOLERANCE


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    directory = tmp_path_factory.mktemp("captioner")
    theirs = saved(directory, "captioner", seed=6)
    return checkpoint.load(directory)[0], theirs


@pytest.fixture(scope="module")
def filter_(tmp_path_factory):
    directory = tmp_path_factory.mktemp("filter")
    theirs = saved(directory, "filter", seed=4)
    return checkpoint.load(directory)[0], theirs


@pytest.fixture(scope="module")
def vqa(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vqa")
    theirs = saved(directory, "vqa", seed=5)
    return checkpoint.open_any(directory)[0].model, theirs


@torch.no_grad()
def test_captioning_logits(captioner):
    ours, theirs = captioner
    images, (ids, mask) = pictures(3), texts(DEC, [9, 4, 7])
    expected = theirs(pixel_values=images, input_ids=ids, attention_mask=mask.long()).logits
    logits = ours.lm_logits(ids, mask, ours.encode_image(images))
    assert close(logits[mask], expected[mask])
    assert not close(logits[mask], expected.roll(1, 0)[mask]), "the picture and the text should matter"


@torch.no_grad()
def test_matching_logits_and_the_start_token_they_need(filter_):
    ours, theirs = filter_
    images, (ids, mask) = pictures(3), texts(CLS, [9, 4, 7])
    grounded = ids.clone()
    grounded[:, 0] = ENC

    def expected(start):
        return theirs(pixel_values=images, input_ids=start, attention_mask=mask.long()).itm_score

    logits = ours.match_logits(ids, mask, ours.encode_image(images))
    assert close(logits, expected(grounded))
    # transformers feeds whatever the tokenizer gave, [CLS]; the model was trained with [ENC] in its place.
    assert not close(logits, expected(ids))


@torch.no_grad()
def test_contrastive_cosines(filter_):
    ours, theirs = filter_
    images, (ids, mask) = pictures(3), texts(CLS, [9, 4, 7])
    expected = theirs(
        pixel_values=images, input_ids=ids, attention_mask=mask.long(), use_itm_head=False
    ).itm_score
    assert close(ours.embed_image(ours.encode_image(images)) @ ours.embed_text(ids, mask).T, expected)


@torch.no_grad()
def test_answer_logits_of_questions_of_one_length(vqa):
    ours, theirs = vqa
    images, (question, mask), (answer, answer_mask) = (
        pictures(2),
        texts(ENC, [6, 6]),
        texts(DEC, [5, 3], seed=9),
    )
    expected = theirs(
        pixel_values=images, input_ids=question, attention_mask=mask.long(),
        decoder_input_ids=answer, decoder_attention_mask=answer_mask.long(),
    )  # fmt: skip
    # The class returns no logits: they come out of its decoder.
    states = theirs.text_encoder(
        input_ids=question, attention_mask=mask.long(), encoder_hidden_states=expected.last_hidden_state
    ).last_hidden_state
    expected = theirs.text_decoder(
        input_ids=answer, attention_mask=answer_mask.long(), encoder_hidden_states=states
    ).logits
    mine = ours.encode_question(question, mask, ours.encode_image(images))
    assert close(mine, states)
    assert close(
        ours.answer_logits(answer, answer_mask, ours.prefill_cross(mine), mask)[answer_mask],
        expected[answer_mask],
    )


@torch.no_grad()
def test_questions_of_different_lengths_where_transformers_attends_to_padding(vqa):
    ours, theirs = vqa
    images, (question, mask), (answer, _) = pictures(2), texts(ENC, [9, 4]), texts(DEC, [5, 5], seed=9)
    states = ours.encode_question(question, mask, ours.encode_image(images))
    batched = ours.answer_logits(answer, None, ours.prefill_cross(states), mask)

    def reference(row, length):
        return theirs.text_decoder(
            input_ids=answer[row : row + 1],
            encoder_hidden_states=states[row : row + 1, :length],
            encoder_attention_mask=mask[row : row + 1, :length].long(),
        ).logits[0]

    # Without padding, transformers is right and so are we, in one batch.
    assert close(batched[0], reference(0, 9))
    assert close(batched[1], reference(1, 4))
    # transformers drops the mask of what is attended to: its answer to a padded question is another one.
    assert float((reference(1, 9) - batched[1]).abs().max()) > 0.01
    # And the mask is what keeps ours apart from that.
    assert close(ours.answer_logits(answer, None, ours.prefill_cross(states), None)[1], reference(1, 9))


def new_tokens(row: torch.Tensor) -> list[int]:
    listed = row.tolist()
    return listed[: listed.index(SEP) + 1] if SEP in listed else listed


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_captions_are_transformers_token_for_token(captioner, beams):
    ours, theirs = captioner
    images, prompt = pictures(12), torch.tensor([CLS, 7, 11, 19])
    cross = ours.prefill_cross(ours.encode_image(images))
    limits = Limits(SEP, 0, max_new_tokens=8, min_new_tokens=0, repetition_penalty=1.0)
    if beams == 1:
        written = sample(ours, cross, prompt, len(images), limits).tokens
    else:
        written = beam_search(ours, cross, prompt, len(images), limits, beams).tokens
    # generate() drops the last id, which it takes for [SEP], and puts [DEC] first.
    given = torch.cat([prompt, torch.tensor([SEP])]).expand(len(images), -1).clone()
    expected = theirs.generate(
        pixel_values=images, input_ids=given, num_beams=beams, do_sample=False, max_new_tokens=8,
        early_stopping=False,
    )  # fmt: skip
    found = [new_tokens(row) for row in written]
    assert found == [new_tokens(row[len(prompt) :]) for row in expected]
    assert len({tuple(each) for each in found}) > 3, (
        "texts should depend on the picture for this to mean anything"
    )
    assert len({len(each) for each in found}) > 1, "and end at different steps"


@pytest.mark.parametrize("beams", [1, 3])
@torch.no_grad()
def test_answers_are_transformers_token_for_token(vqa, beams):
    ours, theirs = vqa
    images, (question, mask) = pictures(12), texts(ENC, [6] * 12)
    cross = ours.prefill_cross(ours.encode_question(question, mask, ours.encode_image(images)))
    limits = Limits(SEP, 0, max_new_tokens=6, min_new_tokens=0, repetition_penalty=1.0)
    writer, start = ours.writer(mask), torch.tensor([CLS])
    if beams == 1:
        written = sample(writer, cross, start, len(images), limits).tokens
    else:
        written = beam_search(writer, cross, start, len(images), limits, beams).tokens
    expected = theirs.generate(
        pixel_values=images, input_ids=question, attention_mask=mask.long(), num_beams=beams, do_sample=False,
        max_new_tokens=6, early_stopping=False,
    )  # fmt: skip
    found = [new_tokens(row) for row in written]
    assert found == [new_tokens(row[1:]) for row in expected]
    assert len({tuple(each) for each in found}) > 3, "answers should depend on what is asked"


@torch.no_grad()
def test_a_padded_question_is_answered_as_if_alone(vqa):
    ours, _ = vqa
    images, (question, mask) = pictures(6), texts(ENC, [10, 3, 4, 5, 3, 6])
    limits = Limits(SEP, 0, max_new_tokens=6, min_new_tokens=0, repetition_penalty=1.0)
    tokens = ours.encode_image(images)

    def answers(rows, length, question_mask):
        states = ours.encode_question(question[rows, :length], mask[rows, :length], tokens[rows])
        cross = ours.prefill_cross(states)
        return beam_search(
            ours.writer(question_mask), cross, torch.tensor([CLS]), len(states), limits, beams=3
        ).logprob

    together = answers(slice(None), 10, mask)
    alone = torch.cat([answers(slice(r, r + 1), int(mask[r].sum()), None) for r in range(6)])
    assert torch.allclose(together, alone, atol=1e-4)
    assert not torch.allclose(answers(slice(None), 10, None), alone, atol=1e-2), (
        "padding should matter unmasked"
    )


@torch.no_grad()
def test_heads_that_a_config_leaves_out_are_transformers_eight(tmp_path):
    theirs = saved(tmp_path, "vqa", text={"num_attention_heads": 8})
    content = json.loads((tmp_path / "config.json").read_text())
    del content["text_config"]["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    ours = checkpoint.open_any(tmp_path)[0].model
    assert ours.config.text.heads == 8
    images, (question, mask) = pictures(1), texts(ENC, [5])
    tokens = ours.encode_image(images)
    expected = theirs.text_encoder(input_ids=question, encoder_hidden_states=tokens).last_hidden_state
    assert close(ours.encode_question(question, mask, tokens), expected)


@torch.no_grad()
def test_the_published_epsilon_of_the_tower_is_read_as_the_one_it_was_trained_with(tmp_path):
    published = saved(tmp_path / "published", "filter", vision={"layer_norm_eps": 1e-5})
    trained = saved(tmp_path / "trained", "filter")
    ours = checkpoint.load(tmp_path / "published")[0]
    images = 1e-2 * pictures(2)
    for model in (published, trained):  # small states: where an epsilon shows
        for parameter in model.vision_model.embeddings.parameters():
            parameter.mul_(1e-2)
    ours.visual_encoder.cls_token.mul_(1e-2)
    ours.visual_encoder.pos_embed.mul_(1e-2)
    for parameter in ours.visual_encoder.patch_embed.parameters():
        parameter.mul_(1e-2)
    tokens = ours.encode_image(images)
    assert close(tokens, trained.vision_model(images).last_hidden_state)
    assert not close(tokens, published.vision_model(images).last_hidden_state)


def batch(lengths: list[int]) -> Batch:
    ids, mask = texts(CLS, lengths)
    count = torch.arange(len(lengths))
    return Batch(
        ids=ids, mask=mask, image_index=count, text_index=count, example=count, weight=torch.ones(len(lengths)),
        sided=torch.zeros(len(lengths), dtype=torch.bool), texts=[""] * len(lengths), step=0, epoch=0,
        pixels=pictures(len(lengths)), features=None,
    )  # fmt: skip


def losses_of(model, given, alpha=0.0, **config):
    training = BlipPretraining(model, PretrainingConfig(queue_size=0, **config)).eval()
    with torch.no_grad():
        return training.losses(given, alpha=alpha)


@torch.no_grad()
def test_the_language_loss_is_its_formula(captioner):
    ours, theirs = captioner
    given = batch([9, 4, 7])
    loss = losses_of(ours, given, objectives=("lm",), momentum=None, prompt_length=3)["lm"]
    ids = given.ids.clone()
    ids[:, 0] = DEC
    logits = theirs(pixel_values=given.pixels, input_ids=ids, attention_mask=given.mask.long()).logits
    terms = []
    for row, length in enumerate(given.mask.sum(1).tolist()):
        for position in range(2, length - 1):  # the first predicted token is the one after three given ones
            scores = logits[row, position].tolist()
            log_sum = math.log(sum(math.exp(score) for score in scores))
            right = log_sum - scores[ids[row, position + 1]]
            any_token = sum(log_sum - score for score in scores) / len(scores)
            terms.append(0.9 * right + 0.1 * any_token)
    assert len(terms) == 20 - 3 * 3
    assert float(loss) == pytest.approx(sum(terms) / len(terms), abs=TOLERANCE)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
@torch.no_grad()
def test_the_contrastive_loss_is_its_formula(filter_, alpha):
    ours, theirs = filter_
    given = batch([9, 4, 7, 5])
    momentum = 0.995 if alpha else None
    loss = losses_of(ours, given, alpha, objectives=("itc",), momentum=momentum)["itc"]
    cosines = theirs(
        pixel_values=given.pixels, input_ids=given.ids, attention_mask=given.mask.long(), use_itm_head=False
    ).itm_score
    scores = (cosines / float(ours.temperature)).tolist()

    def one_way(table):
        total = 0.0
        for row, line in enumerate(table):
            log_sum = math.log(sum(math.exp(score) for score in line))
            for column, score in enumerate(line):
                # In evaluation mode the momentum towers are the model itself.
                target = alpha * math.exp(score - log_sum) + (1 - alpha) * (row == column)
                total -= target * (score - log_sum)
        return total / len(table)

    expected = (one_way(scores) + one_way([list(column) for column in zip(*scores, strict=True)])) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_the_matching_loss_is_its_formula(filter_):
    ours, theirs = filter_
    given = batch([9, 6])  # of two, each has one negative: nothing is left to chance
    loss = losses_of(ours, given, objectives=("itm",), momentum=None)["itm"]
    ids = given.ids.clone()
    ids[:, 0] = ENC
    terms = []
    for image, text, label in ((0, 0, 1), (1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 1, 0), (1, 0, 0)):
        scores = theirs(
            pixel_values=given.pixels[image : image + 1],
            input_ids=ids[text : text + 1],
            attention_mask=given.mask[text : text + 1].long(),
        ).itm_score[0].tolist()  # fmt: skip
        terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[label])
    assert float(loss) == pytest.approx(sum(terms) / 6, abs=TOLERANCE)
