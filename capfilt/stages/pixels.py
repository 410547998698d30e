"""What `caption` and `score` share: the pictures of an images shard in a model's own form, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from capfilt.data.images import BadImage, decode
from capfilt.data.store import cpu_workers
from capfilt.tables.shards import Part


@dataclass(frozen=True)
class Pictures:
    """Some rows of an images shard.

    Attributes:
        rows: the rows, pixels left out.
        failures: per row, None where the picture can be used, else why not (from the closed list; "no_image" where
            the row has none to begin with).
        images: what became of those that can be used, in order.
        place: per row, its place in `images`, or -1.
    """

    rows: list[dict[str, Any]]
    failures: list[str | None]
    images: list[Any]
    place: list[int]


def pictures(part: Part, shard: int, prepare: Callable[[bytes], Any], batch_size: int) -> Iterator[Pictures]:
    """Batches of at most `batch_size` rows; where they are cut depends on the shard and `batch_size` alone.

    `prepare` turns encoded bytes into what a model takes, in threads; it raises BadImage for a picture that it cannot
    use. Anything else it raises for a picture that can be decoded is raised here.
    """
    with ThreadPoolExecutor(cpu_workers()) as pool:
        for batch in part.batches(shard, ("image_id", "status", "image")):
            for start in range(0, batch.num_rows, batch_size):
                yield _prepared(pool, batch.slice(start, batch_size).to_pylist(), prepare)


def _prepared(
    pool: ThreadPoolExecutor, rows: list[dict[str, Any]], prepare: Callable[[bytes], Any]
) -> Pictures:
    def one(row: dict[str, Any]) -> tuple[str | None, Any]:
        image = row.pop("image")
        if row["status"] != "success" or image is None or not image["bytes"]:
            return "no_image", None
        try:
            return None, prepare(image["bytes"])
        except BadImage as error:
            return error.failure, None
        except Exception:
            # A plug-in with a decoder of its own: what capfilt cannot decode either is the picture's fault.
            try:
                decode(image["bytes"])
            except BadImage as error:
                return error.failure, None
            raise

    found = list(pool.map(one, rows))
    failures = [failure for failure, _ in found]
    place, count = [], 0
    for failure in failures:
        place.append(-1 if failure else count)
        count += not failure
    return Pictures(rows, failures, [image for failure, image in found if not failure], place)
