"""Catches a change that makes another world of the same seed, and so other figures than those of docs/results.md."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import PIL
import pyarrow.parquet as pq
import pytest

from capfilt.quickstart.run import SIZES
from capfilt.quickstart.web import build_human, build_web, troubled_bytes, write_human, write_web
from capfilt.quickstart.world import Scene, render

BASE = "http://127.0.0.1:20000"
# (size, seed): the URL list, the truth, the human set.
WORLDS = {
    ("full", 0): ["12f709b3825da743", "3e671c54e722245a", "9ecabdaccc026e7d"],
    ("small", 0): ["8abdba0e24b44aed", "852d3b38c4abe040", "02eca87ee997378e"],
    ("small", 1): ["a57a46c70ad97f0b", "8440b07ccbc83638", "e3a9846f200759f4"],
    ("miniature", 0): ["dec8cd06bd2955c1", "577c99c77ebf2542", "2b74d976edaa15da"],
}
# seed: pages as served, the human set's files.
PICTURES = {0: ["90dfd20fe7083a37", "eb185d044637aae1"], 1: ["81a5ea4b0d0595db", "d4b0582a9ecafb18"]}
DRAWN = "f4b400efeb50f258"


def digest(*parts):
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part if isinstance(part, bytes) else json.dumps(part).encode())
    return whole.hexdigest()[:16]


@pytest.mark.parametrize(("size", "seed"), [("full", 0), ("small", 0), ("small", 1), ("miniature", 0)])
def test_the_texts_and_the_truth_of_a_seed_stay(tmp_path, size, seed):
    pages = build_web(seed, SIZES[size].web)
    write_web(tmp_path, pages, BASE)
    human = [
        [row.id, row.file_name, row.split, row.captions, row.scene.to_json()]
        for row in build_human(seed, SIZES[size].human, SIZES[size].captions)
    ]
    found = [digest(pq.read_table(tmp_path / name).to_pylist()) for name in ("urls.parquet", "truth.parquet")]
    assert [*found, digest(human)] == WORLDS[size, seed]


def test_the_drawing_of_a_seed_stays():
    streams = [np.random.default_rng(number) for number in range(80)]
    drawn = [render(Scene.sample(rng), rng, 16 + number).tobytes() for number, rng in enumerate(streams)]
    assert digest(*drawn) == DRAWN


@pytest.mark.skipif(
    PIL.__version__ != "13.0.0", reason="another Pillow may write other bytes of the same pixels"
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_bytes_of_the_pictures_of_a_seed_stay(tmp_path, seed):
    served = [part for page in build_web(seed, 300) for part in troubled_bytes(page)]
    path = write_human(tmp_path, build_human(seed, SIZES["miniature"].human, 2))
    human = [path.read_bytes(), *(file.read_bytes() for file in sorted((tmp_path / "images").iterdir()))]
    assert [digest(*served), digest(*human)] == PICTURES[seed]
