"""Pictures of table rows gathered into a store, each once, whatever asks for it.

Not here: which rows are wanted and what is said about their pictures (`corpus.py`, `task_corpus.py`).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypedDict

from capfilt.data.images import BadImage
from capfilt.data.store import ImageStore


class BuildOptions(TypedDict, total=False):
    """Keyword arguments that every builder takes: those of `ImageStore`, and `progress`."""

    memory_limit: int
    spill_dir: str | os.PathLike[str] | None
    workers: int | None
    max_pixels: int
    training: bool
    progress: Callable[[int], None]


class Pictures:
    """Decoded pictures by `image_id`.

    Attributes:
        store: the pixels.
        row_of: the store's row by image_id; None where the picture cannot be used.
        image_ids: of the store's rows, in order.
        skipped: counts pictures that cannot be used, by failure.
    """

    def __init__(self, size: int, options: BuildOptions, skipped: Counter[str]) -> None:
        given = dict(options)
        given.pop("progress", None)
        self.store = ImageStore(size, **given)  # type: ignore[arg-type]
        self.row_of: dict[str, int | None] = {}
        self.image_ids: list[str] = []
        self.skipped = skipped

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Decode the pictures of rows with `image_id` and `image` that are not there yet."""
        fresh: dict[str, bytes] = {}
        for row in rows:
            key = row["image_id"]
            if key in self.row_of or key in fresh:
                continue
            data = (row["image"] or {}).get("bytes")
            if data:
                fresh[key] = data
            else:
                self.row_of[key] = None
                self.skipped["no_image"] += 1
        added = self.store.add(list(fresh.values()))
        for key, result in zip(fresh, added, strict=True):
            if isinstance(result, BadImage):
                self.row_of[key] = None
                self.skipped[result.failure] += 1
            else:
                self.row_of[key] = result
                self.image_ids.append(key)
