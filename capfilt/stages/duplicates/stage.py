"""The `duplicates` stage: which pictures of an images part are the same, byte for byte or nearly. No pixels are read.

Exact: equal SHA-256 of the bodies as received. Near: perceptual hashes (`capfilt.data.images.phash`) that differ in few
bits. Clusters are the connected components of both together, so that what a cluster is depends on the pictures alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from capfilt.errors import UserError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.duplicates import DuplicatesOptions
from capfilt.stages.inputs import shards_of
from capfilt.tables.contracts import SIGNALS, signal_fields
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

Array = npt.NDArray[Any]

_BLOCK = 2048
"""Hashes compared with so many others at once: 32 MB of differences."""

COLUMNS = pa.schema(
    signal_fields(
        {
            "cluster": ("string", "smallest image_id of the pictures that are the same, exactly or nearly"),
            "cluster_size": ("int64", "pictures in the cluster"),
            "exact_cluster": ("string", "smallest image_id of the pictures with equal bytes"),
            "exact_size": ("int64", "pictures with equal bytes"),
            "first": (
                "bool",
                "whether it is the picture of its cluster to keep: the largest, then of the smallest image_id",
            ),
        }
    )
)
"""Behind the table's own; all are null for a row without a picture."""


class Duplicates(ShardStage):
    """Writes one row per image of the part, failed ones too."""

    name = "duplicates"
    version = 1
    contract = SIGNALS

    def __init__(self, options: DuplicatesOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.images = workspace.input("images", options.images)
        self.output = output or workspace.part("signals", options.out)

    def identity(self) -> Mapping[str, Any]:
        # Clusters are of the whole part: a new picture anywhere in it may change a row of any shard.
        return {"options": option_values(self.options), "images": self.images.digest()}

    def shards(self) -> list[int]:
        # Here, so that what travels to workers is the clusters and not the work of finding them.
        _ = self._clusters
        return shards_of(self.images)

    @cached_property
    def _clusters(self) -> dict[int, pa.Table]:
        """The columns of each shard, in its rows' order."""
        columns = ["image_id", "status", "sha256", "phash", "original_width", "original_height"]
        shards, tables = [], []
        for shard in self.images.shards():
            tables.append(self.images.read(shard, columns))
            shards.append((shard, tables[-1].num_rows))
        table = pa.concat_tables(tables, promote_options="default") if tables else SIGNALS.table([])
        found = cluster(table, self.options.distance) if tables else table
        result, start = {}, 0
        for shard, rows in shards:
            result[shard] = found.slice(start, rows)
            start += rows
        return result

    def process(self, shard: int) -> Produced:
        ids = self.images.read(shard, ["image_id", "status", "phash"])
        found = self._clusters[shard]
        if not ids["image_id"].equals(found["image_id"]):
            raise UserError(f"{self.images.path}: shard {shard:05d} changed while duplicates were looked for")
        table = found.append_column("text_id", pa.nulls(ids.num_rows, pa.string()))
        have = ids.num_rows - found["cluster"].null_count
        failed = int(_malformed(ids).sum())
        lost = ids.num_rows - have - failed
        counts = Counts(
            ids.num_rows, have, {"no_image": lost} if lost else {}, {"decode_error": failed} if failed else {}
        )
        return Produced(SIGNALS.conform(table), counts)

    def remarks(self) -> list[str]:
        found = pa.concat_tables(self.output.tables(["image_id", "cluster", "cluster_size", "first"]))
        copies = found.filter(pc.invert(found["first"])).num_rows
        clusters = found.filter(pc.and_(found["first"], pc.greater(found["cluster_size"], 1))).num_rows
        pictures = found.num_rows - found["cluster"].null_count
        lines = [
            f"{pictures:,} pictures: {clusters:,} clusters with {copies:,} copies"
            + (
                f"; capfilt select --signals {self.output.name} --require first keeps one picture of each"
                if copies
                else ""
            )
        ]
        failed = self.output.counts().failed.get("decode_error")
        if failed:
            lines.append(
                f"{failed:,} perceptual hashes are not 16 hexadecimal digits; these rows are in no cluster"
            )
        return lines


def cluster(images: pa.Table, distance: int) -> pa.Table:
    """image_id and COLUMNS for each row of `images`, in its order.

    `images` has image_id, status, sha256, phash, original_width and original_height. Rows that are no success, those
    with neither hash, and those with a malformed one are in no cluster. Near pairs are looked for within bands of bits
    that equal hashes of at most `distance` differing bits must share one of: some hundred bytes of memory per row, seconds
    for a million of them.
    """
    have = np.array([status == "success" for status in images["status"].to_pylist()], bool)
    have &= ~_malformed(images)
    have &= images["sha256"].is_valid().to_numpy() | images["phash"].is_valid().to_numpy()
    rows = np.flatnonzero(have)
    ids = images["image_id"].to_pylist()
    # By id, so that the smallest member of a set is the one with the smallest id.
    rows = rows[np.argsort(np.array([ids[row] for row in rows], dtype=object), kind="stable")]
    exact = _Sets(len(rows))
    bodies = images["sha256"].to_pylist()
    exact.join_equal([bodies[row] for row in rows])
    near = _Sets(len(rows))
    near.parents = exact.parents.copy()
    hashes = images["phash"].to_pylist()
    near.join_equal([hashes[row] for row in rows])
    # Of equal hashes one stands for all: flat pictures, and viral ones, come in thousands.
    firsts: dict[int, int] = {}
    for place, row in enumerate(rows):
        if hashes[row] is not None:
            firsts.setdefault(int(hashes[row], 16), place)
    values = np.fromiter(firsts, np.uint64, len(firsts))
    places = np.fromiter(firsts.values(), np.int64, len(firsts))
    for one, other in near_pairs(values, distance):
        near.join(places[one], places[other])

    area = np.array(
        [_area(w, h) for w, h in zip(*(images[name].to_pylist() for name in _SIZES), strict=True)]
    )
    columns: dict[str, list[Any]] = {name: [None] * images.num_rows for name in COLUMNS.names}
    for name, sets in (("cluster", near), ("exact", exact)):
        roots = sets.roots()
        sizes = Counter(roots.tolist())
        label = "cluster" if name == "cluster" else "exact_cluster"
        for place, root in enumerate(roots.tolist()):
            columns[label][rows[place]] = ids[rows[root]]
            columns[f"{name}_size"][rows[place]] = sizes[root]
    best: dict[int, int] = {}
    for place, root in enumerate(near.roots().tolist()):
        if root not in best or area[rows[place]] > area[rows[best[root]]]:
            best[root] = place
        columns["first"][rows[place]] = False
    for place in best.values():
        columns["first"][rows[place]] = True
    arrays = [pa.array(columns[field.name], field.type) for field in COLUMNS]
    schema = pa.schema([SIGNALS.schema.field("image_id"), *COLUMNS])
    return pa.table([images["image_id"].combine_chunks(), *arrays], schema=schema)


def _malformed(images: pa.Table) -> Array:
    """Whether each row is a success with a perceptual hash that is not 64 bits in hexadecimal digits."""
    good = pc.match_substring_regex(images["phash"], r"^[0-9a-fA-F]{16}$")
    wrong = pc.and_(pc.equal(images["status"], "success"), pc.invert(good))
    return np.asarray(pc.fill_null(wrong, False), bool)


_SIZES = ("original_width", "original_height")


def _area(width: int | None, height: int | None) -> int:
    return (width or 0) * (height or 0)


def near_pairs(values: npt.NDArray[np.uint64], distance: int) -> Iterator[tuple[int, int]]:
    """Places (a, b) of distinct 64-bit values that differ in 1 to `distance` bits; a pair may come more than once."""
    if not distance or len(values) < 2:
        return
    # Of distance + 1 bands of bits, at most `distance` differing bits leave one untouched.
    edges = np.linspace(0, 64, distance + 2).astype(int)
    for low, high in pairwise(edges):
        band = (values >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order], prepend=band[order][:1] + np.uint64(1)))
        sizes = np.diff(starts, append=len(order))
        # Most values are alone in their band.
        for begin, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            group = order[begin : begin + size]
            for first in range(0, len(group), _BLOCK):
                some = group[first : first + _BLOCK]
                for second in range(first, len(group), _BLOCK):
                    others = group[second : second + _BLOCK]
                    differing = np.bitwise_count(values[some][:, None] ^ values[others][None, :])
                    for a, b in zip(*np.nonzero(differing <= distance), strict=True):
                        if some[a] < others[b] or (first != second and some[a] != others[b]):
                            yield int(some[a]), int(others[b])


class _Sets:
    """Disjoint sets of 0 to n - 1, each known by its smallest member."""

    def __init__(self, count: int) -> None:
        self.parents = np.arange(count)

    def find(self, member: int) -> int:
        parents = self.parents
        while parents[member] != member:
            parents[member] = parents[parents[member]]
            member = int(parents[member])
        return member

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.find(int(one)), self.find(int(other))))
        self.parents[high] = low

    def join_equal(self, values: list[Any]) -> None:
        """Join the members whose values are equal; None equals nothing."""
        firsts: dict[Any, int] = {}
        for place, value in enumerate(values):
            if value is not None:
                self.join(firsts.setdefault(value, place), place)

    def roots(self) -> Array:
        return np.array([self.find(member) for member in range(len(self.parents))], np.int64)
