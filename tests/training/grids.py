"""Pairs that a model can learn by heart."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.tables.contracts import IMAGES
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part

WORDS = (
    "amber",
    "brook",
    "cedar",
    "delta",
    "ember",
    "fjord",
    "grove",
    "heath",
    "inlet",
    "jetty",
    "kelp",
    "ledge",
)


def pairs(count: int) -> pa.Table:
    """Grids of 4 by 4 random colours, each named by four random words: nothing but learning by heart helps."""
    rng = np.random.default_rng(0)
    drawn = [
        (rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), " ".join(rng.choice(WORDS, 4)))
        for _ in range(count)
    ]
    return _table(*zip(*drawn, strict=True))


def coloured(count: int) -> pa.Table:
    """Grids of 2 by 2 colours, a word for each colour: what a model sees tells it what is said."""
    rng = np.random.default_rng(0)
    palette = np.array(list(itertools.product((0, 255), (0, 128, 255), (0, 255))), dtype=np.uint8)
    numbers = [rng.integers(0, len(WORDS), 4) for _ in range(count)]
    grids = [palette[each].reshape(2, 2, 3) for each in numbers]
    return _table(grids, [" ".join(WORDS[number] for number in each) for each in numbers])


def _table(grids: Iterable[np.ndarray], captions: Iterable[str]) -> pa.Table:
    rows = []
    for number, (grid, caption) in enumerate(zip(grids, captions, strict=True)):
        encoded = io.BytesIO()
        Image.fromarray(grid).resize((48, 48), Image.Resampling.NEAREST).save(encoded, "PNG")
        rows.append(
            {
                "image_id": f"{number:032x}",
                "dataset": "grids",
                "key": str(number),
                "source": "human",
                "captions": [caption],
                "split": "train",
                "status": "success",
                "image": {"bytes": encoded.getvalue(), "path": None},
            }
        )
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)


def written(path: Path, table: pa.Table) -> Part:
    """An images part with these rows."""
    part = Part(path)
    part.commit(0, table, Counts(len(table), len(table)), part.begin(IMAGES, "test", {}), 0.1)
    return part


def source(path: Path, table: pa.Table, size: int) -> Pairs:
    """The pairs of a part with these rows."""
    return Pairs([PairInput(written(path, table))], size=size)
