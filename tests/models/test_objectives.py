"""Bugs caught here: a loss off by its mask, shift, direction or normalisation; a queue that contrasts with slots never
filled, or loses its place at the wrap; a "negative" that is the same image or the same text; gradients that leak into
momentum towers; an EMA, temperature or label smoothing that is not applied.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import deque

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from capfilt.errors import UserError
from capfilt.models import objectives as o
from capfilt.models.blip import Blip, BlipConfig, build
from capfilt.models.text import TextConfig
from capfilt.models.vision import VisionConfig

MICRO = BlipConfig(
    vision=VisionConfig(16, 8, width=32, depth=1, heads=2, hidden=64),
    text=TextConfig(40, 32, 2, 2, 64, max_positions=16, dropout=0.0, attention_dropout=0.0),
    embed_dim=16,
)


@dataclasses.dataclass(frozen=True)
class Rows:  # what the objectives read of a capfilt.data.loader.Batch
    pixels: Tensor | None
    features: Tensor | None
    ids: Tensor
    mask: Tensor
    image_index: Tensor
    text_index: Tensor
    example: Tensor


def rows(count: int = 6, seed: int = 0, length: int = 8) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 38, (count, length), generator=generator)
    lengths = torch.randint(4, length + 1, (count,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    ids[:, 0] = 2
    ids[~mask] = 0
    return Rows(
        torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        None,
        ids,
        mask,
        torch.arange(count),
        torch.arange(count),
        torch.arange(count),
    )


def unit(count: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(count, width, generator=generator), dim=1)


# ---------------------------------------------------------------------- ITC


def itc_by_hand(image, text, image_candidates, text_candidates, tau, targets, valid):
    """Cross-entropy against soft targets with Python floats, one number at a time."""
    sides = []
    for queries, candidates, target in (
        (image, text_candidates, targets[0]),
        (text, image_candidates, targets[1]),
    ):
        losses = []
        for query, wanted in zip(queries.tolist(), target.tolist(), strict=True):
            scores = [sum(a * b for a, b in zip(query, c, strict=True)) / tau for c in candidates.tolist()]
            existing = [s for s, v in zip(scores, valid, strict=True) if v]
            log_total = math.log(sum(math.exp(s) for s in existing))
            losses.append(
                -sum(y * (s - log_total) for y, s, v in zip(wanted, scores, valid, strict=True) if v)
            )
        sides.append(sum(losses) / len(losses))
    return sum(sides) / 2


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


def test_a_new_model_of_published_width_starts_near_the_logarithm_of_its_candidates():
    """Fresh towers map every image (and every text) near one point, so all similarities of a row are alike."""
    wide = BlipConfig(
        vision=VisionConfig(16, 8, width=768, depth=1, heads=12, hidden=64),
        text=TextConfig(40, 768, 1, 12, 64, max_positions=16, dropout=0.0, attention_dropout=0.0),
    )
    trainer = o.BlipPretraining(build(wide), o.PretrainingConfig(objectives=("itc",), queue_size=20)).train()
    for seed in range(5):
        with torch.no_grad():
            loss = trainer.losses(rows(6, seed=seed))["itc"].item()
        assert loss == pytest.approx(math.log(6 + min(20, 6 * seed)), abs=0.35)


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


def test_unfilled_slots_do_not_enter_the_loss():
    """A queue of 50,000 slots of which none is filled must cost nothing: the loss is that of the batch alone."""
    batch = rows()
    with_queue = o.BlipPretraining(build(MICRO), o.PretrainingConfig(objectives=("itc",), queue_size=50_000))
    without = o.BlipPretraining(build(MICRO), o.PretrainingConfig(objectives=("itc",), queue_size=0))
    assert with_queue.losses(batch)["itc"].item() == pytest.approx(
        without.losses(batch)["itc"].item(), abs=1e-6
    )


def test_queued_twins_are_positives_not_negatives():
    # The same batch again: each row's candidates now hold itself twice, and both count.
    trainer = o.BlipPretraining(
        build(MICRO), o.PretrainingConfig(objectives=("itc",), queue_size=32, momentum=None)
    )
    trainer.train()
    batch = rows(4)
    trainer.losses(batch)
    queued = trainer.queue.candidates()
    image, text = queued.image.clone(), queued.text.clone()
    loss = trainer.losses(batch)["itc"].item()
    target = torch.cat([torch.eye(4), torch.eye(4)], dim=1) / 2
    twice = (torch.cat([image, image]), torch.cat([text, text]))
    hand = itc_by_hand(image, text, *twice, 0.07, (target, target), [True] * 8)
    assert loss == pytest.approx(hand, abs=1e-5)


# ---------------------------------------------------------------------- ITM


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10_000))
def test_negatives_are_never_the_same_image_nor_the_identical_text(count, images, texts, seed):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, images, (count,), generator=generator)
    text = torch.randint(0, texts, (count,), generator=generator)
    similarity = torch.randn(count, count, generator=generator) * 20
    index, found = o.hard_negatives(similarity, image, text, generator)
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
        o.hard_negatives(similarity, torch.arange(4), torch.arange(4), generator)[0] for _ in range(4000)
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


def test_each_subset_of_objectives_gives_its_losses():
    for names in (
        ("itc",),
        ("itm",),
        ("lm",),
        ("itc", "itm"),
        ("itm", "lm"),
        ("itc", "lm"),
        ("itc", "itm", "lm"),
    ):
        trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(objectives=names, queue_size=8)).train()
        found = trainer.losses(rows(), 0.2)
        assert set(names) == {"itc", "itm", "lm"} & set(found)
        assert found["loss"].item() == pytest.approx(sum(found[name].item() for name in names), abs=1e-5)
        assert all(value.dtype == torch.float32 and value.dim() == 0 for value in found.values())
        found["loss"].backward()


def test_weights_multiply_losses():
    torch.manual_seed(0)
    config = o.PretrainingConfig(momentum=None, queue_size=0, weights={"lm": 2.0, "itc": 0.5})
    found = o.BlipPretraining(build(MICRO), config).losses(rows())
    hand = 0.5 * found["itc"].item() + found["itm"].item() + 2.0 * found["lm"].item()
    assert found["loss"].item() == pytest.approx(hand, abs=1e-5)


def gradients(trainer: o.BlipPretraining) -> set[str]:
    return {
        n
        for n, p in trainer.model.named_parameters(remove_duplicate=False)
        if p.grad is not None and p.grad.any()
    }


def test_gradients_flow_where_each_loss_says_and_never_into_momentum():
    heads = {
        ("itc",): {"vision_proj.weight", "text_proj.weight", "temperature"},
        ("itm",): {"itm_head.weight"},
        ("lm",): {
            "text_decoder.cls.predictions.bias",
            "text_decoder.bert.encoder.layer.0.attention.self.query.weight",
        },
    }
    crossed = "text_encoder.encoder.layer.0.crossattention.self.key.weight"
    for names, wanted in heads.items():
        trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(objectives=names, queue_size=8)).train()
        trainer.losses(rows(), 0.4)["loss"].backward()
        touched = gradients(trainer)
        assert wanted <= touched
        assert not touched & set.union(*(other for key, other in heads.items() if key != names))
        assert "visual_encoder.pos_embed" in touched
        assert (crossed in touched) == (names != ("itc",))
        momentum = [] if trainer.momentum is None else list(trainer.momentum.parameters())
        assert (trainer.momentum is not None) == (names == ("itc",))
        assert all(p.grad is None and not p.requires_grad for p in momentum)


def test_without_momentum_gradients_reach_both_sides_of_the_similarity():
    """With momentum the candidates are constants; without, a text also moves towards the images that looked for it."""
    trainer = o.BlipPretraining(
        build(MICRO), o.PretrainingConfig(objectives=("itc",), momentum=None, queue_size=0)
    ).train()
    batch = rows(4)
    trainer.losses(batch)["itc"].backward()
    got = trainer.model.text_proj.weight.grad.clone()
    trainer.zero_grad()
    model = trainer.model
    image = model.embed_image(model.encode_image(batch.pixels))
    text = model.embed_text(batch.ids, batch.mask)
    logits = image @ text.T / model.temperature
    labels = torch.arange(4)
    loss = torch.nn.functional.cross_entropy(logits, labels) + torch.nn.functional.cross_entropy(
        logits.T, labels
    )
    (loss / 2).backward()
    assert torch.allclose(got, model.text_proj.weight.grad, atol=1e-5)


def test_momentum_towers_move_before_they_are_used():
    trainer = o.BlipPretraining(
        build(MICRO), o.PretrainingConfig(objectives=("itc",), momentum=0.5, queue_size=8)
    )
    trainer.train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    frozen = copy.deepcopy(trainer.momentum)
    live = dict(trainer.model.named_parameters(remove_duplicate=False))
    batch = rows(4)
    trainer.losses(batch)
    with torch.no_grad():
        for name, parameter in frozen.named_parameters():
            parameter.copy_((parameter + live[name]) / 2)
        expected = frozen.embed_image(batch.pixels)
    assert torch.allclose(trainer.queue.candidates().image, expected, atol=1e-6)
    for name, parameter in trainer.momentum.named_parameters():
        assert torch.allclose(parameter, frozen.get_parameter(name), atol=1e-6), name


def test_a_further_micro_batch_moves_no_towers_and_still_fills_the_queue():
    trainer = o.BlipPretraining(
        build(MICRO), o.PretrainingConfig(objectives=("itc",), momentum=0.5, queue_size=8)
    ).train()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1)
        trainer.model.temperature.fill_(0.9)
    before = [parameter.clone() for parameter in trainer.momentum.parameters()]
    trainer.losses(rows(3), first=False)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.momentum.parameters(), strict=True))
    assert trainer.model.temperature.item() == pytest.approx(0.9)
    assert trainer.queue.filled == 3


@pytest.mark.parametrize("momentum", [0.995, None])
def test_recomputed_activations_give_the_same_losses_and_gradients(momentum):
    """A recomputation that draws other dropout masks, drop-paths or negatives than the pass it repeats."""
    config = dataclasses.replace(
        MICRO,
        vision=dataclasses.replace(MICRO.vision, depth=2, drop_path=0.5),
        text=dataclasses.replace(MICRO.text, dropout=0.3, attention_dropout=0.3),
    )
    found = []
    for on in (False, True):
        trainer = o.BlipPretraining(
            build(config), o.PretrainingConfig(queue_size=8, momentum=momentum)
        ).train()
        trainer.model.recompute_activations(on)
        torch.manual_seed(5)
        losses = trainer.losses(rows(), 0.4)
        losses["loss"].backward()
        gradients = {name: each.grad for name, each in trainer.named_parameters() if each.grad is not None}
        found.append((losses, gradients, torch.rand(3)))
    (kept, kept_gradients, kept_next), (again, again_gradients, again_next) = found
    assert kept.keys() == again.keys()
    for name, value in kept.items():
        assert torch.equal(value, again[name]), name
    assert kept_gradients.keys() == again_gradients.keys()
    for name, gradient in kept_gradients.items():
        assert torch.allclose(gradient, again_gradients[name], atol=1e-6), name
    # What is drawn after the step is what would have been drawn anyway: a resumed run may switch it on.
    assert torch.equal(kept_next, again_next)


def test_recomputing_keeps_fewer_tensors_for_the_backward_pass():
    def kept(on):
        trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=0, momentum=None)).train()
        trainer.model.recompute_activations(on)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            trainer.losses(rows())
        return sum(sizes)

    assert kept(True) < 0.6 * kept(False)


def test_momentum_for_another_batch_forgets_as_much_per_text():
    assert o.scaled_momentum(0.995, 2880, 2880) == 0.995
    assert o.scaled_momentum(0.995, 1440, 2880) == pytest.approx(0.9975, abs=1e-5)
    small, large = o.scaled_momentum(0.995, 32, 2880), o.scaled_momentum(0.995, 5760, 2880)
    assert small**90 == pytest.approx(0.995)
    assert large == pytest.approx(0.995**2)


def test_evaluation_moves_nothing():
    trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=8)).eval()
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    with torch.no_grad():
        trainer.model.temperature.fill_(0.9)
        before["model.temperature"].fill_(0.9)
        trainer.losses(rows(), 0.4)
    assert all(torch.equal(value, before[name]) for name, value in trainer.state_dict().items())


@pytest.mark.parametrize(("value", "clamped"), [(3.0, 0.5), (-1.0, 0.001), (0.2, 0.2)])
def test_temperature_is_clamped_in_place(value, clamped):
    trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=0)).train()
    with torch.no_grad():
        trainer.model.temperature.fill_(value)
    assert trainer.losses(rows())["temperature"].item() == pytest.approx(clamped)
    assert trainer.model.temperature.item() == pytest.approx(clamped)


def test_soft_targets_change_the_loss_only_with_alpha():
    trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(objectives=("itc",), queue_size=0))
    hard, soft = trainer.losses(rows(), 0.0)["itc"], trainer.losses(rows(), 0.4)["itc"]
    image, text = (
        trainer.momentum.embed_image(rows().pixels),
        trainer.momentum.embed_text(rows().ids, rows().mask),
    )
    eye = torch.eye(6)
    targets = []
    for a, b in ((image, text), (text, image)):
        targets.append(0.4 * (a @ b.T / 0.07).softmax(1) + 0.6 * eye)
    # Momentum towers are still equal to the live ones here, so the candidates are the embeddings themselves.
    hand = itc_by_hand(image, text, image, text, 0.07, targets, [True] * 6)
    assert soft.item() == pytest.approx(hand, abs=1e-4)
    assert hard.item() != pytest.approx(soft.item(), abs=1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 2, 32])
def test_losses_equal_the_models_own_calls_one_row_at_a_time(monkeypatch, chunk_rows):
    """Shared cross-attention keys, one pass for 3B rows, groups of similar length and no padding mask in LM must not
    change a single number.
    """
    monkeypatch.setattr(o, "CHUNK_ROWS", chunk_rows)
    model = build(MICRO).eval()
    trainer = o.BlipPretraining(model, o.PretrainingConfig(momentum=None, queue_size=0)).eval()
    batch = rows(5)
    torch.manual_seed(4)
    found = trainer.losses(batch)
    tokens = model.encode_image(batch.pixels)
    image, text = model.embed_image(tokens), model.embed_text(batch.ids, batch.mask)
    torch.manual_seed(4)
    wrong_text, _ = o.hard_negatives(image @ text.T / 0.07, batch.image_index, batch.text_index)
    wrong_image, _ = o.hard_negatives(text @ image.T / 0.07, batch.image_index, batch.text_index)
    itm, lm, words = [], [], 0
    for i in range(5):
        for a, b, label in ((i, i, 1), (int(wrong_image[i]), i, 0), (i, int(wrong_text[i]), 0)):
            keep = batch.mask[b]
            logits = model.match_logits(batch.ids[b : b + 1, keep], None, tokens[a : a + 1])
            itm.append(-logits.log_softmax(1)[0, label].item())
        keep = batch.mask[i]
        ids = batch.ids[i : i + 1, keep]
        logits = model.lm_logits(ids, None, tokens[i : i + 1])
        lm.append(
            o.language_loss(logits, ids, torch.ones_like(ids, dtype=torch.bool)).item() * (ids.shape[1] - 1)
        )
        words += ids.shape[1] - 1
    hard = torch.eye(5)
    assert found["itc"].item() == pytest.approx(
        itc_by_hand(image, text, image, text, 0.07, (hard, hard), [True] * 5), abs=1e-4
    )
    assert found["itm"].item() == pytest.approx(sum(itm) / 15, abs=1e-5)
    assert found["lm"].item() == pytest.approx(sum(lm) / words, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=80), st.integers(1, 40))
def test_length_chunks_have_every_row_once_and_cut_nothing(lengths, chunk_rows):
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    before, o.CHUNK_ROWS = o.CHUNK_ROWS, chunk_rows
    try:
        groups = o.length_chunks(mask)
    finally:
        o.CHUNK_ROWS = before
    assert len(groups) <= o.MAX_CHUNKS
    assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(len(lengths)))
    for some, length in groups:
        assert torch.equal(mask[some, :length].sum(1), mask[some].sum(1))


def test_a_prompt_is_given_not_learned():
    model = build(MICRO).eval()
    batch = rows(4)
    plain = o.BlipPretraining(model, o.PretrainingConfig(objectives=("lm",)))
    prompted = o.BlipPretraining(model, o.PretrainingConfig(objectives=("lm",), prompt_length=3))
    logits = model.lm_logits(batch.ids, batch.mask, model.encode_image(batch.pixels))
    assert prompted.losses(batch)["lm"].item() == pytest.approx(
        o.language_loss(logits, batch.ids, batch.mask, 3).item(), abs=1e-5
    )
    assert plain.losses(batch)["lm"].item() != pytest.approx(prompted.losses(batch)["lm"].item(), abs=1e-4)


def test_duplicates_fill_a_batch_without_negatives():
    batch = dataclasses.replace(rows(4), image_index=torch.zeros(4, dtype=torch.int64))
    found = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=4)).train().losses(batch, 0.4)
    assert found["itm"].item() == 0.0
    assert math.isfinite(found["loss"].item())


@pytest.mark.parametrize("count", [1, 2, 3, 11])
def test_any_batch_size_goes_through_a_small_queue(count):
    trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=7)).train()
    for seed in range(3):
        found = trainer.losses(rows(count, seed=seed), 0.4)
        assert all(math.isfinite(value.item()) for value in found.values())
        found["loss"].backward()


def test_a_frozen_tower_is_left_out_of_the_average():
    model = build(MICRO)
    model.visual_encoder.requires_grad_(False)
    trainer = o.BlipPretraining(model, o.PretrainingConfig(queue_size=4))
    mine, live = trainer.momentum.pairs(model)
    assert len(mine) == len(live) > 0
    assert not {id(p) for p in live} & {id(p) for p in model.visual_encoder.parameters()}


def test_towers_carry_nothing_that_texts_alone_do_not_use():
    names = [name for name, _ in o.BlipPretraining(build(MICRO)).momentum.named_parameters()]
    assert not [name for name in names if "crossattention" in name or "decoder" in name or "itm" in name]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objectives": ("itc", "mlm")}, "objectives"),
        ({"objectives": ()}, "objectives"),
        ({"objectives": ("lm",), "weights": {"itc": 1.0}}, "itc"),
        ({"queue_size": -1}, "queue_size"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(UserError, match=said):
        o.PretrainingConfig(**options)


def test_half_precision_keeps_losses_in_fp32():
    trainer = o.BlipPretraining(build(MICRO), o.PretrainingConfig(queue_size=8)).eval()
    exact = trainer.losses(rows(), 0.4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(0)
        rough = trainer.losses(rows(), 0.4)
    assert all(value.dtype == torch.float32 for value in rough.values())
    assert rough["lm"].item() == pytest.approx(exact["lm"].item(), rel=0.05)
    assert rough["itc"].item() == pytest.approx(exact["itc"].item(), rel=0.1)


def test_model_is_a_blip():
    # What is saved after training is `trainer.model` alone: nothing of the trainer may hang on it.
    trainer = o.BlipPretraining(build(MICRO))
    assert isinstance(trainer.model, Blip)
    assert set(trainer.model.state_dict()) == set(build(MICRO).state_dict())


def test_negatives_go_from_uniform_to_the_published_draw():
    assert o.hardness_ramp(0, 100) == 0.0
    assert o.hardness_ramp(50, 100) == 0.5
    assert o.hardness_ramp(500, 100) == 1.0
    assert o.hardness_ramp(0, 0) == 1.0  # published: hard from the start
    similarity = torch.zeros(4, 4)
    similarity[0, 2] = 20.0
    index = torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    hard = [int(o.hard_negatives(similarity, index, index, generator)[0][0]) for _ in range(200)]
    easy = [int(o.hard_negatives(0.0 * similarity, index, index, generator)[0][0]) for _ in range(200)]
    assert hard.count(2) == 200
    assert 30 < easy.count(2) < 110
