"""Runs any signal: a row for every picture, or every text, of an images part, in the table `signals`.

A test that needs more than some rows at a time (`duplicates`) is a stage of its own that writes the same table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from capfilt.errors import RunError
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.signal import Signal, TextSignal
from capfilt.tables.contracts import SIGNALS, signal_fields
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace

_AT_ONCE = 1000
"""Texts that a signal gets at once; pictures come as many as a row group has."""

Row = dict[str, Any]


class SignalStage(ShardStage):
    """Writes one row per picture or per text, with nulls where the signal was not asked, or has no values."""

    contract = SIGNALS

    def __init__(self, options: Signal, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.name, self.version = options.name, options.version
        self.accounts = "texts" if isinstance(options, TextSignal) else "images"
        self.fields = signal_fields(options.columns)
        self.images = workspace.input("images", options.images)
        names = options.captions if isinstance(options, TextSignal) else ()
        self.captions = [workspace.input("captions", name) for name in names]
        self.output = output or workspace.part("signals", options.out or options.name)

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "columns": {field.name: str(field.type) for field in self.fields},
            "images": self.images.info["fingerprint"],
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def shards(self) -> list[int]:
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def process(self, shard: int) -> Produced:
        rows: list[Row] = []
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        for batch in self._texts(shard) if self.accounts == "texts" else self._pictures(shard):
            measured = iter(self._measured([row for row, reason in batch if not reason]))
            for row, reason in batch:
                values = None if reason else next(measured)
                rows.append({key: row.get(key) for key in ("image_id", "text_id")} | dict(values or {}))
                if reason:
                    (failed if self.accounts == "texts" else dropped)[reason] += 1
                elif values is None:
                    dropped["no_value"] += 1
        kept = len(rows) - dropped.total() - failed.total()
        table = SIGNALS.table([{key: row[key] for key in ("image_id", "text_id")} for row in rows])
        for field in self.fields:
            table = table.append_column(field, self._column(field, rows))
        return Produced(table, Counts(len(rows), kept, dict(dropped), dict(failed)))

    def _pictures(self, shard: int) -> Iterator[list[tuple[Row, str]]]:
        """The pictures of a shard, a row group at a time, each with the reason that it is not measured for, or ""."""
        for batch in self.images.batches(shard, ["image_id", "status", *self.options.reads]):
            yield [(row, "" if row["status"] == "success" else "no_image") for row in batch.to_pylist()]

    def _texts(self, shard: int) -> Iterator[list[tuple[Row, str]]]:
        images = self.images.read(shard, FOUND_COLUMNS)
        texts = texts_of(images, captions_of(self.images, images["image_id"], self.captions, shard))
        for batch in texts.to_batches(_AT_ONCE):
            rows = batch.to_pylist()
            yield [(row, row.pop("failure") or ("empty_text" if row["text"] is None else "")) for row in rows]

    def _measured(self, rows: Sequence[Row]) -> Sequence[Mapping[str, Any] | None]:
        """What the signal says of each row. Raises RunError where that is not what a signal has to say."""
        made = self.options.measure(rows) if rows else []
        # Somebody else's code: it may return anything.
        said: Any = made
        good = isinstance(said, list | tuple) and all(
            each is None or (isinstance(each, Mapping) and {*each} <= {*self.options.columns})
            for each in said
        )
        if not good or len(made) != len(rows):
            raise RunError(
                f"signal {self.name}: `measure` must return, for each of {len(rows)} rows, None or a value for some of "
                f"{', '.join(self.options.columns)}"
            )
        return made

    def _column(self, field: pa.Field, rows: Sequence[Row]) -> pa.Array:
        try:
            return pa.array([row.get(field.name) for row in rows], field.type)
        except (pa.ArrowException, TypeError, OverflowError) as error:
            raise RunError(
                f"signal {self.name}: column {field.name!r} is {field.type}, but {error}"
            ) from error
