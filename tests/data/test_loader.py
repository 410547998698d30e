"""Catches: examples lost or repeated at an epoch's seam, a resumed run that sees other batches, shares that drift from
the mixing weights, and a text tokenised otherwise than the tokenizer does.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.loader import Batch, Mix, Plan, TokenTable, ahead, capped
from capfilt.data.tokenizer import Tokenizer
from tests.refusals import refused

TEXTS = ["a red circle", "two blue squares, isn't it", "", "a picture", "red " * 50]


def flat(plan: Plan) -> list[int]:
    return [row for step in range(plan.steps) for row in plan.rows(step).tolist()]


@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_every_example_once_per_epoch(count: int, size: int, epochs: int, seed: int) -> None:
    plan = Plan(count, size, seed=seed, epochs=epochs)
    rows = flat(plan)
    assert len(rows) == epochs * count
    for epoch in range(epochs):
        assert sorted(rows[epoch * count : (epoch + 1) * count]) == list(range(count))
    # Only the very last batch may be smaller.
    assert all(len(plan.rows(step)) == size for step in range(plan.steps - 1))
    assert [plan.epoch(step) for step in range(plan.steps)] == [s * size // count for s in range(plan.steps)]


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 10), st.integers(0, 3))
def test_any_step_can_be_asked_for_alone(count: int, size: int, seed: int) -> None:
    forward = [rows.tolist() for rows in map(Plan(count, size, seed=seed, steps=12).rows, range(12))]
    assert [Plan(count, size, seed=seed, steps=12).rows(step).tolist() for step in range(12)] == forward
    backward = Plan(count, size, seed=seed, steps=12)
    assert [backward.rows(step).tolist() for step in reversed(range(12))] == forward[::-1]


def test_seed_and_epoch_change_the_order() -> None:
    one = flat(Plan(100, 10, seed=0, epochs=2))
    assert one == flat(Plan(100, 10, seed=0, epochs=2))
    assert one != flat(Plan(100, 10, seed=1, epochs=2))
    assert one[:100] != one[100:]


@pytest.mark.parametrize(
    "mixing", [{"human": 1, "web": 1, "synthetic": 2}, {"human": 5, "web": 1, "synthetic": 0}]
)
def test_mixing_holds_in_every_stretch(mixing: dict[str, float]) -> None:
    mix = Mix({"human", "web", "synthetic"}, mixing, 3)
    which = mix.which(np.arange(1920))
    total = sum(mixing.values())
    for start in range(0, 1920 - 320, 160):
        seen = Counter(mix.sources[number] for number in which[start : start + 320].tolist())
        for source, weight in mixing.items():
            assert seen[source] / 320 == pytest.approx(weight / total, abs=0.02)
    assert mix.counts(1000) == np.bincount(which[:1000], minlength=len(mix.sources)).tolist()


@given(
    st.dictionaries(st.sampled_from(["human", "web", "synthetic"]), st.floats(0.01, 100), min_size=2),
    st.floats(0, 1),
)
def test_a_bound_caps_its_source_and_leaves_the_others_in_proportion(
    mixing: dict[str, float], most: float
) -> None:
    found = capped(mixing, {"synthetic": most})
    total = sum(mixing.values())
    if mixing.get("synthetic", 0) <= most * total:
        assert found == mixing
        return
    assert found["synthetic"] == most
    assert sum(found.values()) == pytest.approx(1)
    others = [name for name in mixing if name != "synthetic"]
    for name in others:
        assert found[name] * mixing[others[0]] == pytest.approx(found[others[0]] * mixing[name])


def test_resuming_far_into_a_mixture_is_cheap() -> None:
    mixing = {"human": 1.0, "web": 3.0}
    started = time.perf_counter()
    counts = Mix({"human", "web"}, mixing, 0).counts(5_120_000)
    assert time.perf_counter() - started < 5
    again = Mix({"human", "web"}, mixing, 0)
    again.counts(5_119_744)
    assert again.counts(5_120_000) == counts


def test_wrong_options_say_what_to_do() -> None:
    with refused("examples"):
        Plan(0, 4, epochs=1)
    present = {"human", "web"}
    with refused("mixing", "synthetic"):
        Mix(present, {"human": 1, "web": 1, "synthetic": 1}, 0)
    with refused("mixing", "source web"):
        Mix(present, {"human": 1}, 0)
    with refused("web", -1):
        Mix(present, {"human": 1, "web": -1}, 0)
    with refused("--synthetic-share"):
        capped({"synthetic": 2.0}, {"synthetic": 0.5})
    with refused("mixing", "every 0"):
        Mix(present, {"human": 0, "web": 0}, 0)
    with refused("batch_size 0"):
        Plan(3, 0, epochs=1)
    with pytest.raises(ValueError, match="epochs or steps"):
        Plan(3, 4)
    with pytest.raises(IndexError):
        Plan(3, 4, epochs=1).rows(1)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=6),
    st.sampled_from(["", "a picture of "]),
    st.integers(2, 12),
)
def test_token_table_is_the_tokenizer(rows: list[int], prompt: str, max_length: int) -> None:
    tokenizer = Tokenizer.train(TEXTS * 3, vocab_size=80)
    table = TokenTable.build(TEXTS, tokenizer, max_length, prompt)
    ids, mask = table.read(np.array(rows))
    wanted_ids, wanted_mask = tokenizer.encode([TEXTS[row] for row in rows], max_length, prompt)
    assert torch.equal(ids, wanted_ids)
    assert torch.equal(mask, wanted_mask)
    fixed, fixed_mask = table.read(np.array(rows), pad_to=max_length + 1)
    assert fixed.shape[1] == max_length + 1
    assert torch.equal(fixed[:, : ids.shape[1]], ids)
    assert torch.equal(fixed_mask.sum(1), mask.sum(1))


def empty_batch(step: int) -> Batch:
    nothing = torch.zeros(1, dtype=torch.int64)
    return Batch(nothing, nothing, nothing, nothing, nothing, nothing.float(), nothing.bool(), ["x"], step, 0)


def test_one_batch_is_madeahead_and_no_more() -> None:
    made: list[int] = []
    ready = threading.Event()

    def assemble(step: int) -> Batch:
        made.append(step)
        if step == 1:
            ready.set()
        return empty_batch(step)

    stream = ahead(assemble, range(10), 1)
    assert next(stream).step == 0
    assert ready.wait(5)
    time.sleep(0.05)
    assert made == [0, 1]
    stream.close()
    assert [batch.step for batch in ahead(empty_batch, range(3), 0)] == [0, 1, 2]


def test_an_error_while_assembling_reaches_the_reader() -> None:
    def assemble(step: int) -> Batch:
        if step == 2:
            raise RuntimeError("disk gone")
        return empty_batch(step)

    stream = ahead(assemble, range(5), 1)
    assert [next(stream).step, next(stream).step] == [0, 1]
    with pytest.raises(RuntimeError, match="disk gone"):
        next(stream)


def test_batch_moves_whole() -> None:
    batch = empty_batch(7)
    moved = batch.to("meta")
    assert moved.ids.device.type == moved.weight.device.type == "meta"
    assert (moved.texts, moved.step, moved.pixels) == (["x"], 7, None)
    assert batch.ids.device.type == "cpu"


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 15))
def test_the_parts_of_a_batch_are_its_rows_in_order(count: int, parts: int) -> None:
    """A micro-batch that lost a row, or whose texts are not those of its ids."""
    numbers = torch.arange(count)
    whole = Batch(
        ids=numbers[:, None].repeat(1, 3),
        mask=torch.ones(count, 3, dtype=torch.bool),
        image_index=numbers,
        text_index=numbers,
        example=numbers,
        weight=numbers.float(),
        sided=numbers % 2 == 0,
        texts=[str(number) for number in range(count)],
        step=7,
        epoch=1,
        pixels=numbers[:, None, None, None].repeat(1, 3, 2, 2).to(torch.uint8),
    )
    found = whole.split(parts)
    assert len(found) == min(parts, count)
    sizes = [len(part) for part in found]
    assert max(sizes) - min(sizes) <= 1
    for name in ("ids", "mask", "image_index", "text_index", "example", "weight", "sided", "pixels"):
        assert torch.equal(torch.cat([getattr(part, name) for part in found]), getattr(whole, name))
    assert [text for part in found for text in part.texts] == whole.texts
    assert {(part.step, part.epoch, part.features) for part in found} == {(7, 1, None)}
