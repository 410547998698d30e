"""Catches: pixels that change when a corpus outgrows memory, memory that grows with the corpus, a spill file left
behind, and a full disk that is reported as anything else.
"""

from __future__ import annotations

import io
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.data.images import BadImage
from capfilt.data.store import ArrayStore, ImageStore
from capfilt.data.transforms import decode_uint8, training_uint8
from tests.refusals import failed

SIZE = 12
ITEM = 3 * SIZE * SIZE


def photo(seed: int, width: int = 20, height: int = 16, quality: int = 40) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).resize((width, height)).save(buffer, "WEBP", quality=quality)
    return buffer.getvalue()


PHOTOS = [photo(i) for i in range(9)] + [photo(9, 90, 70, 100)]
PIXELS = np.stack([decode_uint8(data, SIZE) for data in PHOTOS])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 12), st.lists(st.integers(0, 9), max_size=12))
def test_pixels_are_the_same_in_memory_and_spilled(in_memory: int, rows: list[int]) -> None:
    store = ImageStore(SIZE, memory_limit=in_memory * ITEM, workers=2)
    assert store.add(PHOTOS) == list(range(10))
    assert len(store) == 10
    assert (store.spilled_bytes > 0) == (in_memory < 10)
    assert np.array_equal(store.read(np.array(rows, dtype=np.int64)), PIXELS[rows])
    store.close()


def test_the_shorter_of_file_and_pixels_is_spilled() -> None:
    small, large = PHOTOS[0], photo(1, 200, 200, 100)
    assert len(small) < ITEM < len(large)
    store = ImageStore(SIZE, memory_limit=0)
    store.add([small])
    assert store.spilled_bytes == len(small)
    store.add([large])
    assert store.spilled_bytes == len(small) + ITEM
    assert np.array_equal(store.read(np.array([0]))[0], decode_uint8(small, SIZE))
    assert np.array_equal(store.read(np.array([1]))[0], decode_uint8(large, SIZE))


@pytest.mark.parametrize("in_memory", [0, ITEM])
def test_training_alone_sees_quick_pixels(in_memory: int) -> None:
    # Catches: an evaluation on training's pixels, which are nearly Pillow's.
    large = photo(1, 200, 150, 100)
    for training, expected in ((False, decode_uint8), (True, training_uint8)):
        store = ImageStore(SIZE, memory_limit=in_memory, training=training)
        store.add([large])
        assert np.array_equal(store.read(np.array([0]))[0], expected(large, SIZE))
        store.close()


def test_bad_pictures_take_no_row() -> None:
    store = ImageStore(SIZE)
    results = store.add([PHOTOS[0], b"<html>", PHOTOS[1], PHOTOS[2][:-20]])
    assert [r if isinstance(r, int) else r.failure for r in results] == [0, "not_an_image", 1, "truncated"]
    assert isinstance(results[1], BadImage)
    assert len(store) == 2
    assert np.array_equal(store.read(np.array([1])), PIXELS[1:2])
    assert store.add([]) == []
    assert store.read(np.array([], dtype=np.int64)).shape == (0, 3, SIZE, SIZE)


def test_rows_outside_are_refused() -> None:
    store = ImageStore(SIZE)
    store.add(PHOTOS[:2])
    for row in (-1, 2):
        with pytest.raises(IndexError, match="of 2 pictures"):
            store.read(np.array([row]))


def test_max_pixels_reaches_the_decoder() -> None:
    result = ImageStore(SIZE, max_pixels=100).add([PHOTOS[0]])[0]
    assert isinstance(result, BadImage)
    assert result.failure == "too_many_pixels"


def test_the_spill_file_has_no_name(tmp_path: Path) -> None:
    store = ImageStore(SIZE, memory_limit=0, spill_dir=tmp_path)
    store.add(PHOTOS)
    assert store.spilled_bytes > 0
    assert list(tmp_path.iterdir()) == []
    features = ArrayStore(100, (8, 8), np.float16, memory_limit=10, spill_dir=tmp_path)
    features.array[:] = 3
    assert list(tmp_path.iterdir()) == []
    assert features.read(np.array([99, 0])).tolist() == np.full((2, 8, 8), 3).tolist()


def test_a_disk_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with failed("nowhere", "TMPDIR"):
        ImageStore(SIZE, memory_limit=0, spill_dir=tmp_path / "nowhere").add(PHOTOS)
    with failed("nowhere", "TMPDIR"):
        ArrayStore(100, (8, 8), np.float16, memory_limit=10, spill_dir=tmp_path / "nowhere")
    if Path("/dev/full").exists():
        store = ImageStore(SIZE, memory_limit=0)
        store.add(PHOTOS[:1])
        with Path("/dev/full").open("wb", buffering=0) as full:
            store._spill, kept = full, store._spill
            with failed("full", "TMPDIR"):
                store.add(PHOTOS[1:2])
            store._spill = kept
        assert len(store) == 1
        assert np.array_equal(store.read(np.array([0])), PIXELS[:1])


def test_many_threads_read_the_same_store() -> None:
    store = ImageStore(SIZE, memory_limit=4 * ITEM, workers=2)
    store.add(PHOTOS)
    wrong: list[int] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(20):
            rows = rng.integers(0, 10, size=6)
            if not np.array_equal(store.read(rows), PIXELS[rows]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_stays_flat_while_the_corpus_grows() -> None:
    size = 96
    store = ImageStore(size, memory_limit=50 * 3 * size * size, workers=1)
    pictures = [photo(seed, 120, 90, 60) for seed in range(20)]
    store.add(pictures * 3)
    tracemalloc.start()
    try:
        for _ in range(20):
            store.add(pictures)
        grown = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(store) == 460
    assert grown < 300_000 < 400 * 3 * size * size
