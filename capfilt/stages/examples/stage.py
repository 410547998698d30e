"""The `examples` stage: questions, statements and labels of pictures that were ingested become an examples part.

Which formats there are is `formats/examples`, which picture a name means `named_pictures.py`. Here each row's
answers and label are looked at: what cannot be used is a row that says why.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

from capfilt.errors import UserError
from capfilt.formats.examples.daquar import in_parts
from capfilt.formats.examples.row import ExampleRow, example_rows
from capfilt.formats.values import storable
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.examples import ExamplesOptions
from capfilt.stages.named_pictures import NamedPictures
from capfilt.tables.contracts import EXAMPLES, LABELS, MAX_TEXT_CHARACTERS
from capfilt.tables.ids import example_id, file_sha256
from capfilt.tables.manifest import Counts
from capfilt.tables.sealed import fingerprint
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace, expanded

_TRUTH = {"true": "true", "1": "true", "yes": "true", "false": "false", "0": "false", "no": "false"}


class Examples(ShardStage):
    """Brings other tools' questions and statements in. Every one of the source is one row, in the source's order."""

    name = "examples"
    version = 3
    contract = EXAMPLES

    def __init__(self, options: ExamplesOptions, workspace: Workspace, output: Part | None = None) -> None:
        _check(options)
        self.options = options
        self.output = workspace.dataset("examples", options.dataset, output)
        self.images = [workspace.input("images", name).check() for name in options.images]
        self.source = expanded(options.source_path)
        self.annotations = expanded(options.annotations) if options.annotations else None
        self._pictures: NamedPictures | None = None

    def identity(self) -> Mapping[str, Any]:
        # Whoever asks is about to begin a part: a broken file must be found out before.
        self.shards()
        files = [path for path in (self.source, self.annotations) if path]
        return {
            "options": option_values(self.options),
            "dataset": self.options.dataset,
            # Of a folder the names are all that is read here.
            "source": [
                fingerprint({"names": [row.key for row in self._found[1]]})
                if path.is_dir()
                else file_sha256(path)
                for path in files
            ],
            "images": [part.digest() for part in self.images],
            # Own captions are marked: rows of other tasks are as they were.
            **({"own_captions": "marked"} if self._found[0] == "rating" else {}),
        }

    @cached_property
    def _found(self) -> tuple[str, list[ExampleRow]]:
        """(task, rows); pickled with the stage, so that every worker cuts the same list."""
        o = self.options
        task, rows = example_rows(self.source, self.annotations)
        if o.task != "auto":
            task = o.task
        if o.answer_parts:
            rows = [_joined(row) for row in rows]
        if o.split:
            rows = [row if row.split else replace(row, split=o.split) for row in rows]
        if o.splits:
            rows = [row for row in rows if row.split in o.splits]
        rows = rows[: o.limit] if o.limit else rows
        if not rows:
            raise UserError(f"{self.source}: has no examples in the splits {', '.join(o.splits)}")
        return task, rows

    def shards(self) -> list[int]:
        return list(range(math.ceil(len(self._found[1]) / self.options.shard_size)))

    def _rows(self, shard: int) -> list[ExampleRow]:
        size = self.options.shard_size
        return self._found[1][shard * size : (shard + 1) * size]

    def expected_rows(self, shard: int) -> int:
        return len(self._rows(shard))

    def setup(self) -> None:
        named = (image for row in self._found[1] for image in row.images if isinstance(image, str))
        self._pictures = NamedPictures(self.images, named)

    def process(self, shard: int) -> Produced:
        failed = Counter[str]()
        made = []
        for row in self._rows(shard):
            columns = self._columns(row)
            if columns["failure"] is not None:
                failed[columns["failure"]] += 1
            made.append(columns)
        counts = Counts(len(made), len(made) - failed.total(), {}, dict(sorted(failed.items())))
        return Produced(EXAMPLES.table(made), counts)

    def _columns(self, row: ExampleRow) -> dict[str, Any]:
        assert self._pictures is not None
        task = self._found[0]
        image_ids, lost = self._pictures.find(row)
        label = None if row.label is None else _label(task, row.label)
        failure, message = None, None
        if lost:
            failure, message = "no_image", row.fault or lost
        elif task != "classification" and (row.text is None or not row.text.strip()):
            failure, message = "empty_text", f"the {task} example has no text"
        elif row.text is not None and len(row.text) > MAX_TEXT_CHARACTERS:
            failure, message = "too_long", f"{len(row.text)} characters, more than {MAX_TEXT_CHARACTERS}"
        elif row.label is not None and label is None:
            failure, message = (
                "unknown_label",
                f"{row.label!r} is none of {', '.join(LABELS[task]) or 'any class'}",
            )
        elif task == "vqa" and row.answers == ():
            failure, message = "no_answer", "the source answers other questions, and not this one"
        elif task == "rating" and not _numbers(row.answers):
            failure, message = "no_answer", "a rating is one or more finite numbers"
        elif task == "choice" and not any(text.strip() for text in row.wrong_texts):
            failure, message = "no_answer", "there is no wrong text to tell the right one from"
        elif task in ("classification", "match") and label is None:
            failure, message = "no_answer", "there is no label"
        return {
            "example_id": example_id(self.options.dataset, row.key),
            "dataset": self.options.dataset,
            "key": row.key,
            "task": task,
            "image_ids": [] if lost else image_ids,
            "text": row.text,
            "answers": [{"answer": answer, "count": count} for answer, count in row.answers or ()],
            "label": label,
            "split": row.split,
            "failure": failure,
            "error_message": message and storable(message),
            "wrong_texts": list(row.wrong_texts) if task == "choice" else None,
            "category": row.category,
        }


def _numbers(answers: tuple[tuple[str, int], ...] | None) -> bool:
    """Whether there are ratings, every one of them a number."""
    try:
        return bool(answers) and all(math.isfinite(float(answer)) for answer, _ in answers or ())
    except ValueError:
        return False


def _label(task: str, value: str) -> str | None:
    """The label as the table spells it; None where it is none of the task's."""
    if task == "classification":
        return value.strip() or None
    name = value.strip().lower()
    if task == "nlvr":
        name = _TRUTH.get(name, name)
    elif task == "match":
        name = {"true": "match", "false": "no-match"}.get(_TRUTH.get(name, name), name.replace("_", "-"))
    return name if name in LABELS[task] else None


def _joined(row: ExampleRow) -> ExampleRow:
    """The row with its answers as the parts of one."""
    if not row.answers:
        return row
    parts = ", ".join(part for answer, count in row.answers for part in [answer] * count)
    return replace(row, answers=((in_parts(parts), 1),))


def _check(options: ExamplesOptions) -> None:
    """Raise UserError for the first option that cannot be."""
    if not options.images:
        raise UserError(
            "examples: --images must name at least one images part, whose pictures are asked about"
        )
