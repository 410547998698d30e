"""Catches: a bad picture or empty text that stops the run or vanishes uncounted, and a table that is held whole."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from capfilt.data.corpus import from_images
from capfilt.data.transforms import decode_uint8
from capfilt.tables.contracts import FAILURES, IMAGES
from capfilt.tables.ids import image_id
from tests.refusals import refused

SIZE = 8


def photo(seed: int) -> bytes:
    array = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).resize((20, 16)).save(buffer, "PNG")
    return buffer.getvalue()


def image_row(key: object, captions: list[str | None] | None = None, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "image_id": image_id("made", str(key)),
        "dataset": "made",
        "key": str(key),
        "source": "web",
        "captions": captions if captions is not None else [f"picture number {key}"],
        "status": "success",
        "image": {"bytes": photo(abs(hash(key)) % 1000 if not isinstance(key, int) else key), "path": None},
    }
    return {**row, **changes}


def images(*rows: dict[str, object]) -> pa.Table:
    return IMAGES.table(list(rows))


# ------------------------------------------------------------------ from images


def test_from_images() -> None:
    table = images(
        image_row(0, ["one", "two"]), image_row(1, ["three"], split="train"), image_row(2, split="val")
    )
    corpus = from_images([table], size=SIZE)
    assert corpus.texts == ["one", "two", "three"]
    assert corpus.image_of_text.tolist() == [0, 0, 1]
    assert corpus.image_ids == [image_id("made", "0"), image_id("made", "1")]
    assert corpus.skipped == {}
    assert corpus.deselected == {"split": 1}
    assert np.array_equal(corpus.images.read(np.array([1]))[0], decode_uint8(photo(1), SIZE))


def test_faults_are_counted_and_never_raised() -> None:
    table = images(
        image_row(0, ["", " . ", None, "good", "\x00\u200b", "x" * 10_001, "x " * 5000]),
        image_row(1, image={"bytes": photo(1)[:-30], "path": None}),
        image_row(2, ["a", "b"], image={"bytes": b"<html>", "path": None}),
        image_row(3, image=None),
        image_row(4, image={"bytes": None, "path": "/etc/hostname"}),
        image_row(5, status="failed_to_download", failure="timeout", image=None),
        image_row(6, status="failed_to_resize", image=None),
        image_row(7, []),
        image_row(9, ["", ""]),
    )
    corpus = from_images([table], size=SIZE)
    assert corpus.texts == ["good", "x " * 5000]
    assert corpus.skipped == {
        "empty_text": 6,
        "too_long": 1,
        "truncated": 1,
        "not_an_image": 1,
        "no_image": 2,
        "timeout": 1,
        "failed_to_resize": 1,
    }
    assert corpus.deselected == {"no_text": 1}
    assert set(corpus.skipped) <= {*FAILURES, "failed_to_resize"}


def test_pictures_without_a_usable_text_are_not_decoded() -> None:
    corpus = from_images([images(image_row(0, [""], image={"bytes": b"junk", "path": None}))], size=SIZE)
    assert corpus.skipped == {"empty_text": 1}
    assert len(corpus) == len(corpus.images) == 0


def test_tables_stream_and_images_are_unique_across_them() -> None:
    alive = 0

    def shards() -> Iterator[pa.Table]:
        nonlocal alive
        for shard in range(4):
            alive += 1
            yield images(*(image_row(10 * shard + i) for i in range(3)), image_row(0, [f"again {shard}"]))

    counted: list[int] = []
    corpus = from_images(shards(), size=SIZE, memory_limit=0, progress=counted.append)
    assert alive == 4
    assert sum(counted) == 16
    assert len(corpus.images) == 12
    assert len(corpus) == 16
    first = [t for t, i in zip(corpus.texts, corpus.image_of_text, strict=True) if i == 0]
    assert first == ["picture number 0", *(f"again {s}" for s in range(4))]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.drop(["captions"]), "images column captions"),
        (lambda t: t.set_column(5, "captions", pa.array(["text"])), "captions string list"),
        (lambda t: t.set_column(0, "image_id", pa.array([None], pa.string())), "1 nulls image_id"),
    ],
    ids=["missing", "type", "null"],
)
def test_wrong_tables_are_one_line(change: object, said: str) -> None:
    with refused(said):
        from_images([change(images(image_row(0)))], size=SIZE)  # type: ignore[operator]


def test_other_integer_and_binary_widths_are_taken() -> None:
    table = images(image_row(0))
    wide = table.set_column(
        table.column_names.index("image"),
        "image",
        table.column("image").cast(pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])),
    )
    assert len(from_images([wide], size=SIZE)) == 1


def test_real_photographs(shared_data: Path) -> None:
    found = json.loads((shared_data / "clean" / "captions.json").read_text())
    texts: dict[int, list[str]] = {}
    for annotation in found["annotations"]:
        texts.setdefault(annotation["image_id"], []).append(annotation["caption"])
    rows = []
    for picture in found["images"][:60]:
        data = (shared_data / "clean" / "images" / picture["file_name"]).read_bytes()
        rows.append(
            image_row(
                picture["id"], texts[picture["id"]], image={"bytes": data, "path": None}, source="human"
            )
        )
    corpus = from_images([images(*rows)], size=64)
    assert (len(corpus.images), corpus.skipped) == (60, {})
    assert len(corpus) >= 300
    assert corpus.images.read(np.arange(8)).std() > 20
