"""Catches: examples lost or repeated at an epoch's seam, a resumed run that sees other batches, shares that drift from
the mixing weights, an image that never shows some of its texts, and a text tokenised otherwise than the tokenizer does.
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

from capfilt.data.corpus import from_images
from capfilt.data.loader import Batch, Plan, TokenTable, ahead, batches
from capfilt.data.tokenizer import Tokenizer
from capfilt.tables.contracts import IMAGES
from tests.refusals import refused
from tests.worlds import image_rows

TEXTS = ["a red circle", "two blue squares, isn't it", "", "a picture", "red " * 50]


def flat(plan: Plan) -> list[int]:
    return [row for step in range(plan.steps) for row in plan.rows(step).tolist()]


def corpora() -> st.SearchStrategy[tuple[np.ndarray, list[str]]]:
    """image_of_text and sources of a small corpus."""
    pairs = st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["human", "web", "synthetic"])), min_size=1, max_size=30
    )
    return pairs.map(lambda rows: (np.array([image for image, _ in rows]), [source for _, source in rows]))


@given(corpora(), st.integers(1, 40), st.integers(1, 4), st.integers(0, 3))
def test_every_example_once_per_epoch(
    corpus: tuple[np.ndarray, list[str]], size: int, epochs: int, seed: int
) -> None:
    images, sources = corpus
    plan = Plan(images, sources, size, seed=seed, epochs=epochs)
    rows = flat(plan)
    assert len(rows) == epochs * len(images)
    for epoch in range(epochs):
        assert sorted(rows[epoch * len(images) : (epoch + 1) * len(images)]) == list(range(len(images)))
    # Only the very last batch may be smaller.
    assert all(len(plan.rows(step)) == size for step in range(plan.steps - 1))
    assert [plan.epoch(step) for step in range(plan.steps)] == [
        s * size // len(images) for s in range(plan.steps)
    ]


@settings(max_examples=40)
@given(corpora(), st.integers(1, 10), st.integers(0, 3), st.booleans(), st.booleans())
def test_any_step_can_be_asked_for_alone(
    corpus: tuple[np.ndarray, list[str]], size: int, seed: int, mixed: bool, one_text: bool
) -> None:
    images, sources = corpus
    mixing = {source: 1.0 + index for index, source in enumerate(sorted(set(sources)))} if mixed else None

    def plan() -> Plan:
        return Plan(images, sources, size, seed=seed, steps=12, mixing=mixing, one_text_per_image=one_text)

    forward = [plan_rows.tolist() for plan_rows in map(plan().rows, range(12))]
    assert [plan().rows(step).tolist() for step in range(12)] == forward
    backward = plan()
    assert [backward.rows(step).tolist() for step in reversed(range(12))] == forward[::-1]


def test_seed_and_epoch_change_the_order() -> None:
    images, sources = np.arange(100), ["web"] * 100
    one = flat(Plan(images, sources, 10, seed=0, epochs=2))
    assert one == flat(Plan(images, sources, 10, seed=0, epochs=2))
    assert one != flat(Plan(images, sources, 10, seed=1, epochs=2))
    assert one[:100] != one[100:]


@given(corpora(), st.integers(1, 7), st.integers(0, 3))
def test_one_text_per_image(corpus: tuple[np.ndarray, list[str]], size: int, seed: int) -> None:
    images, sources = corpus
    pictures = len(set(images.tolist()))
    most = max(Counter(images.tolist()).values())
    plan = Plan(images, sources, size, seed=seed, epochs=2 * most, one_text_per_image=True)
    assert plan.epoch_size == pictures
    rows = np.array(flat(plan))
    for epoch in range(2 * most):
        shown = images[rows[epoch * pictures : (epoch + 1) * pictures]]
        assert sorted(shown.tolist()) == sorted(set(images.tolist()))
    for image, texts in Counter(images.tolist()).items():
        shown = [row for row in rows.tolist() if images[row] == image]
        # Each of K texts once in every K epochs.
        for start in range(0, len(shown) - texts + 1, texts):
            assert len(set(shown[start : start + texts])) == texts


@pytest.mark.parametrize(
    "mixing", [{"human": 1, "web": 1, "synthetic": 2}, {"human": 5, "web": 1, "synthetic": 0}]
)
def test_mixing_holds_in_every_stretch(mixing: dict[str, float]) -> None:
    sources = ["human"] * 7 + ["web"] * 300 + ["synthetic"] * 50
    plan = Plan(np.arange(len(sources)), sources, 32, seed=3, steps=60, mixing=mixing)
    rows = np.array(flat(plan))
    total = sum(mixing.values())
    for start in range(0, len(rows) - 320, 160):
        seen = Counter(sources[row] for row in rows[start : start + 320])
        for source, weight in mixing.items():
            assert seen[source] / 320 == pytest.approx(weight / total, abs=0.02)
    # Within a source every example comes once before any comes again.
    for source in mixing:
        mine = [row for row in rows.tolist() if sources[row] == source]
        size = sources.count(source)
        for start in range(0, len(mine) - size + 1, size):
            assert len(set(mine[start : start + size])) == size


def test_resuming_far_into_a_mixture_is_cheap() -> None:
    sources = ["human", "web"] * 500
    mixing = {"human": 1.0, "web": 3.0}
    plan = Plan(np.arange(1000), sources, 256, steps=100_000, mixing=mixing)
    started = time.perf_counter()
    rows = plan.rows(20_000)
    assert time.perf_counter() - started < 5
    again = Plan(np.arange(1000), sources, 256, steps=100_000, mixing=mixing)
    again.rows(19_999)
    assert np.array_equal(again.rows(20_000), rows)


def test_wrong_options_say_what_to_do() -> None:
    images, sources = np.arange(3), ["human", "web", "web"]
    with refused("examples"):
        Plan(np.array([], dtype=np.int64), [], 4, epochs=1)
    with refused("mixing", "synthetic"):
        Plan(images, sources, 4, epochs=1, mixing={"human": 1, "web": 1, "synthetic": 1})
    with refused("mixing", "source web"):
        Plan(images, sources, 4, epochs=1, mixing={"human": 1})
    with refused("web", -1):
        Plan(images, sources, 4, epochs=1, mixing={"human": 1, "web": -1})
    with refused("mixing", "every 0"):
        Plan(images, sources, 4, epochs=1, mixing={"human": 0, "web": 0})
    with refused("batch_size 0"):
        Plan(images, sources, 0, epochs=1)
    with pytest.raises(ValueError, match=r"epochs.*steps"):
        Plan(images, sources, 4)
    with pytest.raises(IndexError):
        Plan(images, sources, 4, epochs=1).rows(1)


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


def test_a_transform_sees_pixels_sides_and_step_and_not_what_came_before() -> None:
    """Pictures varied by a counter of calls, which a resumed run starts from nothing."""
    rows = image_rows("human", 6, source="human")
    corpus = from_images([IMAGES.table(rows)], size=16)
    tokenizer = Tokenizer.train(corpus.texts, vocab_size=80)
    seen: list[tuple[int, int]] = []

    def transform(pixels: torch.Tensor, sided: torch.Tensor, step: int) -> torch.Tensor:
        seen.append((len(pixels), len(sided)))
        return pixels.flip(0) if step % 2 else pixels + step

    plain = list(batches(corpus, tokenizer, 3, steps=4))
    changed = list(batches(corpus, tokenizer, 3, steps=4, transform=transform))
    resumed = list(batches(corpus, tokenizer, 3, steps=4, start_step=2, transform=transform))
    assert seen == [(3, 3)] * 6
    assert torch.equal(changed[1].pixels, plain[1].pixels.flip(0))
    assert torch.equal(changed[2].pixels, plain[2].pixels + 2)
    for one, other in zip(changed[2:], resumed, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert torch.equal(one.ids, other.ids)
