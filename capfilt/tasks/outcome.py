"""What an evaluation comes to, in the one form that every task's has: figures, and the units they are made of.

What lives here: `Outcome`, `Units`, the statistics that make a figure out of units, their bootstrap, and the compact form
in which units stand in a result file. What does not: the evaluations, and how two runs are compared (`comparison`).

A figure is resampled by image: whole groups of units are drawn with replacement (`intervals`). The draws depend on the
number of groups and the seed alone, so two runs over the same units are resampled together, whatever the statistic.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capfilt.errors import UserError
from capfilt.tasks.captioning import bleu_of
from capfilt.tasks.filter_quality import PairCounter
from capfilt.tasks.intervals import (
    LEVEL,
    RESAMPLES,
    Interval,
    group_index,
    percentile_interval,
    resample_counts,
)

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Units:
    """What one figure is made of: a row of numbers per unit (a query, a caption, a pair), and the unit's group.

    Attributes:
        statistic: the key in `STATISTICS` of how the figure follows.
        columns: float64 [Q, C]; what they mean is the statistic's to say.
        groups: int64 [Q], numbered from 0 by first appearance: what is drawn together, an image as a rule.
        names: one per group, the images' ids: two runs are over the same units where these and `groups` agree.
    """

    statistic: str
    columns: Floats
    groups: Ints
    names: tuple[str, ...]

    def value(self) -> float:
        """The figure: percent, or points of 100."""
        return float(self._figures(np.ones((1, len(self.names))))[0])

    def replicates(self, resamples: int = RESAMPLES, seed: int = 0) -> Floats:
        """The figure of every resample: float64 [resamples]."""
        draws = resample_counts(len(self.names), resamples, seed, width=len(self.columns))
        return np.concatenate([self._figures(counts) for counts in draws])

    def interval(self, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0) -> Interval:
        """The figure with its percentile interval."""
        return percentile_interval(self.value(), self.replicates(resamples, seed), level)

    def _figures(self, counts: Floats) -> Floats:
        """The figure under every row of counts [R, G] of the groups."""
        return np.asarray(STATISTICS[self.statistic](self, counts), dtype=np.float64)

    def sums(self) -> Floats:
        """The columns added up by group: float64 [G, C]."""
        return np.stack(
            [
                np.bincount(self.groups, weights=column, minlength=len(self.names))
                for column in self.columns.T
            ],
            axis=1,
        )

    @property
    def queries(self) -> str:
        """A mark of the groups and of which unit is in which: equal marks, equal queries in one order."""
        told = json.dumps([list(self.names), len(self.groups)]).encode()
        return hashlib.sha256(told + self.groups.astype("<i8").tobytes()).hexdigest()[:16]

    def as_dict(self) -> dict[str, Any]:
        """For a result file: the columns and groups packed; the names are the caller's to keep, once (`queries`)."""
        return {
            "statistic": self.statistic,
            "queries": self.queries,
            "columns": [pack(column) for column in self.columns.T],
        }


def units(
    statistic: str, columns: Sequence[ArrayLike] | ArrayLike, groups: Sequence[Hashable] | NDArray[np.generic]
) -> Units:
    """Units of a figure: `columns` one array [Q] or several, `groups` [Q] the name of each unit's image."""
    table = np.asarray(columns, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table.T
    listed = groups.tolist() if isinstance(groups, np.ndarray) else list(groups)
    return Units(statistic, table, group_index(listed, len(table)), tuple(map(str, dict.fromkeys(listed))))


_DTYPES = ("|u1", "<i4", "<f4", "<f8")


def pack(values: ArrayLike) -> str:
    """Numbers [Q] as text for a result file: the smallest type that holds them exactly, deflated, in base 64."""
    given = np.asarray(values, dtype=np.float64)
    kind = next(kind for kind in _DTYPES if _holds(kind, given))
    return f"{kind}:{base64.b64encode(zlib.compress(given.astype(kind).tobytes(), 9)).decode()}"


def _holds(kind: str, given: Floats) -> bool:
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.array_equal(given.astype(kind).astype(np.float64), given, equal_nan=True))


def unpack(text: str) -> Floats:
    """The numbers float64 [Q] that `pack` wrote. Raises UserError for anything else."""
    kind, _, body = text.partition(":")
    try:
        if kind not in _DTYPES:
            raise ValueError(f"type {kind!r}")
        return np.frombuffer(zlib.decompress(base64.b64decode(body, validate=True)), dtype=kind).astype(
            np.float64
        )
    except (ValueError, zlib.error) as error:
        raise UserError(f"packed numbers cannot be read ({error}); evaluate again") from error


@dataclass(frozen=True)
class Outcome:
    """One task's figures for one model.

    Attributes:
        protocol: how it was measured, in words.
        metrics: flat names and values, percent or points of 100.
        units: of those metrics that have an interval, by their names.
        counts: of what was measured: images, texts, examples.
        baselines: what chance or the majority class gives, by metric.
        details: what else belongs in the result: the captions written, what was skipped and why. JSON-able.
    """

    protocol: str
    metrics: Mapping[str, float]
    units: Mapping[str, Units]
    counts: Mapping[str, int]
    baselines: Mapping[str, float] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


# Statistics: (units, counts float64 [R, G] of the groups) -> the figure of every row, float64 [R].


def _mean(units: Units, counts: Floats) -> Floats:
    """100 x the mean of the one column."""
    sizes = np.bincount(units.groups, minlength=len(units.names)).astype(np.float64)
    found: Floats = 100.0 * (counts @ units.sums()[:, 0]) / (counts @ sizes)
    return found


def _ratios(units: Units, counts: Floats) -> Floats:
    """100 x the mean of the ratios of columns: 0 to 1, 2 to 3, ...: recalls of both directions make R-mean so."""
    sums = counts @ units.sums()
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = 100.0 * (sums[:, ::2] / sums[:, 1::2]).mean(axis=1)
    return found


def _bleu4(units: Units, counts: Floats) -> Floats:
    """BLEU-4 of the summed columns of `captioning.bleu_parts`: 4 matches, 4 guesses, both lengths."""
    return bleu_of(counts @ units.sums())[:, 3]


def _roc_auc(units: Units, counts: Floats) -> Floats:
    """100 x the ROC-AUC of column 0 (scores) for column 1 (1 = true, 0 = false)."""
    score, label = units.columns.T
    weights = counts[:, units.groups]
    true = weights @ label
    pairs = true * (weights.sum(axis=1) - true)
    balance = np.full(len(weights), np.nan)
    np.divide(PairCounter(score, label).concordance(weights), pairs, out=balance, where=pairs > 0)
    return 50.0 * (1.0 + balance)


def _tau_c(units: Units, counts: Floats) -> Floats:
    """100 x Kendall's tau-c of column 0 (scores) and column 1 (ratings)."""
    score, rating = units.columns.T
    return 100.0 * PairCounter(score, rating).tau_c(counts[:, units.groups])


def _spearman(units: Units, counts: Floats) -> Floats:
    """100 x Spearman's rho of columns 0 and 1: Pearson's r of average ranks under the weights."""
    weights = counts[:, units.groups]
    total = weights.sum(axis=1)[:, None]
    x, y = (_weighted_ranks(column, weights) for column in units.columns.T)
    x, y = x - (weights * x).sum(1)[:, None] / total, y - (weights * y).sum(1)[:, None] / total
    norm = np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))
    rho = np.full(len(weights), np.nan)
    np.divide((weights * x * y).sum(1), norm, out=rho, where=norm > 0)
    return 100.0 * rho


def _weighted_ranks(values: Floats, weights: Floats) -> Floats:
    """Average ranks [R, Q] of values [Q] that each count as often as weights [R, Q] say."""
    place = np.unique(values, return_inverse=True)[1]
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    mass = np.add.reduceat(weights[:, order], starts, axis=1)
    last = np.cumsum(mass, axis=1)
    found: Floats = (last - (mass - 1) / 2)[:, place]
    return found


STATISTICS: dict[str, Callable[[Units, Floats], Floats]] = {
    "mean": _mean,
    "ratios": _ratios,
    "bleu4": _bleu4,
    "roc_auc": _roc_auc,
    "tau_c": _tau_c,
    "spearman": _spearman,
}
