"""Intervals of evaluation figures: the percentile bootstrap, paired differences, headroom recovered.

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
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000  # two-sided 95% limits then rest on the 50 outermost resamples of each side
LEVEL = 0.95
SEPARATION = (
    3.0  # standard errors; a smaller gap between oracle and baseline makes the share a ratio of two noises
)
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
    """Which share of the gap between the best trivial choice and the oracle a corpus recovered.

    Attributes:
        value: 1 at the oracle, 0 at the best trivial choice, negative below it; NaN where `separation` is under 3.
        low, high: its two-sided percentile interval; NaN with the value.
        separation: the gap in standard errors of the gap.
        baseline: the best trivial choice.
        gap: the oracle's figure less that of the baseline.
    """

    value: float
    low: float
    high: float
    separation: float
    baseline: str
    gap: float


def group_index(groups: Sequence[Hashable] | NDArray[np.generic] | None, length: int) -> NDArray[np.int64]:
    """Numbers the groups 0..G-1 by first appearance: int64 [length]; every unit is its own group when `groups` is None.

    Raises ValueError when `groups` has another length.
    """
    if groups is None:
        return np.arange(length, dtype=np.int64)
    if len(groups) != length:
        raise ValueError(f"{len(groups)} groups for {length} values")
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in _listed(groups)], dtype=np.int64)


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


def headroom(
    rows: Mapping[str, Sequence[ArrayLike]],
    pictures: Sequence[Sequence[Hashable] | NDArray[np.generic]],
    trivial: Sequence[str],
    oracle: str = "oracle",
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> dict[str, Headroom]:
    """(row - best trivial) / (oracle - best trivial) of every row, by its name; bootstrapped over the test pictures.

    Args:
        rows: for each row of a table, `trivial` and `oracle` among them, one array per term of the figure: every seed's value
            for each query, [seeds, Q], or [Q] for one seed. The figure is the sum of the terms' means, and a row's
            is the mean over its seeds. Hits make recalls: TR@1 + IR@1 has the terms [seeds, images] and
            [seeds, texts].
        pictures: for each term the picture of each query, [Q]. All terms have the same pictures.
        trivial: the rows that need no curation. The best of them is chosen anew in every resample, as its luck
            is part of the question.

    Pictures are resampled once for all rows, seeds and terms. Seeds are averaged, not resampled: the interval is
    that of other test pictures, not of other runs. A gap under 3 standard errors bounds no share. Resamples without a
    gap have no share and are left out; at 3 standard errors they are about 1 in 700.

    Raises ValueError for a row that `rows` lacks, unequal shapes, terms of other pictures, or a value that is not finite.
    """
    if absent := {oracle, *trivial} - rows.keys() or (set() if trivial else {"a trivial row"}):
        raise ValueError(f"headroom needs rows that are not there: {', '.join(sorted(absent))}")
    if uneven := [name for name, terms in rows.items() if len(terms) != len(pictures)]:
        raise ValueError(f"row {uneven[0]} has {len(rows[uneven[0]])} terms, and pictures {len(pictures)}")
    numbers = {picture: number for number, picture in enumerate(dict.fromkeys(_listed(pictures[0])))}
    means, replicates = np.zeros(len(rows)), np.zeros((resamples, len(rows)))
    for term, of in enumerate(map(_listed, pictures)):
        if set(of) != numbers.keys():
            raise ValueError(f"term {term} has other pictures than term 0")
        index = np.array([numbers[picture] for picture in of], dtype=np.int64)
        # In order of the pictures, which numbers them alike in every term: equal draws then mean equal pictures.
        order = np.argsort(index, kind="stable")
        values = []
        for name, terms in rows.items():
            each = np.atleast_2d(np.asarray(terms[term], dtype=np.float64))
            if each.ndim != 2 or each.shape[1] != len(index):
                raise ValueError(f"row {name}: term {term} has shape {each.shape} for {len(index)} queries")
            values.append(each.mean(axis=0)[order])
        found, drawn = bootstrap_means(values, index[order], resamples=resamples, seed=seed)
        means, replicates = means + found, replicates + drawn
    table = np.concatenate([means[None], replicates])
    names = list(rows)
    base = table[:, [names.index(name) for name in trivial]]
    baseline, best = trivial[int(base[0].argmax())], base.max(axis=1)
    gap = table[:, names.index(oracle)] - best
    error = float(gap[1:].std(ddof=1))
    # A gap that no resample changes is known exactly.
    separation = float(gap[0]) / error if error else math.copysign(math.inf, gap[0]) if gap[0] else 0.0
    share = np.full_like(table, math.nan)
    if separation >= SEPARATION:
        np.divide(table - best[:, None], gap[:, None], out=share, where=gap[:, None] > 0)
    made = {}
    for name, column in zip(names, share.T, strict=True):
        interval = percentile_interval(float(column[0]), column[1:], level)
        made[name] = Headroom(
            interval.value, interval.low, interval.high, separation, baseline, float(gap[0])
        )
    return made


def _listed(picture_of: Sequence[Hashable] | NDArray[np.generic]) -> Sequence[Hashable]:
    return picture_of.tolist() if isinstance(picture_of, np.ndarray) else picture_of
