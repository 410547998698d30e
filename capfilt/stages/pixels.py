"""What `caption` and `score` share: the pictures of an images shard in a model's own form, a batch at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from capfilt.data.images import BadImage, decode
from capfilt.data.store import cpu_workers
from capfilt.errors import UserError
from capfilt.plugins.interface import FindsBatchSize, Gathers, Plugin, TellsHow
from capfilt.stages.base import Produced
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part


@dataclass(frozen=True)
class Pictures:
    """Some rows of an images shard.

    Attributes:
        rows: the rows, pixels left out.
        failures: per row, None where the picture can be used, else why not (from the closed list; "no_image" where
            the row has none to begin with).
        images: what became of those that can be used, in order: a list, or what the plug-in's `gather` made of it.
        place: per row, its place in `images`, or -1.
    """

    rows: list[dict[str, Any]]
    failures: list[str | None]
    images: Any
    place: list[int]

    @property
    def decoded(self) -> list[str]:
        """The image_id of each of `images`."""
        return [row["image_id"] for row, failure in zip(self.rows, self.failures, strict=True) if not failure]


class Clock:
    """How long an engine was at work: the seconds spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


DEFAULT_BATCH_SIZE = 64
"""Pictures at a time for a plug-in that does not find its own number."""


def batch_size_for(plugin: Plugin, asked: int, ways: int = 1) -> int:
    """Pictures at a time; see `FindsBatchSize`."""
    if isinstance(plugin, FindsBatchSize):
        return plugin.batch_size(asked, ways)
    return asked or DEFAULT_BATCH_SIZE


def settle(part: Part, plugin: Plugin) -> None:
    """Holds all shards of `part` to one precision, for what is "auto" depends on the worker. UserError in one that differs."""
    if not isinstance(plugin, TellsHow) or not part.exists:
        return
    how = plugin.computed()
    settled = part.settle("precision", how["precision"])
    if settled != how["precision"]:
        where = how.get("device", "this machine")
        raise UserError(
            f"{part.path}: its shards are computed in {settled}, but {where} would compute in {how['precision']}; run where "
            "it was begun, or name another output and give --precision"
        )


def settled_batch_size(part: Part, plugin: Plugin, asked: int, ways: int = 1) -> int:
    """Pictures at a time for all shards of `part`: as many as are asked for, or for 0 what its first worker chose.

    Sums are rounded by the shape of a batch, so captions and scores depend on it; what a worker would choose depends on its
    machine. A worker whose memory does not hold so many takes fewer, and the shard's manifest says so.
    """
    if asked or not part.exists:
        return asked
    return int(part.settle("batch_size", str(batch_size_for(plugin, 0, ways))))


def done(table: pa.Table, counts: Counts, plugin: Plugin, engine: Clock, asked: int, used: int) -> Produced:
    """What a stage made of a shard: its stats say how long the engine took, the batch size and how it computes, the manifest
    the batch size where it is not the one that was asked for.
    """
    how = plugin.computed() if isinstance(plugin, TellsHow) else {}
    stats = {"engine_seconds": round(engine.seconds, 3), "batch_size": used, **how}
    return Produced(table, counts, stats, batch_size=used if used != asked else 0)


MOST_THREADS = 64
"""More would wait for the interpreter's lock."""

Rows = list[dict[str, Any]]
Prepared = tuple[str | None, Any]


def pictures(
    part: Part, shard: int, plugin: Plugin, batch_size: int, only: Collection[str] | None = None
) -> Iterator[Pictures]:
    """Batches of `batch_size` rows, the last of fewer; where they are cut depends on the shard and `batch_size` alone.

    With `only`, rows of other image_ids are left out before anything of them is decoded.

    The plug-in's `prepare` is called in threads, and its `gather` in another; `prepare` raises BadImage for a picture that it
    cannot use. Anything else it raises for a picture that can be decoded is raised here. While a batch is worked on, the next
    one is being prepared and the one after it is read.
    """
    cut = _cut(part, shard, batch_size, only)
    gather = plugin.gather if isinstance(plugin, Gathers) else None
    with (
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(1) as gatherer,
        ThreadPoolExecutor(decoding_threads(), thread_name_prefix="capfilt-decode") as pool,
    ):
        try:
            coming = reader.submit(next, cut, None)
            ahead: deque[Future[Pictures]] = deque()
            while (rows := coming.result()) is not None:
                coming = reader.submit(next, cut, None)
                prepared = [pool.submit(_one, row, plugin.prepare) for row in rows]
                ahead.append(gatherer.submit(_batch, rows, prepared, gather))
                if len(ahead) > 1:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            # Whoever stops half-way should not wait for pictures that nobody will look at.
            gatherer.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)


def _cut(part: Part, shard: int, batch_size: int, only: Collection[str] | None) -> Iterator[Rows]:
    """The shard's rows, `batch_size` at a time whatever its row groups are; the last ones may be fewer."""
    rows: Rows = []
    wanted = None if only is None else pa.array(only, pa.string())
    for group in part.batches(shard, ("image_id", "status", "image")):
        if wanted is not None:
            group = group.filter(pc.is_in(group["image_id"], value_set=wanted))
        taken = 0
        while taken < group.num_rows:
            more = group.slice(taken, batch_size - len(rows))
            taken += more.num_rows
            rows += more.to_pylist()
            if len(rows) == batch_size:
                yield rows
                rows = []
    if rows:
        yield rows


def decoding_threads() -> int:
    """How many threads make pictures ready. For a processor as elsewhere: the engine wants the cores itself.

    For a GPU all cores but two, which start its kernels and put batches together; no more than PyTorch was told to use
    (`OMP_NUM_THREADS`), for that is a worker's share of a machine that it has with others. Shrinking a picture is one
    thread's work (`to_uint8`), so threads are cores.
    """
    usual = cpu_workers()
    if not torch.cuda.is_available():
        return usual
    return max(usual, min(cpu_workers(MOST_THREADS) - 2, torch.get_num_threads()))


def _one(row: dict[str, Any], prepare: Callable[[bytes], Any]) -> Prepared:
    """(why the row's picture cannot be used or None, what `prepare` made of it); takes the pixels out of the row."""
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


def _batch(rows: Rows, coming: list[Future[Prepared]], gather: Callable[[list[Any]], Any] | None) -> Pictures:
    found = [each.result() for each in coming]
    failures = [failure for failure, _ in found]
    place, count = [], 0
    for failure in failures:
        place.append(-1 if failure else count)
        count += not failure
    images = [image for failure, image in found if not failure]
    return Pictures(rows, failures, gather(images) if gather and images else images, place)
