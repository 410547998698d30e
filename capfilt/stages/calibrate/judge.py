"""The first stages of `calibrate`: the signals of every text.

`JudgePairs` judges the calibration pairs, `Judge` the corpus. Not here: which pairs those are (`held_out.py`), the signals
(`judging.py`), probabilities (`stage.py`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from capfilt.errors import UserError
from capfilt.plugins.registry import score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import (
    Pairs,
    check_captioners,
    check_unseen,
    human_texts,
    near_texts,
    pairs_of,
    synthetic_pairs,
    written_for,
)
from capfilt.stages.calibrate.judging import BATCH, MEANINGS, Judging, Vectors
from capfilt.stages.folds import origins
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.pixels import Clock, done, pictures, settle
from capfilt.stages.score.stage import Asked, ScoreRows, texts_by_image
from capfilt.tables.contracts import SIGNALS, signal_fields
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS
from capfilt.tables.workspace import Workspace

PAIR_COLUMNS: Mapping[str, tuple[str, str]] = {
    "own": ("bool", "whether the text is the picture's own"),
    "near": ("bool", "whether the text is one of a picture that is like this one"),
    "synthetic": (
        "bool",
        "whether a captioner wrote the text, of near ones but for a word; null without its captions",
    ),
    "failure": ("string", "why the pair has no score; null where it has"),
}


class Judge(ShardStage):
    """Writes a row per text of a picture that is there, with its signals."""

    name = "calibrate-judge"
    version = 3  # further signals
    accounts = "texts"
    uses_gpu = True
    rows_per_second = 10.0
    not_mine: tuple[str, ...] = (
        "judged",
        "calibration_captions",
        "method",
        "signals",
        "folds",
        "negatives",
        "resamples",
        "batch_size",
    )

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.corpus = self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.judging = Judging(options, workspace, self.corpus)
        self.columns = {name: MEANINGS[name] for name in self.judging.columns}
        self.contract = score_contract(self.columns)
        self.output = workspace.part("scores", f"{options.judged_as}-judged")

    @cached_property
    def mark(self) -> str:
        """Filters and neighbours in the identity. Kept: it is a hash of all weights."""
        return self.judging.fingerprint()

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=self.not_mine),
            "filter": self.mark,
            "columns": list(self.columns),
            # The bank is of the whole part.
            "images": self.corpus.digest(),
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return origins(self.options.filter, self.workspace)

    def shards(self) -> list[int]:
        _ = self.judging.drawn  # so that workers do not look for it again
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def setup(self) -> None:
        self._during = contextlib.ExitStack()
        self._during.enter_context(self.judging.ready())
        settle(self.output, self.judging)

    def teardown(self) -> None:
        self._during.close()

    def process(self, shard: int) -> Produced:
        texts = self._texts(shard)
        captions = self._captions(texts)
        size = self.options.batch_size or BATCH
        engine, rows = Clock(), ScoreRows(self.columns)
        for batch in pictures(self.images, shard, self.judging, size):
            asked = rows.asked(batch, texts)
            with engine:
                rows.add(asked, self._signals(batch.images, asked, captions))
        return done(self._table(rows), rows.counts(texts), self.judging, engine, size, size)

    def _texts(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        """The texts to judge, by image."""
        found = self.images.read(shard, FOUND_COLUMNS)
        return texts_by_image(found, captions_of(self.images, found["image_id"], self.captions, shard))

    def _table(self, rows: ScoreRows) -> pa.Table:
        return self.contract.table(rows.made)

    def _captions(self, texts: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
        """The texts that captioners wrote, by image."""
        return {
            image: [row["text"] for row in rows if row["source"] == "synthetic" and row["text"]]
            for image, rows in texts.items()
        }

    def _signals(self, images: Any, asked: Asked, captions: Mapping[str, Sequence[str]]) -> list[list[float]]:
        if not asked.texts:
            return []
        ids = [entry["image_id"] for entry in asked.entries]
        rows: list[list[float]] = self.judging.signals(
            images, ids, asked.image_index, asked.texts, captions
        ).tolist()
        return rows


class JudgePairs(Judge):
    """Writes a row per calibration pair: a picture with a text of its own, of any other, or of one that is like it."""

    name = "calibrate-pairs"
    version = 2  # near texts
    not_mine = ("judged", "method", "signals", "folds", "resamples", "batch_size")

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace)
        self.images = workspace.input("images", options.calibration)
        if self.images.path == self.corpus.path:
            raise UserError(f"--calibration {options.calibration}: is the part that is judged; give another")
        self.captions, self.contract = [], SIGNALS
        self.written = [workspace.input("captions", name) for name in options.calibration_captions]
        self.output = workspace.part("signals", f"{options.judged_as}-pairs")

    def identity(self) -> Mapping[str, Any]:
        written = [part.info["fingerprint"] for part in self.written]
        made = {**super().identity(), "calibration": self.images.digest()}
        return {**made, **({"written": written} if written else {})}

    def begin(self) -> str:
        # The first stage of all, so that nothing is judged for a calibration that cannot be.
        check_unseen(self.options, self.workspace, self.images, self.corpus)
        if self.written:
            check_captioners(self.options, self.workspace, self.images)
        _ = self.pairs, self.synthetic
        return super().begin()

    def shards(self) -> list[int]:
        _ = self.pairs, self.synthetic
        return super().shards()

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs, by image; they travel to workers."""
        o = self.options
        given = f"--calibration {o.calibration}: human texts (ingest --source human)"
        return pairs_of(human_texts(self.images), o.negatives, o.seed, given)

    @cached_property
    def synthetic(self) -> Pairs:
        """The pairs with texts that a captioner wrote for the calibration pictures; none without --calibration-captions."""
        o = self.options
        if not self.written:
            return {}
        given = f"--calibration-captions {' '.join(o.calibration_captions)}"
        rows = (row for row in written_for(self.images, self.written) if row["image_id"] in self.pairs)
        return synthetic_pairs(rows, o.negatives, o.seed, given)

    def setup(self) -> None:
        super().setup()
        ids: list[str] = []
        seen: list[Vectors] = []
        for shard in self.images.shards():
            for batch in pictures(self.images, shard, self.judging, BATCH, only=self.pairs):
                if batch.decoded:
                    ids += batch.decoded
                    seen.append(self.judging.alike(batch.images))
        count = max(1, self.options.negatives // 2)
        self.near = near_texts(self.pairs, ids, np.concatenate(seen), count, self.options.seed) if ids else {}

    def expected_rows(self, shard: int) -> int:
        return sum(len(self.pairs[image]) + len(self.synthetic.get(image, [])) for image in self._here(shard))

    def _here(self, shard: int) -> list[str]:
        ids: list[str] = self.images.read(shard, ["image_id"])["image_id"].to_pylist()
        return [image for image in ids if image in self.pairs]

    def _texts(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        further = (self.near, self.synthetic)
        return {
            image: self.pairs[image] + [row for some in further for row in some.get(image, [])]
            for image in self._here(shard)
        }

    def _captions(self, texts: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
        return {image: [row["text"] for row in rows if row["own"]] for image, rows in self.synthetic.items()}

    def _table(self, rows: ScoreRows) -> pa.Table:
        marks = {
            (image, row["text_id"]): {
                "own": row["own"],
                "near": row["near"],
                "synthetic": some is self.synthetic,
            }
            for some in (self.pairs, self.near, self.synthetic)
            for image, texts in some.items()
            for row in texts
        }
        columns = {**{name: ("float", doc) for name, doc in self.columns.items()}, **PAIR_COLUMNS}
        if not self.written:
            del columns["synthetic"]
        made = [
            {**dict.fromkeys(columns), **row, **marks[row["image_id"], row["text_id"]]} for row in rows.made
        ]
        schema = pa.schema([*SIGNALS.schema, *signal_fields(columns)])
        return SIGNALS.conform(pa.Table.from_pylist(made, schema))
