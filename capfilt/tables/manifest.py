"""The account and the description of a shard, and the plan of a part: values that are written down beside the rows.

Reading and writing them is `shards.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from capfilt.errors import RunError
from capfilt.tables.sealed import seal, unseal


@dataclass(frozen=True)
class Counts:
    """The accounting of one shard, in the stage's input rows: rows_in = kept + dropped + failed.

    Attributes:
        rows_in: input rows the stage was given.
        kept: input rows that came through.
        dropped: input rows left out on purpose, by reason.
        failed: input rows that failed, by failure (from the closed list).
    """

    rows_in: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise RunError unless every input row is accounted for."""
        total = self.kept + sum(self.dropped.values()) + sum(self.failed.values())
        if total != self.rows_in:
            raise RunError(
                f"rows do not add up: {self.rows_in} in, but {self.kept} kept + {sum(self.dropped.values())} dropped + "
                f"{sum(self.failed.values())} failed = {total}"
            )

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows_in + other.rows_in,
            self.kept + other.kept,
            _add(self.dropped, other.dropped),
            _add(self.failed, other.failed),
        )


def _add(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    return {key: left.get(key, 0) + right.get(key, 0) for key in sorted({*left, *right})}


@dataclass(frozen=True)
class Manifest:
    """The description of a committed shard. `etag` hashes the file's size and its end, the whole footer included.

    Of a generation above 0, `previous` is the SHA-256 of the one it was made from, and `changed` the options that it was
    made with otherwise than the part. `batch_size`: images at a time, where a stage's engine chose that itself or memory
    forced fewer than the options say; 0 where it was as they say. `part`: the fingerprint of the part; empty in manifests
    from before they had it.
    """

    shard: int
    table: str
    contract_version: int
    fingerprint: str
    rows: int
    size: int
    etag: str
    sha256: str
    counts: Counts
    generation: int = 0
    previous: str = ""
    changed: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 0
    part: str = ""

    @property
    def file(self) -> str:
        """The name that other tools' readers know the shard by."""
        return f"{self.shard:05d}.parquet"

    def to_json(self) -> bytes:
        return seal(asdict(self))

    @staticmethod
    def from_json(data: bytes) -> Manifest:
        """Raises ValueError, KeyError or TypeError when `data` is not a manifest."""
        return Manifest.of(unseal(data))

    @staticmethod
    def of(values: Mapping[str, Any]) -> Manifest:
        """The manifest with these JSON values. Raises ValueError, KeyError or TypeError where they cannot be."""
        manifest = Manifest(**{**values, "counts": Counts(**values["counts"])})
        kinds = {"int": int, "str": str, "dict[str, Any]": dict, "dict[str, int]": dict}
        for owner in (manifest, manifest.counts):
            for each in fields(owner):
                if each.type in kinds and type(getattr(owner, each.name)) is not kinds[str(each.type)]:
                    raise ValueError(f"{each.name} is not of type {each.type}")
        counts = manifest.counts
        numbers = (
            counts.rows_in,
            counts.kept,
            *counts.dropped.values(),
            *counts.failed.values(),
            manifest.rows,
        )
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError("a number of rows is below 0 or no number")
        return manifest


@dataclass(frozen=True)
class Successor:
    """The place of a further generation's rows after the generation before; see Manifest."""

    generation: int = 0
    previous: str = ""
    changed: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A whole part.

    Attributes:
        shards: their numbers, ascending.
        rows: their input rows, all together; None where they are not known yet.
        gaps: the incomplete parts that it is made from, by path, each with its `Part.gap`.
    """

    shards: Sequence[int]
    rows: int | None = None
    gaps: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"planned": ranges_of(self.shards), "planned_rows": self.rows, "gaps": dict(self.gaps)}


def ranges_of(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: [0, 1, 2, 5] is "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def numbers_of(ranges: str) -> list[int]:
    """The inverse of `ranges_of`. Raises ValueError."""
    found: list[int] = []
    for run in filter(None, ranges.split(",")):
        low, _, high = run.partition("-")
        found += range(int(low), int(high or low) + 1)
    return found
