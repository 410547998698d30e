"""Catches: a bad picture or empty text that stops the run or vanishes uncounted, two images sharing an index (false
negatives for the contrastive loss), pixels given to another image's text, and batches that differ between processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from capfilt.data import corpus as module
from capfilt.data.cleaning import clean
from capfilt.data.corpus import (
    Batch,
    Corpus,
    ImageStore,
    batches,
    concat,
    from_images,
    from_pairs,
    from_verdicts,
)
from capfilt.data.tokenizer import Tokenizer
from capfilt.data.transforms import decode_uint8
from capfilt.tables.contracts import FAILURES, IMAGES, PAIRS, VERDICTS
from capfilt.tables.ids import image_id, text_id
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


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([f"picture number {i} a red circle" for i in range(40)], vocab_size=200)


def everything(corpus: Corpus, tokenizer: Tokenizer, **options: object) -> list[Batch]:
    return list(batches(corpus, tokenizer, **{"batch_size": 4, "epochs": 1, **options}))


# ------------------------------------------------------------------ from images


def test_from_images() -> None:
    table = images(
        image_row(0, ["one", "two"]), image_row(1, ["three"], split="train"), image_row(2, split="val")
    )
    corpus = from_images([table], size=SIZE)
    assert corpus.texts == ["one", "two", "three"]
    assert corpus.image_of_text.tolist() == [0, 0, 1]
    assert corpus.sources == ["web"] * 3
    assert corpus.image_ids == [image_id("made", "0"), image_id("made", "1")]
    assert corpus.image_split == [None, "train"]
    assert corpus.text_ids[1] == text_id(corpus.image_ids[0], "web", "two", "", 1)
    assert corpus.weights.tolist() == [1, 1, 1]
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
        image_row(8, source="human"),
        image_row(9, ["", ""]),
    )
    corpus = from_images([table], source="web", size=SIZE)
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
    assert corpus.deselected == {"no_text": 1, "source": 1}
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


# ------------------------------------------------------------------ from pairs and verdicts


def test_from_pairs() -> None:
    table = PAIRS.table(
        [
            {
                "image_id": "i0",
                "image": {"bytes": photo(0), "path": None},
                "texts": [
                    {"text": "kept web", "source": "web", "itm_score": 0.7, "weight": 0.5},
                    {"text": "kept synthetic", "source": "synthetic", "itm_score": None, "weight": None},
                    {"text": "heavy", "source": "web", "itm_score": None, "weight": float("nan")},
                    None,
                ],
                "split": "train",
            },
            {"image_id": "i1", "image": {"bytes": photo(1), "path": None}, "texts": [], "split": "test"},
        ]
    )
    corpus = from_pairs([table], size=SIZE)
    assert corpus.texts == ["kept web", "kept synthetic"]
    assert corpus.sources == ["web", "synthetic"]
    assert corpus.weights.tolist() == [0.5, 1.0]
    assert corpus.skipped == {"empty_text": 1, "not_finite": 1}
    assert corpus.deselected == {"split": 1}
    assert from_pairs([table], sources=["synthetic"], size=SIZE).texts == ["kept synthetic"]


def verdict(key: int, text: str, keep: bool = True, source: str = "web") -> dict[str, object]:
    image = image_id("made", str(key))
    number = text_id(image, source, text, "", 0)
    return {
        "text_id": number,
        "image_id": image,
        "source": source,
        "text": text,
        "keep": keep,
        "reason": "rule",
    }


def test_from_verdicts() -> None:
    rows = [
        verdict(0, "kept"),
        verdict(0, "dropped", keep=False),
        verdict(1, "synthetic one", source="synthetic"),
        verdict(2, "broken picture"),
        verdict(77, "no such image"),
        verdict(3, "of the test split"),
        verdict(0, "human", source="human"),
    ]
    pictures = [
        images(image_row(0), image_row(1)),
        images(
            image_row(2, image={"bytes": b"x", "path": None}),
            image_row(3, split="test"),
            image_row(0),
            image_row(4),
        ),
    ]
    corpus = from_verdicts(pictures, [VERDICTS.table(rows[:3]), VERDICTS.table(rows[3:])], size=SIZE)
    assert corpus.texts == ["kept", "human", "synthetic one"]
    assert corpus.text_ids == [rows[0]["text_id"], rows[6]["text_id"], rows[2]["text_id"]]
    assert corpus.image_of_text.tolist() == [0, 0, 1]
    assert corpus.skipped == {"no_image": 1, "not_an_image": 1}
    assert corpus.deselected["verdict"] == corpus.deselected["split"] == 1
    web = from_verdicts(pictures, [VERDICTS.table(rows)], sources=["web"], size=SIZE)
    assert web.texts == ["kept"]


# ------------------------------------------------------------------ joining, taking, features


def test_concat_unites_images_by_id() -> None:
    one = from_images([images(image_row(0), image_row(1, ["", "b"]))], size=SIZE)
    other = from_images(
        [images(image_row(2), image_row(0, ["human text"], source="human"))], size=SIZE, memory_limit=0
    )
    both = concat([one, other])
    assert both.texts == ["picture number 0", "b", "picture number 2", "human text"]
    assert both.image_of_text.tolist() == [0, 1, 2, 0]
    assert both.image_ids == [image_id("made", key) for key in "012"]
    assert both.skipped == {"empty_text": 1}
    assert both.texts_by_source() == {"human": 1, "web": 3}
    expected = np.stack([decode_uint8(photo(key), SIZE) for key in (2, 0, 1)])
    assert np.array_equal(both.images.read(np.array([2, 0, 1])), expected)
    with refused("shapes", "size"):
        concat([one, from_images([images(image_row(5))], size=SIZE + 1)])


def test_take() -> None:
    corpus = from_images([images(*(image_row(i, [f"a {i}", f"b {i}"]) for i in range(4)))], size=SIZE)
    some = corpus.take([7, 2, 6])
    assert some.texts == ["b 3", "a 1", "a 3"]
    assert [some.image_ids[i] for i in some.image_of_text] == [image_id("made", k) for k in "313"]
    expected = np.stack([decode_uint8(photo(key), SIZE) for key in (3, 1, 3)])
    assert np.array_equal(some.images.read(some.image_of_text), expected)
    assert len(corpus.take([])) == 0


def mean_features(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float().reshape(len(pixels), 3, 4, -1).mean(3).transpose(1, 2)


def test_features_follow_their_pictures(tokenizer: Tokenizer, tmp_path: Path) -> None:
    corpus = from_images([images(*(image_row(i) for i in range(7)))], size=SIZE)
    calls: list[int] = []
    for limit in (10**9, 0):
        made = corpus.with_features(
            mean_features, batch_size=3, memory_limit=limit, spill_dir=tmp_path, progress=calls.append
        )
        for batch in everything(made, tokenizer):
            assert batch.pixels is None
            assert batch.features is not None
            assert (batch.features.dtype, batch.features.shape[1:]) == (torch.float16, (4, 3))
            pixels = torch.from_numpy(corpus.images.read(corpus.image_of_text[batch.example.numpy()]))
            assert torch.equal(batch.features, mean_features(pixels).half())
    assert calls == [3, 3, 1] * 2
    with pytest.raises(ValueError, match="features"):
        made.images.read(np.array([0]))
    assert corpus.with_features(mean_features, keep_pixels=True).images is corpus.images
    joined = concat([made.take([4, 5]), made.take([0])])
    assert joined.features is not None
    assert np.array_equal(joined.features.read(np.array([2, 0])), made.features.read(np.array([0, 4])))
    with refused("features", "joining"):
        concat([corpus, made])
    with pytest.raises(ValueError, match="float16"):
        corpus.with_features(lambda pixels: mean_features(pixels) * 1e5)


def test_a_corpus_checks_its_columns() -> None:
    corpus = from_images([images(image_row(0), image_row(1))], size=SIZE)
    columns = {
        name: getattr(corpus, name) for name in ("images", "image_of_text", "texts", "sources", "text_ids")
    }
    columns |= {name: getattr(corpus, name) for name in ("image_ids", "weights", "image_split")}
    Corpus(**columns)
    with pytest.raises(ValueError, match="sources"):
        Corpus(**{**columns, "sources": ["web"]})
    with pytest.raises(ValueError, match="not there"):
        Corpus(**{**columns, "image_of_text": [0, 2]})
    with pytest.raises(ValueError, match="2 pictures"):
        Corpus(**{**columns, "image_ids": ["x"]})


# ------------------------------------------------------------------ batches


def test_batches_hold_what_they_say(tokenizer: Tokenizer) -> None:
    rows = [
        image_row(i, [f"picture number {i}", "On the LEFT" if i == 2 else "the same text!"]) for i in range(5)
    ]
    corpus = from_images([images(*rows)], size=SIZE)
    seen: list[int] = []
    for batch in everything(corpus, tokenizer, prompt="a picture of "):
        assert batch.pixels is not None
        assert (batch.pixels.dtype, batch.ids.dtype, batch.mask.dtype) == (
            torch.uint8,
            torch.int64,
            torch.bool,
        )
        assert batch.pixels.shape == (len(batch), 3, SIZE, SIZE)
        assert batch.features is None
        for place, row in enumerate(batch.example.tolist()):
            picture = int(corpus.image_of_text[row])
            assert batch.texts[place] == corpus.texts[row]
            assert torch.equal(batch.pixels[place], torch.from_numpy(decode_uint8(photo(picture), SIZE)))
            ids = batch.ids[place][batch.mask[place]].tolist()
            assert ids == tokenizer.encode_ragged([corpus.texts[row]], prompt="a picture of ")[0]
            assert batch.sided[place].item() == ("LEFT" in corpus.texts[row])
        seen += batch.example.tolist()
    assert sorted(seen) == list(range(10))


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.lists(st.sampled_from(["Red.", "red", "RED!", "blue", "green (x)"]), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_indices_say_which_images_and_texts_are_the_same(captions: list[list[str]]) -> None:
    tokenizer = Tokenizer.train(["red blue green x"] * 2, vocab_size=60)
    half = len(captions) // 2
    parts = [
        images(*(image_row(i % 3, texts) for i, texts in enumerate(part)))
        for part in (captions[:half], captions[half:])
    ]
    corpus = concat([from_images([part], size=SIZE) for part in parts])
    (batch,) = everything(corpus, tokenizer, batch_size=len(corpus))
    ids = [corpus.image_ids[corpus.image_of_text[row]] for row in batch.example.tolist()]
    for one in range(len(batch)):
        for other in range(len(batch)):
            assert (batch.image_index[one] == batch.image_index[other]).item() == (ids[one] == ids[other])
            same = clean(batch.texts[one]) == clean(batch.texts[other])
            assert (batch.text_index[one] == batch.text_index[other]).item() == same


def same(one: Batch, other: Batch) -> bool:
    tensors = ("ids", "mask", "image_index", "text_index", "example", "weight", "sided", "pixels")
    return (
        one.texts == other.texts
        and one.step == other.step
        and all(torch.equal(getattr(one, name), getattr(other, name)) for name in tensors)
    )


@pytest.mark.parametrize("options", [{}, {"one_text_per_image": True}, {"mixing": {"web": 1, "human": 3}}])
def test_resuming_gives_the_same_batches(tokenizer: Tokenizer, options: dict[str, object]) -> None:
    rows = [image_row(i, [f"number {i}", "x"], source="human" if i % 3 == 0 else "web") for i in range(9)]
    corpus = from_images([images(*rows)], size=SIZE)
    whole = list(batches(corpus, tokenizer, 4, seed=5, steps=12, **options))
    assert [batch.step for batch in whole] == list(range(12))
    for start in (1, 7, 12):
        rest = list(batches(corpus, tokenizer, 4, seed=5, steps=12, start_step=start, **options))
        assert len(rest) == 12 - start
        assert all(same(one, other) for one, other in zip(rest, whole[start:], strict=True))


def test_skipped_steps_read_no_pictures(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = from_images([images(*(image_row(i) for i in range(6)))], size=SIZE)
    read = []
    original = ImageStore.read
    monkeypatch.setattr(
        ImageStore, "read", lambda self, rows: (read.append(len(rows)), original(self, rows))[1]
    )
    list(batches(corpus, tokenizer, 2, steps=1000, start_step=998))
    assert read == [2, 2]


def test_texts_are_tokenised_once(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = from_images([images(*(image_row(i) for i in range(6)))], size=SIZE)
    calls = []
    original = Tokenizer.encode_ragged
    monkeypatch.setattr(Tokenizer, "encode_ragged", lambda self, *a: (calls.append(1), original(self, *a))[1])
    list(batches(corpus, tokenizer, 2, epochs=3))
    list(batches(corpus, tokenizer, 3, epochs=2, seed=9))
    assert len(calls) == 1
    list(batches(corpus, tokenizer, 3, epochs=1, max_text_tokens=9))
    assert len(calls) == 2


def test_wrong_options_are_refused_before_the_first_batch(tokenizer: Tokenizer) -> None:
    corpus = from_images([images(image_row(0))], size=SIZE)
    with refused("mixing"):
        batches(corpus, tokenizer, 2, epochs=1, mixing={"human": 1})
    with refused("examples"):
        batches(from_images([], size=SIZE), tokenizer, 2, epochs=1)


def test_batches_are_the_same_in_another_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [image_row(i, [f"number {i}", "x"]) for i in range(9)]
    pq.write_table(images(*rows), tmp_path / "images.parquet")
    tokenizer.save(tmp_path)
    code = (
        "import sys,hashlib,json;import pyarrow.parquet as pq;"
        "from capfilt.data.corpus import from_images,batches;from capfilt.data.tokenizer import Tokenizer;"
        "d=sys.argv[1];c=from_images([pq.read_table(d+'/images.parquet')],size=8,memory_limit=500);"
        "t=Tokenizer.load(d);out=[];"
        "[out.append(hashlib.sha256(b''.join(x.numpy().tobytes() for x in "
        "(b.ids,b.mask,b.pixels,b.image_index,b.text_index,b.example))).hexdigest()) "
        "for b in batches(c,t,4,seed=3,epochs=2)];"
        "print(json.dumps(out))"
    )
    root = str(Path(module.__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "11", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, check=True
    )
    corpus = from_images([images(*rows)], size=SIZE)
    here = [
        hashlib.sha256(
            b"".join(
                tensor.numpy().tobytes()
                for tensor in (b.ids, b.mask, b.pixels, b.image_index, b.text_index, b.example)
                if tensor is not None
            )
        ).hexdigest()
        for b in batches(corpus, tokenizer, 4, seed=3, epochs=2)
    ]
    assert json.loads(run.stdout) == here


def test_real_photographs(shared_data: Path, tokenizer: Tokenizer) -> None:
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
    batch = next(iter(batches(corpus, tokenizer, 32, steps=1)))
    assert batch.pixels is not None
    assert batch.pixels.float().std() > 20
