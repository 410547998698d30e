"""Catches: an example that two ranks see or none does, batches that depend on how many processes decode or where a run
was cut, a text with another image's pixels, mixed shares that drift, and a stream that holds the whole corpus after all.
"""

from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data.corpus import from_images, from_pairs, from_verdicts
from capfilt.data.loader import Batch
from capfilt.data.stream import PairStream, StreamInput, _Order
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import Augmentation, Crops, training_uint8
from capfilt.tables.contracts import PAIRS, VERDICTS
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from tests.refusals import failed, refused
from tests.worlds import failed_row, image_rows, jpeg, write_images

SIZE = 16
SHARDS = (7, 3, 11, 5, 9)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red green blue white square number 0 1 2 3"] * 3, 120)


def web(path, shards=SHARDS, texts=2, **options) -> Part:
    made, start = [], 0
    for size in shards:
        made.append(image_rows("web", size, start=start, texts=texts, split="train", **options))
        start += size
    return write_images(Part(path / "web"), made)


def stream(*parts: Part) -> PairStream:
    return PairStream([StreamInput(part) for part in parts])


def same(one: Batch, other: Batch) -> bool:
    tensors = ("ids", "mask", "image_index", "text_index", "example", "weight", "sided", "pixels")
    return one.texts == other.texts and all(torch.equal(getattr(one, k), getattr(other, k)) for k in tensors)


def first_epoch(pairs: PairStream, tokenizer: Tokenizer, **options) -> list[int]:
    seen = []
    for batch in pairs.batches(tokenizer, 1, size=SIZE, steps=10_000, window=20, **options):
        if batch.epoch:
            break
        seen += batch.example.tolist()
    return seen


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch_without_loss_or_repetition(tmp_path, tokenizer, world):
    pairs = stream(web(tmp_path))
    each = [first_epoch(pairs, tokenizer, rank=rank, world=world) for rank in range(world)]
    assert sorted(number for seen in each for number in seen) == list(range(70))
    assert all(each)
    assert each[0] != sorted(each[0])


def test_more_ranks_than_row_groups_is_an_error_not_a_hang(tmp_path, tokenizer):
    pairs = stream(web(tmp_path, (4, 4)))
    with refused("2 row groups", "3 ranks"):
        pairs.batches(tokenizer, 2, size=SIZE, steps=1, world=3)


def test_processes_that_decode_and_a_cut_change_nothing(tmp_path, tokenizer):
    pairs = stream(web(tmp_path))
    options = {"size": SIZE, "steps": 25, "window": 16, "seed": 3}
    whole = list(pairs.batches(tokenizer, 8, **options))
    assert len(whole) == 25  # almost three epochs
    assert [batch.step for batch in whole] == list(range(25))
    for cut in (1, 8, 9, 24):
        rest = list(pairs.batches(tokenizer, 8, start_step=cut, **options))
        assert all(same(a, b) for a, b in zip(whole[cut:], rest, strict=True))
    elsewhere = list(pairs.batches(tokenizer, 8, workers=2, **options))
    assert all(same(a, b) for a, b in zip(whole, elsewhere, strict=True))
    other_seed = list(pairs.batches(tokenizer, 8, **{**options, "seed": 4}))
    assert not same(whole[0], other_seed[0])


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=30),
    window=st.integers(1, 40),
    start=st.integers(0, 200),
    ranks=st.sampled_from([(0, 1), (0, 2), (1, 2)]),
)
def test_a_position_is_the_same_wherever_one_starts(counts, window, start, ranks):
    counts = np.array([2, 1, *counts])
    order = _Order(counts, [5], *ranks, window)

    def positions(begin: int) -> list[tuple[int, int, int]]:
        found: list[tuple[int, int, int]] = []
        for some in order.windows(begin):
            where = [(unit, place) for unit in some.units for place in range(counts[unit])]
            assert len(where) <= window + 9
            found += [(some.epoch, *where[place]) for place in some.places.tolist()]
            if len(found) >= 50:
                return found[:50]
        raise AssertionError

    assert positions(start) == (islice_all(order, counts, start + 50))[start:]


def islice_all(order: _Order, counts, stop: int) -> list[tuple[int, int, int]]:
    """Every position from 0, by walking."""

    def walk():
        for some in order.windows(0):
            where = [(unit, place) for unit in some.units for place in range(counts[unit])]
            for place in some.places.tolist():
                yield (some.epoch, *where[place])

    return list(islice(walk(), stop))


def test_what_it_yields_is_what_a_held_corpus_holds(tmp_path, tokenizer):
    rows = image_rows("web", 9, texts=3, split="train")
    rows[2]["captions"] = ["", "a fine text", "..."]
    rows[3]["split"] = "val"
    rows[4]["captions"] = []
    rows[5]["captions"] = [None, "x" * 10_001, "another"]
    part = write_images(
        Part(tmp_path / "p"), [rows, [failed_row("web", "lost"), *image_rows("web", 3, start=20)]]
    )
    pairs, held = stream(part), from_images(part.tables(), size=SIZE)
    assert (len(pairs), pairs.images) == (len(held), len(held.image_ids))
    assert pairs.skipped == held.skipped
    assert pairs.deselected == held.deselected
    assert pairs.texts_by_source() == held.texts_by_source()
    assert [text.key for _, text in pairs.rows()] == held.text_ids

    by_id = {row["image_id"]: row for row in [*rows, *image_rows("web", 3, start=20)]}
    listed = list(pairs.rows())
    ids = {}
    for batch in pairs.batches(tokenizer, 4, size=SIZE, steps=12, window=5):
        assert batch.pixels is not None
        for place, number in enumerate(batch.example.tolist()):
            image, text = listed[number]
            assert batch.texts[place] == text.text
            expected = training_uint8(by_id[image]["image"]["bytes"], SIZE)
            assert np.array_equal(batch.pixels[place].numpy(), expected)
            assert ids.setdefault(image, int(batch.image_index[place])) == int(batch.image_index[place])
    assert len(set(ids.values())) == len(ids) == pairs.images


def test_pairs_and_verdicts_come_as_they_do_held(tmp_path):
    part = web(tmp_path)
    verdicts = Part(tmp_path / "verdicts")
    mark = verdicts.begin(VERDICTS, "test", {})
    corpus = Part(tmp_path / "pairs")
    pairs_mark = corpus.begin(PAIRS, "test", {})
    for shard in part.shards():
        judged, kept = [], []
        for number, row in enumerate(part.read(shard).to_pylist()):
            for index, text in enumerate([*row["captions"], "made up"]):
                source = "synthetic" if text == "made up" else "web"
                judged.append(
                    {
                        "text_id": text_id(row["image_id"], source, text, "", index), "image_id": row["image_id"],
                        "source": source, "text": text, "keep": (number + index) % 2 == 0, "reason": "a test",
                    }
                )  # fmt: skip
            texts = [
                {"text": t["text"], "source": t["source"], "itm_score": 0.9, "weight": 1.0}
                for t in judged
                if t["keep"] and t["image_id"] == row["image_id"]
            ]
            kept.append({"image_id": row["image_id"], "image": row["image"], "texts": texts, "split": None})
        verdicts.commit(shard, VERDICTS.table(judged), Counts(len(judged), len(judged)), mark, 0.1)
        corpus.commit(shard, PAIRS.table(kept), Counts(len(kept), len(kept)), pairs_mark, 0.1)
    joined = PairStream([StreamInput(part, verdicts)])
    held = from_verdicts(part.tables(), verdicts.tables(), size=SIZE)
    assert sorted(text.key for _, text in joined.rows()) == sorted(held.text_ids)
    assert joined.texts_by_source() == held.texts_by_source()
    streamed, whole = stream(corpus), from_pairs(corpus.tables(), size=SIZE)
    assert [text.key for _, text in streamed.rows()] == whole.text_ids


def test_shares_hold_and_one_text_per_image_takes_turns(tmp_path, tokenizer):
    (tmp_path / "h").mkdir()
    human = write_images(
        Part(tmp_path / "h" / "human"), [image_rows("human", 8, source="human", texts=3, split="train")]
    )
    pairs = stream(web(tmp_path), human)
    seen: Counter[str] = Counter()
    listed = [text.source for _, text in pairs.rows()]
    for batch in pairs.batches(tokenizer, 10, size=SIZE, steps=40, mixing={"web": 1, "human": 3}, window=12):
        sources = Counter(listed[number] for number in batch.example.tolist())
        assert abs(sources["human"] - 7.5) <= 1.5
        seen += sources
    assert abs(seen["human"] / 400 - 0.75) < 0.01

    only = stream(human)
    epochs: dict[int, list[int]] = {}
    for batch in only.batches(tokenizer, 1, size=SIZE, steps=24, one_text_per_image=True):
        epochs.setdefault(batch.epoch, []).extend(batch.example.tolist())
    assert [sorted(number // 3 for number in epochs[epoch]) for epoch in range(3)] == [list(range(8))] * 3
    assert sorted(number for epoch in range(3) for number in epochs[epoch]) == list(range(24))


def test_a_bad_picture_leaves_its_batch_smaller_and_is_counted(tmp_path, tokenizer):
    rows = image_rows("web", 6, split="train")
    rows[1]["image"]["bytes"] = b"not a picture"
    rows[4]["image"] = None
    pairs = stream(write_images(Part(tmp_path / "p"), [rows]))
    (batch,) = pairs.batches(tokenizer, 6, size=SIZE, steps=1)
    assert sorted(batch.example.tolist()) == [0, 2, 3, 5]
    assert pairs.skipped == {"not_an_image": 1, "no_image": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_all_bad_end_the_run_by_name(tmp_path, tokenizer, workers):
    rows = image_rows("web", 4, split="train")
    for row in rows:
        row["image"]["bytes"] = jpeg("red")[:40]
    pairs = stream(write_images(Part(tmp_path / "p"), [rows]))
    with failed("step 1", "4 pictures", "--verify"):
        list(pairs.batches(tokenizer, 4, size=SIZE, steps=1, workers=workers))


def test_a_corpus_without_a_text_is_refused_with_the_reasons(tmp_path):
    part = write_images(Part(tmp_path / "p"), [[failed_row("web", "lost")]])
    with refused(tmp_path / "p", "not_found 1"):
        stream(part)


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    def peak(name: str, count: int) -> int:
        rows = image_rows("web", count, split="train")
        for number, row in enumerate(rows):
            row["image"] = {"bytes": np.random.default_rng(number).bytes(20_000), "path": None}
        (tmp_path / name).mkdir()
        part = write_images(Part(tmp_path / name / "p"), [rows[i : i + 50] for i in range(0, count, 50)])
        del rows, row
        pairs = stream(part)
        order = _Order(pairs._texts[""], [0], 0, 1, 100)
        tracemalloc.start()
        try:
            for _ in islice(pairs._stream(order, "", 0, False), count):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak("small", 400), peak("large", 1600)
    assert small > 100 * 20_000
    assert large < 1.5 * small


def test_texts_see_crops_of_their_own_wherever_a_run_was_cut(tmp_path, tokenizer):
    """Two texts of a picture that see the same crop, or a resumed run that sees others than the run it continues."""
    pairs = stream(web(tmp_path, shards=(6,), texts=3))
    how = {
        "size": SIZE, "steps": 6, "seed": 1, "window": 9,
        "crops": Crops(Augmentation(scale=(0.2, 0.5), flip=0.5), (1, 0)),
    }  # fmt: skip
    whole = list(pairs.batches(tokenizer, 9, **how))
    assert all(
        same(a, b) for a, b in zip(whole[3:], pairs.batches(tokenizer, 9, start_step=3, **how), strict=True)
    )
    for batch in whole:
        views = {view.numpy().tobytes() for view in batch.pixels}
        assert len(views) == len(batch) == 9
        assert len(batch.image_index.unique()) < 9
    varied = dict(how, transform=lambda pixels, _sided, _step: 255 - pixels)
    assert torch.equal(next(pairs.batches(tokenizer, 9, **varied)).pixels, 255 - whole[0].pixels)
