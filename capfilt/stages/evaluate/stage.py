"""`evaluate`: one checkpoint on the tasks it can do. The protocols are `tasks/`'s; which there are, its registry's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.corpus import COLUMNS, Corpus, from_images
from capfilt.data.example_set import ExampleSet, read_examples
from capfilt.errors import MissingInput, UserError
from capfilt.inference.adapters import Opened, capable, opened
from capfilt.models import checkpoint, kind_of
from capfilt.stages.base import Report, option_values
from capfilt.stages.evaluate import EvaluateOptions
from capfilt.stages.remembering import remembering
from capfilt.stages.results import ResultStage
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.tasks import registry
from capfilt.tasks.intervals import LEVEL
from capfilt.tasks.outcome import Outcome, pack
from capfilt.tasks.registry import CAPTIONS, Task, Unsuited
from capfilt.training.distributed import device

_UNDEFINED = "has no value over these examples: all of one class, or all rated or scored alike"


class Evaluate(ResultStage):
    """Writes `runs/<out>.json`: metrics in percent (CIDEr x 100) with intervals, protocols, counts, and their units."""

    name = "evaluate"
    version = 4

    def __init__(self, options: EvaluateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        named = registry.chosen(options.tasks) if options.tasks else []
        asking = [task.name for task in named if task.reads != CAPTIONS]
        if asking and not options.examples:
            raise UserError(f"--tasks {asking[0]}: name examples to evaluate on (--examples)")
        self.checkpoint, self.workspace = workspace.model(options.model), workspace
        config = checkpoint.shape_of(self.checkpoint)
        self.kind = kind_of(config)
        can = capable(config)
        registry.check(named, can, f"{self.checkpoint} ({self.kind.who})")
        self.images = workspace.input("images", options.images).check()
        self.pictures = [workspace.input("images", name).check() for name in options.pictures]
        self.examples = [workspace.input("examples", name).check() for name in options.examples]
        self.output = workspace.result(options.out or self.checkpoint.name)
        self.unsuited: dict[str, str] = {}
        self.tasks = named or self._possible(can)

    def _possible(self, can: Sequence[str]) -> list[Task]:
        """The tasks that model, images and examples allow; `unsuited` has why each other one is left out.

        Raises MissingInput where there is none: a part may have to be written first.
        """
        o, there = self.options, _Contents(self.images, self.examples)
        found = []
        for task in registry.TASKS:
            why = registry.lacking(task, can, self.kind.who)
            if not why and task.reads != CAPTIONS and not o.examples:
                why = "name examples to evaluate on (--examples)"
            if not why and not there.has(task.reads, o.split):
                what = "texts" if task.reads == CAPTIONS else f"examples of the task {task.reads}"
                parts = [self.images] if task.reads == CAPTIONS else self.examples
                why = f"no {what} in split {o.split or 'all'!r} of {', '.join(str(part.path) for part in parts)}"
            if why:
                self.unsuited[task.name] = why
            else:
                found.append(task)
        if not found:
            # Of tasks that the model can do, if there are any: the others are no news.
            able = {task.name for task in registry.TASKS if task.possible(can)}
            whys = {name: why for name, why in self.unsuited.items() if name in able} or self.unsuited
            raise MissingInput(f"{self.checkpoint}: no task to evaluate; {'; '.join(_grouped(whys))}")
        return found

    def remarks(self) -> list[str]:
        """The tasks left out, and why, as the result has them."""
        said: dict[str, str] = json.loads(self.output.read_bytes()).get("unsuited", {})
        return [f"left out {line}" for line in _grouped(said)]

    def identity(self) -> Mapping[str, Any]:
        changed = {task.name: task.version for task in self.tasks if task.version > 1}
        return {
            # Those that were found out are as if they had been named.
            "options": option_values(self.options) | {"tasks": [task.name for task in self.tasks]},
            "model": checkpoint.fingerprint(self.checkpoint),
            "images": self.images.digest(),
            "pictures": [part.digest() for part in self.pictures],
            "examples": [part.digest() for part in self.examples],
            # Of protocols that changed: results of all others stand.
            **({"protocols": changed} if changed else {}),
            "further": {task.name: task.depends(self.options) for task in self.tasks if task.further},
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.checkpoint, self.options.model)

    def headline(self, metrics: Mapping[str, float]) -> dict[str, float]:
        shown = [name for task in self.tasks for name in task.headline if name in metrics]
        return {name: metrics[name] for name in shown}

    def outlook(self) -> str:
        return f"{', '.join(task.name for task in self.tasks)} on split {self.options.split or 'all'!r} of {self.images.path}"

    def measure(self, report: Report) -> dict[str, Any]:
        contents, _ = checkpoint.open_any(self.checkpoint)
        model = opened(contents, device(), self.options.precision)
        with remembering(contents.model, self.workspace):
            return self._measured(model, report)

    def _measured(self, model: Opened, report: Report) -> dict[str, Any]:
        data = _Data(self, model.image_size)
        result = _Result(self.options)
        unsuited = dict(self.unsuited)
        for task in self.tasks:
            try:
                read = data.of(task)
                outcome = task.function()(
                    model.model,
                    read,
                    self.options,
                    # The task's name binds now, not when the last one runs.
                    lambda what, done, of, name=task.name: report(done, of, {name: what}),  # type: ignore[misc]
                )
            except Unsuited as error:
                if self.options.tasks:
                    raise
                unsuited[task.name] = str(error).removeprefix(f"--tasks {task.name}: ")
                continue
            result.add(task, outcome, read.skipped | read.deselected)
        if len(unsuited) == len(registry.TASKS):
            raise UserError(f"{self.checkpoint}: no task to evaluate; {'; '.join(_grouped(unsuited))}")
        return {
            "checkpoint": checkpoint.fingerprint(self.checkpoint),
            "model": model.what,
            "split": self.options.split,
            **({"unsuited": unsuited} if unsuited else {}),
            **result.content(),
        }


def _grouped(unsuited: Mapping[str, str]) -> list[str]:
    """Tasks with why they are left out, those of one reason together."""
    by_reason: dict[str, list[str]] = {}
    for name, why in unsuited.items():
        by_reason.setdefault(why, []).append(name)
    return [f"{', '.join(names)}: {why}" for why, names in by_reason.items()]


class _Contents:
    """Which tasks' rows there are, by split: found out without pictures."""

    def __init__(self, images: Part, examples: Sequence[Part]) -> None:
        self._images = images
        self._rows = {
            (row["task"], row.get("split"))
            for part in examples
            for table in part.tables(["task", "split", "failure"])
            for row in table.filter(pc.field("failure").is_null()).to_pylist()
        }

    def has(self, reads: str, split: str) -> bool:
        """Whether there are rows of what a task reads; of every split where it is ""."""
        if reads == CAPTIONS:
            return self._captioned(split)
        return any(reads == task and split in ("", other) for task, other in self._rows)

    def _captioned(self, split: str) -> bool:
        # Shard by shard: the first text will do.
        for table in self._images.tables(["captions", "split", "status"]):
            rows = table.filter(pc.field("status") == "success")
            if split:
                rows = (
                    rows.filter(pc.field("split") == split)
                    if "split" in rows.column_names
                    else rows.slice(0, 0)
                )
            if any(filter(None, pc.list_flatten(rows["captions"].combine_chunks()).to_pylist())):
                return True
        return False


@dataclass
class _Data:
    """What the tasks read, each once."""

    stage: Evaluate
    size: int
    _read: dict[tuple[str, str], Any] = field(default_factory=dict)

    def of(self, task: Task) -> Corpus | ExampleSet:
        """The corpus or the examples of a task; UserError where there are none."""
        o = self.stage.options
        if task.reads == CAPTIONS:
            corpus: Corpus = self._once((CAPTIONS, o.split), self._corpus)
            return corpus
        examples: ExampleSet = self._once(
            (task.reads, o.split), lambda: self._examples(task, o.split, o.limit)
        )
        if not len(examples):
            raise Unsuited(
                f"--tasks {task.name}: no examples of the task {task.reads} in split {o.split!r} of "
                f"{', '.join(str(part.path) for part in self.stage.examples)} "
                f"(left out: {examples.skipped | examples.deselected})"
            )
        if task.support:
            split = o.support_split or task.support
            if split == o.split or not o.split:
                raise Unsuited(
                    f"--tasks {task.name}: learns from split {split!r}, so name another --split to evaluate on"
                )
            examples.support = self._once((task.reads, split), lambda: self._examples(task, split, 0))
        return examples

    def _once(self, key: tuple[str, str], read: Any) -> Any:
        if key not in self._read:
            self._read[key] = read()
        return self._read[key]

    def _corpus(self) -> Corpus:
        o, images = self.stage.options, self.stage.images
        splits = (o.split,) if o.split else None
        batches = (batch for shard in images.shards() for batch in images.batches(shard, COLUMNS))
        tables = (pa.Table.from_batches([batch]) for batch in batches)
        looked_at: list[int] = []
        corpus = from_images(tables, splits=splits, size=self.size, limit=o.limit, progress=looked_at.append)
        unread = images.rows - sum(looked_at)
        if unread:
            corpus.deselected["limit"] = corpus.deselected.get("limit", 0) + unread
        if not len(corpus):
            raise Unsuited(
                f"{images.path}: no texts with pictures in split {o.split!r} "
                f"(left out: {dict(corpus.skipped) | dict(corpus.deselected)})"
            )
        return corpus

    def _examples(self, task: Task, split: str, limit: int) -> ExampleSet:
        parts = [self.stage.images, *self.stage.pictures]
        return read_examples(
            (table for part in self.stage.examples for table in part.tables()),
            lambda wanted: (
                table
                for part in parts
                for table in part.holding(wanted, ("image_id", "image", "split", "captions"))
            ),
            task.reads,
            (split,) if split else None,
            size=self.size,
            limit=limit,
        )


class _Result:
    """The result file's content, task by task."""

    def __init__(self, options: EvaluateOptions) -> None:
        self._options = options
        self._metrics: dict[str, float] = {}
        self._intervals: dict[str, dict[str, Any]] = {}
        self._baselines: dict[str, float] = {}
        self._tasks: dict[str, dict[str, Any]] = {}
        self._units: dict[str, dict[str, Any]] = {}
        self._groups: dict[str, dict[str, Any]] = {}
        self._top: dict[str, Any] = {}

    def add(self, task: Task, outcome: Outcome, left_out: Mapping[str, int]) -> None:
        """One task's figures. Raises ValueError where another task has a metric of the same name."""
        twice = sorted(set(self._metrics) & set(outcome.metrics))
        if twice:
            raise ValueError(f"{task.name}: {', '.join(twice)} is another task's metric too")
        o = self._options
        # An AUC of one class, or a correlation with what never varies, is no number: JSON has none for it either.
        none = [name for name, value in outcome.metrics.items() if not math.isfinite(value)]
        known = {name: value for name, value in outcome.metrics.items() if name not in none}
        self._metrics |= {name: round(value, 3) for name, value in known.items()}
        self._baselines |= {
            name: round(value, 3)
            for name, value in outcome.baselines.items()
            if name not in none and math.isfinite(value)
        }
        for name, units in outcome.units.items():
            if name in none:
                continue
            if o.resamples:
                interval = units.interval(o.resamples, seed=o.seed).as_dict()
                self._intervals[name] = {
                    key: round(value, 3) if isinstance(value, float) and key != "level" else value
                    for key, value in interval.items()
                }
            self._units[name] = units.as_dict()
            self._groups.setdefault(units.queries, {"groups": pack(units.groups), "number": len(units.names)})
        details = dict(outcome.details)
        if none:
            details["skipped"] = dict(details.get("skipped", {})) | dict.fromkeys(none, _UNDEFINED)
        # Where readers of a result have always found them.
        if "captions" in details:
            self._top["captions"] = details.pop("captions")
        for name in ("images", "texts"):
            if name in outcome.counts:
                self._top.setdefault(name, outcome.counts[name])
        self._tasks[task.name] = {
            "protocol": outcome.protocol + (f"; limit = {o.limit:,}" if o.limit else ""),
            "metrics": list(known),
            "counts": dict(outcome.counts),
            "left_out": dict(left_out),
            **({"details": details} if details else {}),
        }

    def content(self) -> dict[str, Any]:
        """What goes into the file."""
        return {
            "metrics": self._metrics,
            "intervals": self._intervals,
            "baselines": self._baselines,
            "bootstrap": {"resamples": self._options.resamples, "seed": self._options.seed, "level": LEVEL},
            "tasks": self._tasks,
            **self._top,
            "units": self._units,
            "queries": self._groups,
        }
