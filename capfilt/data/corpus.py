"""Rows of images tables with their found texts and decoded pictures, to be evaluated on.

Not here: pairs that are trained on (`pairs.py`), how parts are stored (`tables/`: any iterable of Arrow tables will do), or
where pixels are kept (`store.py`).

A picture that does not decode and a text that is empty are left out and counted, never raised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Unpack

import numpy as np
import pyarrow as pa

from capfilt.data.examples import IMAGES_NEEDED, TRAINING_SPLITS, image_entries, slices, usable
from capfilt.data.pictures import BuildOptions, Pictures
from capfilt.data.store import Index, Rows

COLUMNS = (*IMAGES_NEEDED, "split", "failure")


@dataclass
class Corpus:
    """Pictures with their texts, by column. T texts, N pictures; one picture may have many texts.

    Attributes:
        images: pixels of the pictures, uint8 [3, S, S] each; those of N pictures come first.
        image_of_text: int64 [T], the picture of each text.
        texts: T strings as found.
        image_ids: N strings.
        skipped: how many were left out for a fault: pictures by their failure (once per picture), texts by
            `empty_text` or `too_long`.
        deselected: how many pictures were left out without a fault: as `split`, `no_text` or `limit`.
    """

    images: Rows
    image_of_text: Index
    texts: list[str]
    image_ids: list[str]
    skipped: dict[str, int] = field(default_factory=dict)
    deselected: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.texts)


def from_images(
    tables: Iterable[pa.Table],
    splits: Sequence[str | None] | None = TRAINING_SPLITS,
    *,
    size: int,
    limit: int = 0,
    **options: Unpack[BuildOptions],
) -> Corpus:
    """One text per caption of every successful row of `images` tables.

    Args:
        tables: Arrow tables with the columns of the images contract; read one at a time.
        splits: only rows of these splits, None meaning rows without one; all where the argument is None.
        size: side of the pictures in pixels.
        limit: only the first so many pictures; no table after the one that holds the last of them is read. 0 for all.
            Pictures read beyond it are deselected as `limit`.
        **options: `memory_limit`, `spill_dir`, `workers`, `max_pixels`, `training` of `ImageStore`; `progress`, called with the
            number of rows looked at.

    Raises UserError for a missing or wrong column, RunError for a full disk.
    """
    skipped, deselected = Counter[str](), Counter[str]()
    pictures = Pictures(size, options, skipped)
    image_of_text: list[int] = []
    texts: list[str] = []
    progress = options.get("progress")
    for rows in slices(tables, "images", IMAGES_NEEDED, ("split", "failure")):
        chosen = list(usable(image_entries(rows), splits, skipped, deselected))
        pictures.add(entry.row for entry in chosen)
        for row, found in chosen:
            number = pictures.row_of[row["image_id"]]
            if number is not None and (not limit or number < limit):
                image_of_text += [number] * len(found)
                texts += [text.text or "" for text in found]
        if progress is not None:
            progress(len(rows))
        if limit and len(pictures.image_ids) >= limit:
            break
    kept = min(limit or len(pictures.image_ids), len(pictures.image_ids))
    deselected["limit"] += len(pictures.image_ids) - kept
    return Corpus(
        images=pictures.store,
        image_of_text=np.array(image_of_text, dtype=np.int64),
        texts=texts,
        image_ids=pictures.image_ids[:kept],
        skipped={reason: count for reason, count in sorted(skipped.items()) if count},
        deselected={reason: count for reason, count in sorted(deselected.items()) if count},
    )
