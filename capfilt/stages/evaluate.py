"""`evaluate`: one checkpoint on the tasks it can do. The protocols are `tasks/`'s; which there are, its registry's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from capfilt.data.corpus import Corpus, from_images
from capfilt.data.example_set import ExampleSet, read_examples
from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.models.precision import check_precision
from capfilt.stages.base import Report, option_values
from capfilt.stages.options import EvaluateOptions
from capfilt.stages.pair_training import IMAGE_COLUMNS
from capfilt.stages.results import ResultStage
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from capfilt.tasks import registry
from capfilt.tasks.adapters import opened
from capfilt.tasks.intervals import LEVEL
from capfilt.tasks.outcome import Outcome, pack
from capfilt.tasks.registry import CAPTIONS, Task
from capfilt.training.distributed import device

_UNDEFINED = "has no value over these examples: all of one class, or all rated or scored alike"


class Evaluate(ResultStage):
    """Writes `runs/<out>.json`: metrics in percent (CIDEr x 100) with intervals, protocols, counts, and their units."""

    name = "evaluate"
    version = 4

    def __init__(self, options: EvaluateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.tasks = registry.chosen(options.tasks)
        asking = [task.name for task in self.tasks if task.reads != CAPTIONS]
        if asking and not options.examples:
            raise UserError(f"--tasks {asking[0]}: name examples to evaluate on (--examples)")
        check_precision(options.precision)
        self.checkpoint = workspace.model(options.model)
        checkpoint.read_config(self.checkpoint)
        self.images = workspace.input("images", options.images).check()
        self.pictures = [workspace.input("images", name).check() for name in options.pictures]
        self.examples = [workspace.input("examples", name).check() for name in options.examples]
        self.output = workspace.result(options.out or self.checkpoint.name)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "model": checkpoint.fingerprint(self.checkpoint),
            "images": self.images.digest(),
            "pictures": [part.digest() for part in self.pictures],
            "examples": [part.digest() for part in self.examples],
            "further": {task.name: task.depends(self.options) for task in self.tasks if task.further},
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.checkpoint, self.options.model)

    def headline(self, metrics: Mapping[str, float]) -> dict[str, float]:
        shown = [name for task in self.tasks for name in task.headline if name in metrics]
        return {name: metrics[name] for name in shown}

    def outlook(self) -> str:
        return (
            f"{', '.join(self.options.tasks)} on split {self.options.split or 'all'!r} of {self.images.path}"
        )

    def measure(self, report: Report) -> dict[str, Any]:
        contents, _ = checkpoint.open_any(self.checkpoint)
        model = opened(contents, device(), self.options.precision)
        registry.check(self.tasks, model.can, f"{self.checkpoint} ({model.what})")
        data = _Data(self, model.image_size)
        result = _Result(self.options)
        for task in self.tasks:
            read = data.of(task)
            outcome = task.function()(
                model.model,
                read,
                self.options,
                # The task's name binds now, not when the last one runs.
                lambda what, done, of, name=task.name: report(done, of, {name: what}),  # type: ignore[misc]
            )
            result.add(task, outcome, read.skipped | read.deselected)
        return {
            "checkpoint": checkpoint.fingerprint(self.checkpoint),
            "model": model.what,
            "split": self.options.split,
            **result.content(),
        }


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
            raise UserError(
                f"--tasks {task.name}: no examples of the task {task.reads} in split {o.split!r} of "
                f"{', '.join(str(part.path) for part in self.stage.examples)} "
                f"(left out: {examples.skipped | examples.deselected})"
            )
        if task.support:
            split = o.support_split or task.support
            if split == o.split or not o.split:
                raise UserError(
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
        corpus = from_images(images.tables(IMAGE_COLUMNS), splits=splits, size=self.size)
        if o.limit:
            keep = [row for row, image in enumerate(corpus.image_of_text.tolist()) if image < o.limit]
            whole, corpus = corpus, corpus.take(keep)
            cut = {"limit": len(whole) - len(corpus)} if len(corpus) < len(whole) else {}
            corpus.skipped, corpus.deselected = whole.skipped, {**whole.deselected, **cut}
        if not len(corpus):
            raise UserError(
                f"{images.path}: no texts with pictures in split {o.split!r} "
                f"(left out: {dict(corpus.skipped) | dict(corpus.deselected)})"
            )
        return corpus

    def _examples(self, task: Task, split: str, limit: int) -> ExampleSet:
        parts = [self.stage.images, *self.stage.pictures]
        return read_examples(
            (table for part in self.stage.examples for table in part.tables()),
            (table for part in parts for table in part.tables(("image_id", "image", "split"))),
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
