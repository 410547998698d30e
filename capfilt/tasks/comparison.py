"""Results of `evaluate` read back, and set side by side: which differences are outside their interval.

What lives here: reading a result file, and the difference of a figure between two runs with its interval. What does not:
tables for people (`capfilt.results`).

Where two runs hold a figure's units over the same queries, both are resampled together (paired bootstrap: Koehn, EMNLP
2004, sec. 4), so that what makes an image hard for both cancels out. Where the queries differ, each is resampled by itself
and the interval is wider. A figure without units is compared by its value alone, and so is one that depends on how much it
was measured over, where that differs: a text is found sooner among 100 than among 1,000.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from capfilt.errors import UserError
from capfilt.tasks.intervals import LEVEL, RESAMPLES, Interval, percentile_interval
from capfilt.tasks.outcome import STATISTICS, Floats, Units, unpack
from capfilt.tasks.registry import CAPTIONS, TASKS

_TRUTH = {"roc_auc": 1, "tau_c": 1, "spearman": 1}
"""The column that holds what is true, not what a model says, by statistic: it must agree for a pairing."""

_STAGE = "evaluate"
_SIZES = {
    "retrieval": ("images", "texts"),
    "captioning": ("images", "texts"),
    "zero-shot": ("classes",),
    "few-shot": ("classes",),
    "classification": ("classes",),
}
"""Which counts of a task its figures depend on; of captioning's, CIDEr alone, which weighs words by all the references."""


@dataclass(frozen=True)
class Result:
    """A result file of `evaluate`.

    Attributes:
        name: as the file says.
        path: the file.
        content: all of it.
    """

    name: str
    path: Path
    content: Mapping[str, Any] = field(repr=False)

    @property
    def metrics(self) -> Mapping[str, float]:
        """The figures, flat."""
        found: Mapping[str, float] = self.content["metrics"]
        return found

    def interval(self, metric: str) -> tuple[float, float] | None:
        """Low and high of a figure; None where it has no interval."""
        found = self._mapping("intervals").get(metric)
        if not isinstance(found, Mapping) or found.get("low") is None or found.get("high") is None:
            return None
        return float(found["low"]), float(found["high"])

    def baseline(self, metric: str) -> float | None:
        """What chance or the majority class gives."""
        found = self._mapping("baselines").get(metric)
        return None if found is None else float(found)

    @property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """What the file says of each task: protocol, metrics, counts."""
        return self._mapping("tasks")

    def units(self, metric: str) -> Units | None:
        """A figure's units; None where the file has none. Raises UserError where they cannot be read."""
        packed = self._mapping("units").get(metric)
        if packed is None:
            return None
        try:
            groups = self._mapping("queries")[packed["queries"]]
            columns = np.stack([unpack(each) for each in packed["columns"]], axis=1)
            index = unpack(groups["groups"]).astype(np.int64)
            number = int(groups["number"])
            if packed["statistic"] not in STATISTICS or len(index) != len(columns) or index.max() >= number:
                raise ValueError("its parts do not fit together")
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{self.path}: units of {metric} cannot be read ({error}); evaluate again"
            ) from error
        return Units(packed["statistic"], columns, index, tuple(map(str, range(number))))

    def queries(self, metric: str) -> str:
        """The mark of the queries that a figure is over."""
        return str(self._mapping("units")[metric]["queries"])

    @cached_property
    def bootstrap(self) -> tuple[int, int, float]:
        """(resamples, seed, level) as evaluated; the usual ones where there were none."""
        said = self._mapping("bootstrap")
        return (
            int(said.get("resamples") or RESAMPLES),
            int(said.get("seed", 0)),
            float(said.get("level", LEVEL)),
        )

    def _mapping(self, name: str) -> Mapping[str, Any]:
        found = self.content.get(name)
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class Difference:
    """A figure of one run less that of another.

    Attributes:
        value: the difference.
        interval: with its limits; None where either run has no units.
        paired: whether both were resampled together, over the same queries.
        sized: whether it has no interval because the figure depends on how much was measured, and that differs.
    """

    value: float
    interval: Interval | None
    paired: bool
    sized: bool = False

    @property
    def verdict(self) -> str:
        """above, below or within: where 0 lies to the interval; "" without one."""
        if self.interval is None:
            return ""
        if not self.interval.excludes(0.0):
            return "within"
        return "above" if self.value > 0 else "below"


def read_result(path: Path) -> Result:
    """The result at `path`. Raises UserError where there is none, or it is of another stage."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path}: no such result ({error.strerror}); write it with capfilt evaluate"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as a result ({error}); evaluate again") from error
    stage = content.get("stage", _STAGE) if isinstance(content, dict) else _STAGE
    if stage != _STAGE:
        raise UserError(f"{path}: is a result of capfilt {stage}; name one that capfilt {_STAGE} wrote")
    metrics = content.get("metrics") if isinstance(content, dict) else None
    if not isinstance(metrics, dict) or not all(isinstance(each, int | float) for each in metrics.values()):
        raise UserError(f"{path}: holds no metrics; name a result that capfilt evaluate wrote")
    return Result(str(content.get("name") or path.stem), path, content)


def difference(result: Result, first: Result, metric: str) -> Difference:
    """`metric` of `result` less that of `first`. Both must have it."""
    value = result.metrics[metric] - first.metrics[metric]
    if _sizes(result, metric) != _sizes(first, metric):
        return Difference(value, None, False, sized=True)
    mine, theirs = result.units(metric), first.units(metric)
    if mine is None or theirs is None or mine.statistic != theirs.statistic:
        return Difference(value, None, False)
    resamples, seed, level = first.bootstrap
    paired = result.queries(metric) == first.queries(metric) and _same_truth(mine, theirs)
    others: Floats = theirs.replicates(resamples, seed)
    # Apart, the draws must not be the same ones: groups of equal number would be coupled by chance.
    own: Floats = mine.replicates(resamples, seed if paired else seed + 1)
    return Difference(value, percentile_interval(value, own - others, level), paired)


def _sizes(result: Result, metric: str) -> list[Any]:
    """The counts that a figure depends on."""
    return [
        said.get("counts", {}).get(name)
        for task, said in result.tasks.items()
        if metric in said.get("metrics", ()) and (task != "captioning" or metric == "cider")
        for name in _SIZES.get(task, ())
    ]


def _same_truth(mine: Units, theirs: Units) -> bool:
    column = _TRUTH.get(mine.statistic)
    return column is None or bool(np.array_equal(mine.columns[:, column], theirs.columns[:, column]))


def shared_metrics(results: Sequence[Result]) -> list[str]:
    """The metrics of any of the results, in the order they first come."""
    return list(dict.fromkeys(metric for result in results for metric in result.metrics))


def unlike(results: Sequence[Result]) -> list[str]:
    """What makes the runs hard to compare, in words: other splits, protocols (limits among them), numbers, pictures."""
    found = []
    splits = {str(result.content.get("split")) for result in results}
    if len(splits) > 1:
        found.append(f"the runs are of different splits: {', '.join(sorted(splits))}")
    tasks = list(dict.fromkeys(task for result in results for task in result.tasks))
    for task in tasks:
        those = {result.name: result.tasks[task] for result in results if task in result.tasks}
        ways = {name: str(said.get("protocol")) for name, said in those.items()}
        numbers = {name: counts_told(said) for name, said in those.items()}
        for told, what in ((ways, "in different ways"), (numbers, "over different numbers")):
            if len(set(told.values())) > 1:
                each = "; ".join(f"{name}: {words}" for name, words in told.items())
                found.append(f"{task} was measured {what} ({each})")
    reads = {task.name: task.reads for task in TASKS}
    of_examples = any(reads.get(task, CAPTIONS) != CAPTIONS for task in tasks)
    for inputs in ("images", "pictures", "examples") if of_examples else ("images",):
        digests = {json.dumps(each[inputs]) for each in map(_inputs, results) if inputs in each}
        if len(digests) > 1:
            found.append(f"the runs are over different parts of {inputs}")
    return found


def counts_told(said: Mapping[str, Any]) -> str:
    """How much of what a task was measured over, in words."""
    return ", ".join(f"{count:,} {name}" for name, count in said.get("counts", {}).items())


def _inputs(result: Result) -> Mapping[str, Any]:
    found = result.content.get("identity")
    return found if isinstance(found, Mapping) else {}
