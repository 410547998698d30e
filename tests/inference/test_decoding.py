"""Catches: a beam search that loses the best text, mixes up beams after reordering, or counts lengths another way than
transformers; log probabilities of something else than the text; rows that go on after [SEP]."""

from __future__ import annotations

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch

from capfilt.inference import decoding
from capfilt.inference.decoding import Limits, beam_search, sample
from capfilt.inference.sampling import uniforms


def limits(tokenizer, longest=6, shortest=0, penalty=1.0) -> Limits:
    return Limits(tokenizer.sep_id, tokenizer.pad_id, longest, shortest, penalty)


def start(tokenizer, prompt="a picture of"):
    return tokenizer.encode([prompt])[0][0, :-1]


def logprob_of(model, tokens, image, prompt, sep):
    """Sum of log p of the tokens up to [SEP] by one full forward, and how many they are."""
    row = tokens.tolist()
    row = row[: row.index(sep) + 1] if sep in row else row
    ids = torch.cat([prompt, torch.tensor(row)])[None]
    logp = model.lm_logits(ids, None, image).log_softmax(-1)[0]
    return sum(float(logp[len(prompt) - 1 + i, token]) for i, token in enumerate(row)), len(row)


@pytest.fixture(scope="module")
def scene(pair, images):
    model, tokenizer = pair
    with torch.no_grad():
        tokens = model.encode_image(images)
        return model, tokenizer, tokens, model.prefill_cross(tokens)


@torch.no_grad()
def test_greedy_takes_the_best_token_of_a_full_forward(scene):
    model, tokenizer, tokens, cross = scene
    prompt = start(tokenizer)
    done = sample(model, cross, prompt, 7, limits(tokenizer, 8))
    lengths = set()
    for row in range(7):
        ids, expected = prompt, 0.0
        for _ in range(8):
            logp = model.lm_logits(ids[None], None, tokens[row : row + 1])[0, -1].log_softmax(-1)
            expected += float(logp.max())
            ids = torch.cat([ids, logp.argmax()[None]])
            if ids[-1] == tokenizer.sep_id:
                break
        text = ids[len(prompt) :]
        lengths.add(len(text))
        assert torch.equal(done.tokens[row, : len(text)], text)
        assert (done.tokens[row, len(text) :] == tokenizer.pad_id).all()
        assert float(done.logprob[row]) == pytest.approx(expected, abs=1e-4)
    assert len(lengths) > 1, "the rows should end at different steps for this test to mean anything"


@torch.no_grad()
def test_samples_share_one_encode_and_carry_their_own_logprob(scene):
    model, tokenizer, tokens, cross = scene
    prompt = start(tokenizer)
    draws = uniforms(1, [str(i) for i in range(7)], 3, 8)
    done = sample(model, cross, prompt, 21, limits(tokenizer, 8, 2, 1.3), draws, 0.9, 0, 1.5)
    for row in range(21):
        image = tokens[row // 3 : row // 3 + 1]
        expected, length = logprob_of(model, done.tokens[row], image, prompt, tokenizer.sep_id)
        assert length >= 3, "two tokens at least before [SEP]"
        assert float(done.logprob[row]) == pytest.approx(expected, abs=1e-3)
    assert len({tuple(row.tolist()) for row in done.tokens}) > 7


def every_text(tokenizer, allowed, longest):
    for length in range(1, longest + 1):
        for body in itertools.product([t for t in allowed if t != tokenizer.sep_id], repeat=length - 1):
            yield [*body, tokenizer.sep_id]
    yield from (
        [*body] for body in itertools.product([t for t in allowed if t != tokenizer.sep_id], repeat=longest)
    )


@torch.no_grad()
@pytest.mark.parametrize("penalty", [0.0, 1.0, 2.0])
def test_beam_search_wide_enough_finds_the_best_text_of_all(tiny_model, penalty):
    longest = 3
    for seed in range(3):
        model, tokenizer = tiny_model(["x", "y"], 2.0, seed)
        vocabulary = range(tokenizer.vocab_size)
        prompt = start(tokenizer, "x")
        images = torch.randint(
            0, 256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
        image_tokens = model.encode_image(images)
        texts = list(every_text(tokenizer, vocabulary, longest))
        ids, mask = tokenizer.pad([prompt.tolist() + text for text in texts])
        for image in range(2):
            one = image_tokens[image : image + 1]
            logp = model.lm_logits(ids, mask, one.expand(len(ids), -1, -1)).log_softmax(-1)
            own = logp[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
            totals = own[:, len(prompt) - 1 :].sum(1)
            lengths = torch.tensor([len(text) for text in texts])
            order = (totals / lengths**penalty).argsort(descending=True)
            found = beam_search(
                model, model.prefill_cross(one), prompt, 1, limits(tokenizer, longest), 90, 4, penalty, True
            )
            for rank in range(4):
                text = texts[order[rank]]
                assert found.tokens[rank, : len(text)].tolist() == text
                assert float(found.logprob[rank]) == pytest.approx(float(totals[order[rank]]), abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_beams_of_an_image_do_not_depend_on_its_neighbours(scene, penalty):
    model, tokenizer, tokens, cross = scene
    prompt = start(tokenizer)
    together = beam_search(model, cross, prompt, 7, limits(tokenizer, 8, 1, penalty), 3, 2)
    for image in range(7):
        one = tokens[image : image + 1]
        alone = beam_search(
            model, model.prefill_cross(one), prompt, 1, limits(tokenizer, 8, 1, penalty), 3, 2
        )
        assert torch.equal(alone.tokens, together.tokens[2 * image : 2 * image + 2])
        for row in range(2):
            expected, _ = logprob_of(model, alone.tokens[row], one, prompt, tokenizer.sep_id)
            assert float(alone.logprob[row]) == pytest.approx(expected, abs=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("method", "penalty", "shortest"),
    [("greedy", 1.0, 0), ("greedy", 1.5, 3), ("beam", 1.0, 0), ("beam", 1.3, 2)],
)
def test_same_texts_as_transformers(pair, images, transformers_twins, method, penalty, shortest):
    model, tokenizer = pair
    twin = transformers_twins(model, tokenizer.sep_id)["captioner"]
    ids = tokenizer.encode(["a picture of"])[0].repeat(7, 1)
    pixels = model.visual_encoder.normalise(images)
    prompt = ids[0, :-1].clone()
    prompt[0] = tokenizer.dec_id  # transformers penalises what was fed, and it feeds [DEC]
    theirs = twin.generate(
        pixels,
        ids,
        do_sample=False,
        num_beams=3 if method == "beam" else 1,
        max_length=len(prompt) + 8,
        min_length=len(prompt) + shortest,
        repetition_penalty=penalty,
        early_stopping=False,
    )[:, len(prompt) :]
    cross = model.prefill_cross(model.encode_image(images))
    if method == "beam":
        ours = beam_search(model, cross, prompt, 7, limits(tokenizer, 8, shortest, penalty), 3)
    else:
        ours = sample(model, cross, prompt, 7, limits(tokenizer, 8, shortest, penalty))
    for mine, other in zip(ours.tokens.tolist(), theirs.tolist(), strict=True):
        end = other.index(tokenizer.sep_id) + 1 if tokenizer.sep_id in other else 8
        assert mine[:end] == other[:end]  # what pads the rest is each library's own
        assert set(mine[end:]) <= {tokenizer.pad_id}
    assert len({tuple(row) for row in ours.tokens.tolist()}) > 2


@torch.no_grad()
@pytest.mark.parametrize(
    ("penalty", "shortest", "width", "prompt"),
    [(1.0, 1, 8, "a picture of"), (2.0, 0, 5, "a picture of"), (-1.0, 2, 6, ""), (0.5, 1, 8, "red dog")],
)
def test_the_released_rule_is_blips(
    scene, tiny_model, released_beam_search, penalty, shortest, width, prompt
):
    # Catches: lengths that count [SEP], or leave out the prompt; a search that stops by its best open beam; open beams
    # of the last step left out, or taken where the image was done before.
    agree = differ = 0
    for model, tokenizer in (scene[:2], tiny_model(["x", "y", "z", "w"], 2.0, 1)):
        generator = torch.Generator().manual_seed(5)
        images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=generator)
        encoded = model.encode_image(images)
        ids = start(tokenizer, prompt)
        cross = model.prefill_cross(encoded)
        here = limits(tokenizer, width, shortest)
        ours = beam_search(model, cross, ids, 6, here, 3, 3, penalty, rule="released")
        theirs = beam_search(model, cross, ids, 6, here, 3, 3, penalty)
        differ += int((ours.tokens != theirs.tokens).any(1).sum())
        for image in range(6):

            def logits_of(row, seen=encoded[image : image + 1], writer=model):
                return writer.lm_logits(torch.tensor([row]), None, seen)[0, -1]

            expected = released_beam_search(
                logits_of, ids.tolist(), tokenizer.sep_id, width, shortest, 3, penalty
            )
            for rank, (score, text) in enumerate(expected):
                row = ours.tokens[3 * image + rank].tolist()
                assert row == text + [tokenizer.pad_id] * (width - len(text))
                length = len(ids) + len(text) - (text[-1] == tokenizer.sep_id)
                assert float(ours.logprob[3 * image + rank]) / length**penalty == pytest.approx(
                    score, abs=1e-4
                )
                agree += 1
    assert agree == 36
    assert differ, "the two rules should differ somewhere for this test to mean anything"


@torch.no_grad()
@pytest.mark.parametrize("rule", ["transformers", "released"])
@pytest.mark.parametrize("shortest", [1, 3, 8])
def test_a_text_has_at_least_min_new_tokens_tokens(scene, rule, shortest):
    # Catches: a least length that counts the closing [SEP], or the prompt.
    model, tokenizer, _, cross = scene
    prompt, here = start(tokenizer), limits(tokenizer, 8, shortest)
    draws = uniforms(1, [str(i) for i in range(7)], 1, 8)
    rows = [
        *beam_search(model, cross, prompt, 7, here, 3, rule=rule).tokens.tolist(),
        *sample(model, cross, prompt, 7, here, draws).tokens.tolist(),
        *sample(model, cross, prompt, 7, here).tokens.tolist(),
    ]
    lengths = [row.index(tokenizer.sep_id) if tokenizer.sep_id in row else 8 for row in rows]
    assert min(lengths) >= shortest
    assert shortest > 1 or min(lengths) == 1


class Table:
    """A model whose next token depends on the last one alone, by probabilities."""

    def __init__(self, following):
        self.logits = torch.tensor(following).log()

    def new_cache(self, ways, max_length, cross):
        return SimpleNamespace(reorder=lambda ways: None, keep=lambda images: None)

    def decode(self, ids, cache, cross):
        return self.logits[ids[:, -1]]


SEP, A, B, C = range(4)


@pytest.mark.parametrize(
    ("first", "beams", "best"),
    [
        # [SEP] is third: with two beams it may not finish, though no longer text comes near it; with three it may.
        ([0.20, 0.40, 0.30, 0.10], 2, [A, SEP]),
        ([0.20, 0.40, 0.30, 0.10], 3, [SEP]),
        # Second of two, and second where there is one beam.
        ([0.30, 0.40, 0.20, 0.10], 2, [SEP]),
        ([0.30, 0.40, 0.20, 0.10], 1, [A, SEP]),
        # Last of all that two beams look at.
        ([0.18, 0.40, 0.22, 0.20], 2, [A, SEP]),
    ],
)
def test_only_the_best_continuations_of_a_step_may_finish(first, beams, best):
    """A text that ends in the second half of what a step looks at: by transformers' rule it is not one of the results, and
    taking it prefers short texts.
    """
    model = Table([first, [0.4, 0.2, 0.2, 0.2], [0.1, 0.3, 0.3, 0.3], [0.1, 0.3, 0.3, 0.3]])
    rules = Limits(SEP, SEP, 6, 0, 1.0)
    cross = [(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))]
    # Length counts for nothing, so that shorter is better.
    found = beam_search(model, cross, torch.tensor([SEP]), 1, rules, beams, length_penalty=0.0)
    assert found.tokens[0, : len(best)].tolist() == best
    expected = sum(float(model.logits[a, b]) for a, b in itertools.pairwise([SEP, *best]))
    assert float(found.logprob[0]) == pytest.approx(expected, abs=1e-5)


EAGER = {"greedy": 0.4, "nucleus": 2.0, "beam": 1.0}  # to end a text: so that half of them do, and not all


@torch.no_grad()
@pytest.mark.parametrize("method", ["greedy", "nucleus", "beam"])
def test_images_whose_texts_have_ended_are_dropped_and_nothing_changes(scene, monkeypatch, method):
    model, tokenizer, _, cross = scene
    model = copy.deepcopy(model)
    model.text_decoder.cls.predictions.bias[tokenizer.sep_id] += EAGER[method]
    prompt = start(tokenizer)
    draws = uniforms(2, [str(i) for i in range(7)], 2, 8)
    rows_fed = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda ids, *rest: rows_fed.append(len(ids)) or decode(ids, *rest))

    def written():
        rows_fed.clear()
        if method == "beam":
            return beam_search(model, cross, prompt, 7, limits(tokenizer, 8), 2, 2)
        if method == "nucleus":
            return sample(model, cross, prompt, 14, limits(tokenizer, 8), draws)
        return sample(model, cross, prompt, 7, limits(tokenizer, 8))

    fewer = written()
    assert rows_fed[-1] < rows_fed[1], "some texts should end early for this test to mean anything"
    monkeypatch.setattr(decoding, "_worth_keeping", lambda going: None)
    whole = written()
    assert len(set(rows_fed[1:])) == 1
    assert torch.equal(fewer.tokens, whole.tokens)
    assert torch.allclose(fewer.logprob, whole.logprob, atol=1e-5)
