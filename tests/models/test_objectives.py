"""Bugs caught here: a loss off by its mask, shift, direction or normalisation; a queue that contrasts with slots never
filled, or loses its place at the wrap; a "negative" that is the same image or the same text; an EMA or label
smoothing that is not applied.
"""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capfilt.models.common import objectives as o
from tests.models.rows import itc_by_hand


def unit(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


# ---------------------------------------------------------------------- ITC


@pytest.mark.parametrize("masked", [False, True])
def test_contrastive_loss_equals_a_loop_over_python_floats(masked):
    image, text, images, texts = unit(4, 6, 1), unit(4, 6, 2), unit(9, 6, 3), unit(9, 6, 4)
    valid = torch.tensor([True] * 4 + [True, False, True, False, True]) if masked else None
    matches = torch.zeros(4, 9, dtype=torch.bool)
    matches[torch.arange(4), torch.arange(4)] = True
    matches[1, 6] = True
    targets = (
        o.contrastive_targets(matches, 0.3, o.similarities(image, texts, 0.2), valid),
        o.contrastive_targets(matches, 0.3, o.similarities(text, images, 0.2), valid),
    )
    loss = o.contrastive_loss(image, text, images, texts, 0.2, targets, valid)
    exists = [True] * 9 if valid is None else valid.tolist()
    assert loss.item() == pytest.approx(
        itc_by_hand(image, text, images, texts, 0.2, targets, exists), abs=1e-5
    )


def test_targets_by_hand():
    matches = torch.tensor([[True, False, True, True]])
    momentum = torch.tensor([[0.0, math.log(2.0), 0.0, 0.0]])
    assert o.contrastive_targets(matches)[0].tolist() == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3])
    soft = o.contrastive_targets(matches, 0.5, momentum)[0].tolist()
    assert soft == pytest.approx([1 / 6 + 0.1, 0.2, 1 / 6 + 0.1, 1 / 6 + 0.1])
    # With the last candidate missing, its mass goes to the others on both sides of the mixture.
    soft = o.contrastive_targets(matches, 0.5, momentum, torch.tensor([True, True, True, False]))[0].tolist()
    assert soft == pytest.approx([0.25 + 0.125, 0.25, 0.25 + 0.125, 0.0])


def test_positives_count_same_images_and_identical_texts():
    image, text = torch.tensor([1, 2]), torch.tensor([7, 8])
    image_candidates, text_candidates = torch.tensor([1, 2, 1, 3]), torch.tensor([7, 8, 9, 8])
    every = o.positives(image, text, image_candidates, text_candidates)
    assert every.tolist() == [[True, False, True, False], [False, True, False, True]]
    paper = o.positives(image, text, image_candidates, text_candidates, multi_positive=False)
    assert paper.tolist() == [[True, False, False, False], [False, True, False, False]]


@pytest.mark.parametrize(("temperature", "tolerance"), [(1.0, 0.02), (0.5, 0.02), (0.07, 0.25)])
def test_initial_loss_of_random_embeddings_over_the_paper_queue(temperature, tolerance):
    """Random unit vectors in E dimensions: similarities are about N(0, 1/E), independent of the target, so the loss is
    ln C + 1 / (2 E tau^2): ln(Q + B) itself where tau is large against 1/sqrt(E), 0.40 more at the initial 0.07.
    """
    batch, width, queued = 8, 256, 57600
    candidates = batch + queued
    image, text = unit(batch, width, 1), unit(batch, width, 2)
    images, texts = unit(candidates, width, 3), unit(candidates, width, 4)
    hard = o.contrastive_targets(torch.eye(batch, candidates, dtype=torch.bool))
    loss = o.contrastive_loss(image, text, images, texts, temperature, (hard, hard)).item()
    expected = math.log(candidates) + 1 / (2 * width * temperature**2)
    # What is left is the mean of 16 one-hot target scores, each N(0, 1/E) / tau.
    assert loss == pytest.approx(expected, abs=tolerance + 2 / (16 * width) ** 0.5 / temperature)
    if temperature >= 0.5:
        assert loss == pytest.approx(10.96, abs=0.1)


# ---------------------------------------------------------------------- queue


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 9), batches=st.lists(st.integers(0, 20), max_size=8))
def test_queue_holds_what_a_deque_would(size, batches):
    queue, reference, number = o.FeatureQueue(size, 2), deque(maxlen=size), 0
    for count in batches:
        numbers = torch.arange(number, number + count)
        number += count
        values = numbers[:, None].float().expand(count, 2)
        queue.enqueue(values, -values, numbers, numbers + 1000)
        reference.extend(numbers.tolist())
        stored = queue.candidates()
        assert sorted(stored.image_index.tolist()) == list(reference)
        assert torch.equal(stored.text_index, stored.image_index + 1000)
        assert torch.equal(stored.image[:, 0], stored.image_index.float())
        assert torch.equal(stored.text[:, 1], -stored.image_index.float())
        assert stored.valid.all()
        # In age order from the write position: the oldest is the next to go.
        if len(reference) == size:
            ordered = torch.roll(queue.image_index, -queue.position).tolist()
            assert ordered == list(reference)


def test_queue_of_no_size_takes_anything():
    queue = o.FeatureQueue(0, 2)
    queue.enqueue(torch.ones(3, 2), torch.ones(3, 2), torch.arange(3), torch.arange(3))
    assert len(queue.candidates().image) == 0


def test_a_non_finite_row_is_no_candidate_and_leaves_no_nan():
    queue = o.FeatureQueue(4, 2)
    image = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, math.inf]])
    queue.enqueue(image, torch.ones(3, 2), torch.arange(3), torch.arange(3))
    stored = queue.candidates()
    assert stored.valid.tolist() == [True, False, False]
    assert torch.isfinite(stored.image).all()


def test_queue_survives_its_state_dict():
    queue = o.FeatureQueue(5, 2)
    queue.enqueue(torch.ones(7, 2), torch.ones(7, 2), torch.arange(7), torch.arange(7))
    other = o.FeatureQueue(5, 2)
    other.load_state_dict(queue.state_dict())
    for each in (queue, other):
        each.enqueue(torch.zeros(2, 2), torch.zeros(2, 2), torch.tensor([50, 51]), torch.tensor([50, 51]))
    assert queue.image_index.tolist() == other.image_index.tolist()
    assert other.filled == 5


# ---------------------------------------------------------------------- ITM


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_negatives_are_never_the_same_image_nor_the_identical_text(count, images, texts, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, images, (count,), generator=generator)
    text = torch.randint(0, texts, (count,), generator=generator)
    similarity = torch.randn(count, count, generator=generator) * 20
    index, found = o.hard_negatives(similarity, image, text, generator=generator)
    for i in range(count):
        candidates = [j for j in range(count) if image[j] != image[i] and text[j] != text[i]]
        assert bool(found[i]) == bool(candidates)
        if candidates:
            assert int(index[i]) in candidates


def test_negatives_follow_the_softmax_of_the_similarities():
    weights = torch.tensor([0.0, 1.0, 2.0, 5.0])
    similarity = weights.log().clamp(min=-50.0).expand(4, 4)
    generator = torch.Generator().manual_seed(0)
    draws = [
        o.hard_negatives(similarity, torch.arange(4), torch.arange(4), generator=generator)[0]
        for _ in range(4000)
    ]
    share = torch.stack(draws).eq(3).float().mean(0).tolist()
    # Row 0 draws among candidates 1, 2, 3 with weights 1:2:5, rows 1 and 2 lose their own; row 3 never draws itself.
    assert share == pytest.approx([5 / 8, 5 / 7, 5 / 6, 0.0], abs=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_similarities_draw_instead_of_raising(bad):
    similarity = torch.full((4, 4), bad)
    index, found = o.hard_negatives(similarity, torch.arange(4), torch.arange(4))
    assert found.all()
    assert (index != torch.arange(4)).all()


def test_a_batch_of_one_has_no_negative_and_no_loss():
    index, found = o.hard_negatives(torch.ones(1, 1), torch.arange(1), torch.arange(1))
    kept = o.matching_rows(index, index, found)
    logits = torch.randn(3, 2, requires_grad=True)
    result = o.matching_loss(logits, kept.label, kept.keep)
    result.loss.backward()
    assert result.loss.item() == 0.0
    assert logits.grad is not None
    assert logits.grad.abs().sum() == 0.0


def test_matching_rows_pair_images_and_texts():
    made = o.matching_rows(torch.tensor([1, 0]), torch.tensor([1, 0]), torch.tensor([True, False]))
    pairs = list(
        zip(made.image.tolist(), made.text.tolist(), made.label.tolist(), made.keep.tolist(), strict=True)
    )
    assert pairs == [
        (0, 0, 1, True),
        (1, 1, 1, False),
        (1, 0, 0, True),  # a wrong image for text 0
        (0, 1, 0, False),
        (0, 1, 0, True),  # a wrong text for image 0
        (1, 0, 0, False),
    ]


def test_collapsed_head_costs_0_6365():
    label = torch.tensor([1] * 8 + [0] * 16)
    prior = torch.tensor([2 / 3, 1 / 3]).log().expand(24, 2)
    result = o.matching_loss(prior, label)
    assert result.loss.item() == pytest.approx(0.6365, abs=5e-5)
    assert result.loss.item() == pytest.approx(o.COLLAPSED_ITM, abs=1e-6)
    assert result.accuracy.item() == pytest.approx(2 / 3)
    assert result.balanced_accuracy.item() == 0.5


def test_matching_loss_by_hand():
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.5, 0.0], [0.0, 3.0], [9.0, 9.5]])
    label = torch.tensor([1, 1, 0, 0, 1])
    keep = torch.tensor([True, True, True, True, False])
    losses = []
    for (no, yes), wanted in zip(logits.tolist()[:4], [1, 1, 0, 0], strict=True):
        losses.append(math.log(math.exp(no) + math.exp(yes)) - (yes if wanted else no))
    result = o.matching_loss(logits, label, keep)
    assert result.loss.item() == pytest.approx(sum(losses) / 4, abs=1e-6)
    assert result.accuracy.item() == 0.5
    assert result.balanced_accuracy.item() == 0.5
    assert o.matching_loss(logits[:1], label[:1]).balanced_accuracy.item() == 1.0


# ---------------------------------------------------------------------- LM


def test_language_floor_is_1_3577_at_berts_vocabulary():
    vocabulary = 30524
    ids = torch.tensor([[2, 9, 8, 3]])
    logits = torch.full((1, 4, vocabulary), math.log(0.1 / vocabulary))
    for position, target in enumerate((9, 8, 3)):
        logits[0, position, target] = math.log(0.9 + 0.1 / vocabulary)
    mask = torch.ones_like(ids, dtype=torch.bool)
    floor = -(0.9 + 0.1 / vocabulary) * math.log(0.9 + 0.1 / vocabulary)
    floor -= (vocabulary - 1) * 0.1 / vocabulary * math.log(0.1 / vocabulary)
    assert floor == pytest.approx(1.3577, abs=5e-5)
    # 2e-4: torch adds thirty thousand probabilities of 3e-6 to one of 0.9 in fp32.
    assert o.language_loss(logits, ids, mask).item() == pytest.approx(floor, abs=2e-4)


@pytest.mark.parametrize("prompt_length", [0, 1, 3])
def test_language_loss_by_hand(prompt_length):
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])
    mask = torch.tensor([[True] * 5, [True, True, True, False, False]])
    logits = torch.randn(2, 5, 11, generator=generator)
    losses = []
    for row in range(2):
        for position in range(1, 5):
            if not mask[row, position] or position < prompt_length:
                continue
            scores = logits[row, position - 1].tolist()
            log_total = math.log(sum(math.exp(s) for s in scores))
            wanted = [0.1 / 11 + (0.9 if k == int(ids[row, position]) else 0.0) for k in range(11)]
            losses.append(-sum(y * (s - log_total) for y, s in zip(wanted, scores, strict=True)))
    assert o.language_loss(logits, ids, mask, prompt_length).item() == pytest.approx(
        sum(losses) / len(losses), abs=1e-5
    )


def test_no_token_to_predict_is_no_loss():
    ids, mask = torch.tensor([[2, 3]]), torch.tensor([[True, False]])
    assert o.language_loss(torch.randn(1, 2, 7), ids, mask).item() == 0.0


# ---------------------------------------------------------------------- schedules and averages


def test_alpha_ramp_values():
    assert [o.alpha_ramp(s, 10) for s in (0, 5, 10, 50)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert o.alpha_ramp(0, 0, alpha=0.3) == 0.3


def test_ema_by_hand():
    average, live = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])
    o.ema_update([average], [live], 0.995)
    assert average.tolist() == pytest.approx([1.01, 2.0])


# ---------------------------------------------------------------------- the whole step


def test_momentum_for_another_batch_forgets_as_much_per_text():
    assert o.scaled_momentum(0.995, 2880, 2880) == 0.995
    assert o.scaled_momentum(0.995, 1440, 2880) == pytest.approx(0.9975, abs=1e-5)
    small, large = o.scaled_momentum(0.995, 32, 2880), o.scaled_momentum(0.995, 5760, 2880)
    assert small**90 == pytest.approx(0.995)
    assert large == pytest.approx(0.995**2)


def test_negatives_go_from_uniform_to_the_published_draw():
    assert o.hardness_ramp(0, 100) == 0.0
    assert o.hardness_ramp(50, 100) == 0.5
    assert o.hardness_ramp(500, 100) == 1.0
    assert o.hardness_ramp(0, 0) == 1.0  # published: hard from the start
    similarity = torch.zeros(4, 4)
    similarity[0, 2] = 20.0
    index = torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    hard = [int(o.hard_negatives(similarity, index, index, generator=generator)[0][0]) for _ in range(200)]
    easy = [
        int(o.hard_negatives(0.0 * similarity, index, index, generator=generator)[0][0]) for _ in range(200)
    ]
    assert hard.count(2) == 200
    assert 30 < easy.count(2) < 110
