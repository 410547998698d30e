"""Catches: an example that two ranks see or none does, batches that depend on the number of ranks, on a cache, on how many
processes decode or on where a run was cut, a text with another image's pixels, mixed shares that drift, and a stream that
holds the whole corpus after all.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.data import pairs as module
from capfilt.data.cleaning import clean
from capfilt.data.loader import Batch
from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs, _Order
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import Views, training_picture, training_uint8
from capfilt.errors import UserError
from capfilt.tables.contracts import PAIRS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from tests.refusals import failed
from tests.worlds import failed_row, image_rows, jpeg, write_images

SIZE = 16
SHARDS = (7, 3, 11, 5, 9)
CROPS = Views((0.2, 0.5), flip=0.5, seed=1)
VARIED = Views((0.2, 0.5), flip=0.5, operations=2, seed=1)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a red green blue white square number 0 1 2 3"] * 3, 120)


def web(path, shards=SHARDS, texts=2, **options) -> Part:
    made, start = [], 0
    for size in shards:
        made.append(image_rows("web", size, start=start, texts=texts, split="train", **options))
        start += size
    return write_images(Part(path / "web"), made)


def pairs_of(*parts: Part, cache: int = 0, **options) -> Pairs:
    return Pairs([PairInput(part) for part in parts], size=SIZE, cache=cache, **options)


TENSORS = ("ids", "mask", "image_index", "text_index", "example", "sided", "pixels")


def same(one: Batch, other: Batch) -> bool:
    return (one.texts, one.step, one.epoch) == (other.texts, other.step, other.epoch) and all(
        torch.equal(getattr(one, k), getattr(other, k)) for k in TENSORS
    )


@pytest.fixture(autouse=True)
def small_windows(monkeypatch):
    """Windows of several row groups and not of the whole corpus."""
    monkeypatch.setattr(module, "WINDOW", 16)
    monkeypatch.setattr(module, "WINDOW_BATCHES", 2)


def together(shares: list[Batch], parts: int) -> list[str]:
    """The batch of all ranks, micro-batch after micro-batch: a line for each text, its pixels included."""
    found = []
    for part in zip(*(share.split(parts) for share in shares), strict=True):
        for share in part:
            shape = zip(share.example.tolist(), share.pixels, share.image_index.tolist(), strict=True)
            found += [f"{n} {image} {hashlib.md5(p.numpy().tobytes()).hexdigest()}" for n, p, image in shape]
    return found


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("views", [None, CROPS, VARIED], ids=["squares", "crops", "randaugment"])
def test_any_number_of_ranks_has_the_same_batches(tmp_path, tokenizer, views, parts):
    """A run that goes on with another number of ranks and sees other texts, or other views of them, than it would have."""
    part = web(tmp_path)
    mixing = {"web": 1}
    found = {}
    for world in (1, 2, 3):
        source = pairs_of(part, cache=10**9 if world == 2 else 0)
        options = {"steps": 9, "seed": 3, "views": views, "parts": parts, "world": world, "mixing": mixing}
        ranks = [
            list(source.batches(tokenizer, 12, rank=rank, start_step=3 if rank else 0, **options))
            for rank in range(world)
        ]
        assert all(len(batch) == 12 // world for rank in ranks for batch in rank)
        found[world] = [together(list(some), parts) for some in zip(*(r[-6:] for r in ranks), strict=True)]
    assert found[1] == found[2] == found[3]
    # A micro-batch is the same texts, whether one rank has two of them or two ranks have one each.
    halves = [pairs_of(part).batches(tokenizer, 12, steps=2, rank=n, world=2) for n in range(2)]
    (whole,) = islice(pairs_of(part).batches(tokenizer, 12, steps=2), 1)
    for half, alone in zip(halves, whole.split(2), strict=True):
        assert next(half).example.tolist() == alone.example.tolist()


def test_a_rank_reads_its_share_of_the_row_groups(tmp_path, tokenizer, monkeypatch):
    """Every rank reading every picture: a network that carries the corpus once per rank."""
    part = web(tmp_path, (4,) * 40, texts=1)
    monkeypatch.setattr(module, "WINDOW", 160)
    source, read, original = pairs_of(part), Counter(), Pairs._read
    for world in (1, 4):
        monkeypatch.setattr(
            Pairs, "_read", lambda self, group, world=world: (read.update([world]), original(self, group))[1]
        )
        assert len(list(source.batches(tokenizer, 40, steps=4, world=world))) == 4
    assert read[1] == 40
    assert read[4] <= 20


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_an_epoch_without_loss_or_repetition(tmp_path, tokenizer, world):
    source = pairs_of(web(tmp_path))
    seen = []
    for rank in range(world):
        for batch in source.batches(tokenizer, 10, steps=7, rank=rank, world=world):
            seen += batch.example.tolist()
    assert sorted(seen) == list(range(70))
    assert seen != sorted(seen)


def test_more_ranks_than_row_groups_share_them(tmp_path, tokenizer):
    source = pairs_of(web(tmp_path, (4, 4), texts=1))
    ranks = [list(source.batches(tokenizer, 8, steps=1, rank=rank, world=4)) for rank in range(4)]
    assert sorted(n for (batch,) in ranks for n in batch.example.tolist()) == list(range(8))


@pytest.mark.parametrize("views", [None, VARIED], ids=["squares", "views"])
def test_neither_a_cache_nor_processes_nor_a_cut_change_anything(tmp_path, tokenizer, views):
    """Pictures that were cropped as squares where they were held; a cache that is too small; a run that was cut."""
    rows = image_rows("web", 9, texts=2, split="train")
    for number, row in enumerate(rows):
        row["image"] = {"bytes": jpeg("red", 20 + 5 * number, number), "path": None}
    rows[4]["image"] = {"bytes": b"broken", "path": None}
    part = write_images(Part(tmp_path / "odd"), [rows])
    part = [web(tmp_path), part]
    options = {"steps": 30, "seed": 3, "views": views, "mixing": None}
    first = pairs_of(*part)
    whole = list(first.batches(tokenizer, 8, **options))
    assert len(whole) == 30  # almost three epochs
    assert [batch.step for batch in whole] == list(range(30))
    assert first.skipped == {"not_an_image": 1}
    one = training_picture(jpeg("red"), SIZE).nbytes if views else 3 * SIZE * SIZE
    for cache in (10 * one, 10**9):
        cached = pairs_of(*part, cache=cache)
        assert all(same(a, b) for a, b in zip(whole, cached.batches(tokenizer, 8, **options), strict=True))
        assert cached.skipped == first.skipped
        again = cached.batches(tokenizer, 8, **options)
        assert all(same(a, b) for a, b in zip(whole, again, strict=True))
    for cut in (1, 8, 9, 29):
        rest = list(first.batches(tokenizer, 8, start_step=cut, **options))
        assert all(same(a, b) for a, b in zip(whole[cut:], rest, strict=True))
    apart = pairs_of(*part, workers=2)
    assert all(same(a, b) for a, b in zip(whole, apart.batches(tokenizer, 8, **options), strict=True))
    other_seed = next(iter(first.batches(tokenizer, 8, **{**options, "seed": 4})))
    assert not same(whole[0], other_seed)


def test_a_cache_reads_each_picture_once(tmp_path, tokenizer, monkeypatch):
    """Pictures that are decoded in every epoch although they fit, or read before anybody needs them."""
    source = pairs_of(web(tmp_path), cache=10**9)
    calls = []
    for name in ("training_uint8", "training_picture"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda data, size, f=original: (calls.append(1), f(data, size))[1])
    encoded = []
    original_encode = Tokenizer.encode_ragged
    monkeypatch.setattr(
        Tokenizer,
        "encode_ragged",
        lambda self, texts, *a: (encoded.extend(texts), original_encode(self, texts, *a))[1],
    )
    assert sum(map(len, source.batches(tokenizer, 7, steps=40))) == 280
    assert len(calls) == 35
    assert len(encoded) == 70
    # From squares to whole pictures, which another training may ask for.
    assert len(list(source.batches(tokenizer, 7, steps=20, views=CROPS))) == 20
    assert len(calls) == 70


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=30),
    window=st.integers(1, 40),
    start=st.integers(0, 200),
)
def test_a_position_is_the_same_wherever_one_starts(counts, window, start):
    counts = np.array([2, 1, *counts])

    def rows(begin: int, count: int) -> list[tuple]:
        order = _Order(counts, [5], window)
        order.begin(begin)
        return [row for some in (3, count - 3) for row in order.take(some).tolist()]

    walked = rows(0, start + 50)
    assert rows(start, 50) == walked[start:]
    total = int(counts.sum())
    for epoch in range((start + 50) // total):
        seen = [(group, place) for _, group, place, _, _ in walked[epoch * total : (epoch + 1) * total]]
        assert sorted(seen) == [(g, p) for g, count in enumerate(counts.tolist()) for p in range(count)]
    assert all(0 <= depth < 1 for _, _, _, depth, _ in walked)


def test_an_order_is_shuffled_in_windows_that_are_alike() -> None:
    """A last window of a few texts in the order of their shard, or texts of a row group that meet in every batch."""
    counts = np.full(100, 10)
    order = _Order(counts, [0], 300)
    assert order.size == pytest.approx(1000 / 3)
    epoch = order.take(1000)
    groups = epoch["group"]
    for start in range(0, 1000, 50):
        assert len(set(groups[start : start + 50].tolist())) > 20
    assert np.corrcoef(groups, np.arange(1000))[0, 1] < 0.2
    assert not np.array_equal(order.take(1000)["group"], groups)


def test_batches_hold_what_they_say(tmp_path, tokenizer):
    rows = image_rows("web", 9, texts=3, split="train")
    rows[2]["captions"] = ["", "a fine text", "..."]
    rows[3]["split"] = "val"
    rows[4]["captions"] = []
    rows[5]["captions"] = [None, "x" * 10_001, "on the LEFT"]
    part = write_images(
        Part(tmp_path / "p"), [rows, [failed_row("web", "lost"), *image_rows("web", 3, start=20)]]
    )
    source = pairs_of(part)
    assert (len(source), source.pictures) == (5 * 3 + 3 + 2 - 1 + 1, 10)
    assert source.skipped == {"empty_text": 3, "too_long": 1, "not_found": 1}
    assert source.deselected == {"split": 1, "no_text": 1}
    assert source.texts_by_source() == {"web": len(source)}
    by_id = {row["image_id"]: row for row in [*rows, *image_rows("web", 3, start=20)]}
    listed = list(source.identities())
    assert [text.text for _, text in listed] == list(source.texts())
    ids = {}
    for batch in source.batches(tokenizer, 4, steps=12, prompt="a picture of "):
        assert batch.features is None
        for place, number in enumerate(batch.example.tolist()):
            image, text = listed[number]
            assert batch.texts[place] == text.text
            expected = training_uint8(by_id[image]["image"]["bytes"], SIZE)
            assert np.array_equal(batch.pixels[place].numpy(), expected)
            assert ids.setdefault(image, int(batch.image_index[place])) == int(batch.image_index[place])
            read = batch.ids[place][batch.mask[place]].tolist()
            assert read == tokenizer.encode_ragged([text.text], prompt="a picture of ")[0]
            assert batch.sided[place].item() == ("LEFT" in text.text)
    assert len(set(ids.values())) == len(ids) == source.pictures


def test_indices_say_which_images_and_texts_are_the_same(tmp_path, tokenizer):
    """Two pictures or texts that are one, and false negatives of each other."""
    captions = [["Red.", "red"], ["RED!", "blue"], ["green (x)"], ["blue"], ["red", "Blue"]]
    parts = []
    for number, some in enumerate((captions[:3], captions[3:])):
        rows = image_rows("web", len(some), split="train")  # a picture that two parts have
        for row, texts in zip(rows, some, strict=True):
            row["captions"] = texts
        parts.append(write_images(Part(tmp_path / f"p{number}"), [rows]))
    source = pairs_of(*parts)
    owners = [image for image, _ in source.identities()]
    (batch,) = source.batches(tokenizer, len(source), steps=1)
    ids = [owners[number] for number in batch.example.tolist()]
    for one in range(len(batch)):
        for other in range(len(batch)):
            assert (batch.image_index[one] == batch.image_index[other]).item() == (ids[one] == ids[other])
            alike = clean(batch.texts[one]) == clean(batch.texts[other])
            assert (batch.text_index[one] == batch.text_index[other]).item() == alike


def test_shares_hold_over_texts_of_two_sources(tmp_path, tokenizer):
    (tmp_path / "h").mkdir()
    human = write_images(
        Part(tmp_path / "h" / "human"), [image_rows("human", 8, source="human", texts=3, split="train")]
    )
    source = pairs_of(web(tmp_path), human)
    seen: Counter[str] = Counter()
    every: Counter[int] = Counter()
    listed = [text.source for _, text in source.identities()]
    for batch in source.batches(tokenizer, 10, steps=40, mixing={"web": 1, "human": 3}):
        sources = Counter(listed[number] for number in batch.example.tolist())
        assert abs(sources["human"] - 7.5) <= 1.5
        seen += sources
        every.update(batch.example.tolist())
    assert abs(seen["human"] / 400 - 0.75) < 0.01
    # Within a source every text comes as often as any other.
    for name in ("web", "human"):
        counts = [every[number] for number, found in enumerate(listed) if found == name]
        assert max(counts) - min(counts) <= 1
    with pytest.raises(UserError, match="mixing"):
        source.batches(tokenizer, 10, steps=1, mixing={"human": 1})


def test_synthetic_texts_take_their_share_at_most_and_are_marked(tmp_path, tokenizer):
    """Would catch: a share that is of the texts and not of the draws, one that changes nothing else's order for nothing, and
    a text marked as another."""
    rows = image_rows("web", 30, split="train")
    for row in rows:
        texts = [("web", "a web text")] + [("synthetic", f"written {k}") for k in range(3)]
        row["texts"] = [{"text": text, "source": source, "weight": 1.0} for source, text in texts]
    part = Part(tmp_path / "pairs")
    mark = part.begin(PAIRS, "test", {})
    columns = ("image_id", "dataset", "key", "image", "texts", "split")
    part.commit(
        0, PAIRS.table([{name: row[name] for name in columns} for row in rows]), Counts(30, 30), mark, 0.0
    )
    source = pairs_of(part)
    texts = [text for _, text in source.identities()]

    def drawn(**more):
        seen = []
        for batch in source.batches(tokenizer, 10, steps=40, **more):
            assert batch.synthetic.tolist() == [
                texts[n].source == "synthetic" for n in batch.example.tolist()
            ]
            seen.append(batch.example.tolist())
        return seen

    def share(seen):
        return np.mean([texts[n].source == "synthetic" for some in seen for n in some])

    plain = drawn()
    assert share(plain) == pytest.approx(0.75, abs=0.03)
    assert drawn(most={"synthetic": 0.8}) == plain
    for most in (0.25, 0.0):
        assert share(drawn(most={"synthetic": most})) == pytest.approx(most, abs=0.01)
    # The bound holds over a mix too.
    assert share(drawn(mixing={"web": 1, "synthetic": 1}, most={"synthetic": 0.25})) == pytest.approx(
        0.25, abs=0.01
    )
    assert share(drawn(mixing={"web": 1, "synthetic": 1}, most={"synthetic": 0.6})) == pytest.approx(
        0.5, abs=0.01
    )


@pytest.mark.parametrize("cache", [0, 10**9])
def test_a_bad_picture_leaves_its_batch_smaller_and_is_counted(tmp_path, tokenizer, cache):
    rows = image_rows("web", 6, split="train")
    rows[1]["image"]["bytes"] = b"not a picture"
    rows[4]["image"] = None
    source = pairs_of(write_images(Part(tmp_path / "p"), [rows]), cache=cache)
    for batch in source.batches(tokenizer, 6, steps=3):
        assert sorted(batch.example.tolist()) == [0, 2, 3, 5]
    assert source.skipped == {"not_an_image": 1, "no_image": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_are_all_bad_end_the_run_by_name(tmp_path, tokenizer, workers):
    rows = image_rows("web", 41, split="train")
    for row in rows[:-1]:
        row["image"]["bytes"] = jpeg("red")[:40]
    source = pairs_of(write_images(Part(tmp_path / "p"), [rows]), workers=workers)
    with failed("step", "decode", "doctor --verify"):
        list(source.batches(tokenizer, 4, steps=9))


def test_features_follow_their_pictures(tmp_path, tokenizer, monkeypatch):
    def mean(pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().reshape(len(pixels), 3, 4, -1).mean(3).transpose(1, 2)

    monkeypatch.setattr(module, "_FEATURED", 5)
    rows = image_rows("web", 9, start=50, split="train")
    rows[3]["image"]["bytes"] = b"broken"
    parts = [web(tmp_path), write_images(Part(tmp_path / "p"), [rows])]
    plain = list(pairs_of(*parts).batches(tokenizer, 6, steps=20))
    source = pairs_of(*parts, cache=10**9)
    source.with_features(mean)
    assert source.skipped == {"not_an_image": 1}
    monkeypatch.setattr(Pairs, "_read", None)
    for batch, other in zip(source.batches(tokenizer, 6, steps=20), plain, strict=True):
        assert batch.pixels is None
        assert batch.example.tolist() == other.example.tolist()
        assert torch.equal(batch.features, mean(other.pixels).half())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not finite in float16"):
        source.with_features(lambda pixels: mean(pixels) * 1e5)


def test_memory_does_not_grow_with_the_corpus(tmp_path, tokenizer, monkeypatch):
    def peak(name: str, count: int) -> int:
        rows = image_rows("web", count, split="train")
        for number, row in enumerate(rows):
            noise = np.random.default_rng(number).bytes(20_000)
            row["image"] = {"bytes": row["image"]["bytes"] + noise, "path": None}
        (tmp_path / name).mkdir()
        part = write_images(Part(tmp_path / name / "p"), [rows[i : i + 50] for i in range(0, count, 50)])
        del rows, row
        monkeypatch.setattr(module, "WINDOW", 100)
        source = pairs_of(part)
        tracemalloc.start()
        try:
            for _ in source.batches(tokenizer, 20, steps=count // 20):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak("small", 400), peak("large", 1600)
    assert small > 100 * 20_000
    assert large < 1.5 * small


def test_texts_see_crops_of_their_own(tmp_path, tokenizer):
    """Two texts of a picture that see the same crop."""
    source = pairs_of(web(tmp_path, shards=(6,), texts=3))
    for batch in source.batches(tokenizer, 9, steps=6, views=CROPS):
        views = {view.numpy().tobytes() for view in batch.pixels}
        assert len(views) == len(batch) == 9
        assert len(batch.image_index.unique()) < 9


def test_skipped_steps_read_no_pictures(tmp_path, tokenizer, monkeypatch):
    source = pairs_of(web(tmp_path, (3,) * 30, texts=1))
    monkeypatch.setattr(module, "WINDOW", 6)
    read = []
    original = Pairs._read
    monkeypatch.setattr(Pairs, "_read", lambda self, group: (read.append(group), original(self, group))[1])
    assert len(list(source.batches(tokenizer, 3, steps=1000, start_step=999))) == 1
    assert len(read) <= 3


def test_batches_are_the_same_in_another_process(tmp_path, tokenizer):
    part = web(tmp_path)
    tokenizer.save(tmp_path)

    def digests(source, read) -> list[str]:
        found = source.batches(read, 8, steps=9, seed=3, views=VARIED)
        return [
            hashlib.sha256(b"".join(getattr(b, name).numpy().tobytes() for name in TENSORS)).hexdigest()
            for b in found
        ]

    code = (
        "import sys,json;from tests.data.test_pairs import *;"
        "module.WINDOW,module.WINDOW_BATCHES=16,2;"
        "d=Path(sys.argv[1]);s=Pairs([PairInput(Part(d/'web'))],size=SIZE,cache=0);t=Tokenizer.load(d);"
        "print(json.dumps([hashlib.sha256(b''.join(getattr(b,n).numpy().tobytes() for n in TENSORS)).hexdigest() "
        "for b in s.batches(t,8,steps=9,seed=3,views=VARIED)]))"
    )
    root = str(Path(module.__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    source = Pairs([PairInput(part)], size=SIZE)
    assert json.loads(run.stdout) == digests(source, tokenizer)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("cache", [0, 10**9])
def test_batches_lie_where_a_gpu_can_fetch_them(tmp_path, tokenizer, monkeypatch, there, cache):
    """Copies that a GPU waits for, because they start from ordinary memory."""
    pinned = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(Batch, "pin_memory", lambda self: (pinned.append(1), self)[1])
    assert len(list(pairs_of(web(tmp_path), cache=cache).batches(tokenizer, 5, steps=3))) == 3
    assert len(pinned) == 3 * there
