"""What `caption` and `score` share: the pictures of an images shard at a model's size, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from capfilt.data.images import BadImage
from capfilt.data.store import cpu_workers
from capfilt.data.transforms import decode_uint8
from capfilt.tables.shards import Part


@dataclass(frozen=True)
class Pictures:
    """Some rows of an images shard.

    Attributes:
        rows: the rows, pixels left out.
        failures: per row, None where the picture decoded, else why not (from the closed list; "no_image" where the
            row has none to begin with).
        pixels: uint8 [N, 3, S, S], those that decoded, in order.
        place: per row, its place in `pixels`, or -1.
    """

    rows: list[dict[str, Any]]
    failures: list[str | None]
    pixels: torch.Tensor
    place: list[int]


def pictures(
    part: Part, shard: int, size: int, batch_size: int, columns: tuple[str, ...]
) -> Iterator[Pictures]:
    """Batches of at most `batch_size` rows; where they are cut depends on the shard and `batch_size` alone."""
    wanted = tuple(dict.fromkeys((*columns, "image_id", "status", "image")))
    with ThreadPoolExecutor(cpu_workers()) as pool:
        for batch in part.batches(shard, wanted):
            for start in range(0, batch.num_rows, batch_size):
                yield _decoded(pool, batch.slice(start, batch_size).to_pylist(), size)


def _decoded(pool: ThreadPoolExecutor, rows: list[dict[str, Any]], size: int) -> Pictures:
    def decode(row: dict[str, Any]) -> np.ndarray[Any, Any] | str:
        image = row.pop("image")
        if row["status"] != "success" or image is None or not image["bytes"]:
            return "no_image"
        try:
            return decode_uint8(image["bytes"], size)
        except BadImage as error:
            return error.failure

    found = list(pool.map(decode, rows))
    failures = [value if isinstance(value, str) else None for value in found]
    arrays = [value for value in found if not isinstance(value, str)]
    place, count = [], 0
    for failure in failures:
        place.append(-1 if failure else count)
        count += not failure
    pixels = np.stack(arrays) if arrays else np.zeros((0, 3, size, size), np.uint8)
    return Pictures(rows, failures, torch.from_numpy(pixels), place)
