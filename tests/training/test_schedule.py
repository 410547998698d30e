"""Bugs caught here: a schedule off by one at its joints or with a step of rate 0; an epoch that is not the loader's; a
published schedule that is not what was published.
"""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.loader import Plan
from capfilt.training import schedule
from capfilt.training.config import TrainConfig
from tests.refusals import refused


def rates(steps, warmup, peak=1.0, low=0.1):
    return [schedule.learning_rate(step, steps, peak, low, warmup) for step in range(steps)]


def test_schedule_values():
    values = rates(104, 4)
    assert values[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert values[4] == 1.0
    assert values[54] == pytest.approx(0.55)  # half-way down the cosine
    assert values[29] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert schedule.learning_rate(104, 104, 1.0, 0.1, 4) == pytest.approx(0.1)


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(0, 400))
def test_schedule_rises_then_falls_between_its_bounds(steps, warmup):
    values = rates(steps, warmup, peak=1.0, low=0.0)
    top = min(warmup, steps // 2)
    assert values[top] == 1.0
    assert all(0.0 < value <= 1.0 for value in values)
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)


def test_a_line_falls_evenly_from_the_peak_to_the_end():
    rates = [schedule.learning_rate(step, 104, 1.0, 0.1, 4, "linear") for step in range(105)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    falls = [high - low for high, low in itertools.pairwise(rates[4:])]
    assert falls == pytest.approx([0.009] * 100)
    assert rates[-1] == pytest.approx(0.1)
    config = TrainConfig(steps=104, learning_rate=1.0, min_lr=0.1, warmup_steps=4, schedule="linear")
    assert [config.rate(step) for step in range(104)] == rates[:-1]


def test_finetuning_by_epoch_is_the_released_cosine():
    """lr0 * 0.5 * (1 + cos(pi * e / E)) for every step of epoch e: the peak first, no warm-up, never 0."""
    config = TrainConfig(
        steps=50, batch_size=4, epoch_texts=40, schedule="epoch-cosine", learning_rate=1e-5, min_lr=0.0
    )
    found = [config.rate(step) for step in range(50)]
    expected = [1e-5 * 0.5 * (1 + math.cos(math.pi * (step // 10) / 5)) for step in range(50)]
    assert found == pytest.approx(expected)
    assert found[0] == 1e-5
    assert found[-1] > 0


@pytest.mark.parametrize(("texts", "batch"), [(566_747, 256), (1000, 64), (7, 3)])
def test_epochs_that_no_batch_divides_are_as_many(texts, batch):
    # COCO's 566,747 captions in batches of 256: the last batch of five epochs reaches into a sixth, which no rate knows.
    config = TrainConfig(
        steps=math.ceil(5 * texts / batch),
        batch_size=batch,
        epoch_texts=texts,
        schedule="epoch-cosine",
        learning_rate=1.0,
        min_lr=0.0,
    )
    found = [config.rate(math.ceil(epoch * texts / batch)) for epoch in range(5)]
    assert found == pytest.approx([1.0, 0.9045, 0.6545, 0.3455, 0.0955], abs=1e-4)


def test_pretraining_by_epoch_is_the_released_decay():
    """Epoch 0 rises from 1e-6 over the warm-up and stays; epoch e has 3e-4 * 0.9 ** e, never less than 1e-6."""
    config = TrainConfig(
        steps=600, batch_size=10, epoch_texts=100, schedule="epoch-decay", learning_rate=3e-4, warmup_steps=4
    )
    found = [config.rate(step) for step in range(600)]
    assert found[0] == 1e-6
    assert found[2] == pytest.approx((1e-6 + 3e-4) / 2)
    assert found[4:10] == [3e-4] * 6
    assert found[10:20] == pytest.approx([2.7e-4] * 10)
    assert found[199] == pytest.approx(3e-4 * 0.9**19)
    assert found[-1] == 1e-6
    slow = TrainConfig(steps=9, batch_size=1, epoch_texts=3, schedule="epoch-decay", warmup_steps=1000)
    assert slow.rate(2) == pytest.approx(1e-6 + 2 * (3e-4 - 1e-6) / 1000)
    assert slow.rate(3) == pytest.approx(2.7e-4)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 60))
def test_an_epoch_is_the_loaders(texts, batch_size, steps):
    plan = Plan(texts, batch_size, steps=steps)
    config = TrainConfig(
        steps=steps, batch_size=batch_size, epoch_texts=texts, schedule="epoch-cosine", min_lr=0.0
    )
    for step in range(steps - 1):
        changed = config.rate(step) != config.rate(step + 1)
        assert changed == (plan.epoch(step) != plan.epoch(step + 1))


def test_a_schedule_by_epoch_needs_the_epoch():
    with refused("epoch_texts"):
        TrainConfig(steps=3, schedule="epoch-decay")
    with refused("schedule square"):
        TrainConfig(steps=3, schedule="square")
