"""Intervals of evaluation figures: the percentile bootstrap, paired differences, and the headroom recovered.

What lives here: resampling of units (images, usually) with a seed, and the figures that are means over units.
What does not: the figures themselves (`retrieval`, `captioning`, `filter_quality`) and how they are printed.

Source of the method: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile
intervals); resampling both systems' answers to the same queries together is Koehn, "Statistical Significance
Tests for Machine Translation Evaluation", EMNLP 2004, section 4.

Captions of one image stand or fall together, so resampling captions as if they were independent gives
intervals that are too narrow: pass `groups` (the image of each query), and whole images are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000  # two-sided 95% limits then rest on the 50 outermost resamples of each side
LEVEL = 0.95
_BLOCK = 2_000_000  # numbers held at once by each temporary array: 16 MB


@dataclass(frozen=True)
class Interval:
    """A figure with its two-sided percentile interval, all in the figure's own unit."""

    value: float
    low: float
    high: float
    level: float
    resamples: int

    def excludes(self, value: float) -> bool:
        """True when `value` lies outside the closed interval; for a difference, `excludes(0)` is the paired test."""
        return not self.low <= value <= self.high

    def as_dict(self) -> dict[str, float | int | None]:
        """The fields as JSON knows them: a limit that is not finite becomes null."""
        fields = {"value": self.value, "low": self.low, "high": self.high, "level": self.level}
        plain: dict[str, float | int | None] = {k: v if math.isfinite(v) else None for k, v in fields.items()}
        plain["resamples"] = self.resamples
        return plain


@dataclass(frozen=True)
class Headroom:
    """How much of the gap between the better trivial choice and the oracle a curated corpus recovered.

    `share` is 1 at the oracle, 0 at the better of raw and human only, negative below it. `baseline` names
    that better choice. `certain` is the share of resamples in which the oracle was above the baseline at all.
    """

    share: Interval
    baseline: str
    headroom: Interval
    certain: float


def group_index(groups: Sequence[Hashable] | NDArray[np.generic] | None, length: int) -> NDArray[np.int64]:
    """Numbers the groups 0..G-1 by first appearance: int64 [length]; every unit is its own group when `groups` is None.

    Raises ValueError when `groups` has another length.
    """
    if groups is None:
        return np.arange(length, dtype=np.int64)
    if len(groups) != length:
        raise ValueError(f"{len(groups)} groups for {length} values")
    numbers: dict[Hashable, int] = {}
    labels = groups.tolist() if isinstance(groups, np.ndarray) else groups
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], dtype=np.int64)


def resample_counts(units: int, resamples: int, seed: int, width: int = 0) -> Iterator[NDArray[np.float64]]:
    """How often each unit is drawn, block by block: float64 [b, units], every row summing to `units`.

    The draws depend on `units` and `seed` alone, so a longer run begins with the rows of a shorter one, and
    two figures bootstrapped with one seed are resampled together. width: how many values the caller spreads a
    row over, so that blocks become small enough for that.
    """
    if units < 1:
        raise ValueError("there is nothing to resample: no units")
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // max(units, width))
    for start in range(0, resamples, rows):
        block = min(rows, resamples - start)
        drawn = rng.integers(0, units, size=(block, units), dtype=np.int64)
        drawn += np.arange(block, dtype=np.int64)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=block * units)
        yield counts.reshape(block, units).astype(np.float64)


def percentile_interval(value: float, replicates: NDArray[np.float64], level: float = LEVEL) -> Interval:
    """The interval between the (1 - level) / 2 quantiles of the replicates; NaN replicates are left out."""
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be between 0 and 1, not {level}")
    defined = replicates[~np.isnan(replicates)]
    if not len(defined):
        return Interval(value, math.nan, math.nan, level, len(replicates))
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high), level, len(replicates))


def bootstrap_means(
    values: Sequence[ArrayLike],
    groups: Sequence[Hashable] | NDArray[np.generic] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Means of several systems over the same queries, all resampled together.

    `values` holds one array [Q] per system (hits as booleans, or scores). Returns the means, float64 [S], and
    their replicates, float64 [resamples, S]. Raises ValueError on unequal lengths or an empty or non-finite
    array.
    """
    table = np.stack([np.asarray(v, dtype=np.float64) for v in values], axis=1)
    if table.ndim != 2 or not len(table):
        raise ValueError("a mean needs at least one query, as one array per system")
    if not np.isfinite(table).all():
        raise ValueError("a query's value is not finite")
    index = group_index(groups, len(table))
    sizes = np.bincount(index).astype(np.float64)
    sums = np.stack([np.bincount(index, weights=column) for column in table.T], axis=1)
    blocks = [(c @ sums) / (c @ sizes)[:, None] for c in resample_counts(len(sizes), resamples, seed)]
    return table.mean(axis=0), np.concatenate(blocks)


def bootstrap_mean(
    values: ArrayLike,
    groups: Sequence[Hashable] | NDArray[np.generic] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """The mean of `values` [Q] with its percentile interval, whole groups resampled."""
    means, replicates = bootstrap_means([values], groups, resamples=resamples, seed=seed)
    return percentile_interval(float(means[0]), replicates[:, 0], level)


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    groups: Sequence[Hashable] | NDArray[np.generic] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Interval:
    """mean(first) - mean(second) with its interval; both are [Q] over the same queries in the same order."""
    means, replicates = bootstrap_means([first, second], groups, resamples=resamples, seed=seed)
    return percentile_interval(float(means[0] - means[1]), replicates[:, 0] - replicates[:, 1], level)


def headroom_recovered(
    curated: ArrayLike,
    raw: ArrayLike,
    human_only: ArrayLike,
    oracle: ArrayLike,
    groups: Sequence[Hashable] | NDArray[np.generic] | None = None,
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Headroom:
    """(curated - max(raw, human only)) / (oracle - max(raw, human only)), bootstrapped over the test images.

    Each argument holds one value per test query ([Q]: hits or scores), in one order. The better trivial
    choice is picked anew in every resample, as its luck is part of the question. Where the oracle does not
    beat it, the share has no meaning: NaN as the value, and when that happens in more than (1 - level) / 2 of
    the resamples the test set cannot bound the share at all, so the interval is (-inf, inf) rather than a
    quantile of the lucky rest.
    """
    means, replicates = bootstrap_means(
        [curated, raw, human_only, oracle], groups, resamples=resamples, seed=seed
    )
    table = np.concatenate([means[None], replicates])
    base = np.maximum(table[:, 1], table[:, 2])
    gap = table[:, 3] - base
    share = np.full(len(table), np.nan)
    np.divide(table[:, 0] - base, gap, out=share, where=gap > 0)
    certain = float((gap[1:] > 0).mean())
    interval = percentile_interval(float(share[0]), share[1:], level)
    if 1.0 - certain > (1.0 - level) / 2:
        interval = Interval(interval.value, -math.inf, math.inf, level, resamples)
    return Headroom(
        share=interval,
        baseline="raw" if means[1] > means[2] else "human_only",
        headroom=percentile_interval(float(gap[0]), gap[1:], level),
        certain=certain,
    )
