"""Pairs that a model can learn by heart."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
from PIL import Image

from capfilt.tables.contracts import IMAGES

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
    """Grids of 4 by 4 random colours, each named by four random words."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        grid = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        encoded = io.BytesIO()
        grid.resize((48, 48), Image.Resampling.NEAREST).save(encoded, "PNG")
        rows.append(
            {
                "image_id": f"{number:032x}",
                "dataset": "grids",
                "key": str(number),
                "source": "human",
                "captions": [" ".join(rng.choice(WORDS, 4))],
                "split": "train",
                "status": "success",
                "image": {"bytes": encoded.getvalue(), "path": None},
            }
        )
    return pa.Table.from_pylist(rows, schema=IMAGES.schema)
