"""`score`: a scorer judges web and synthetic texts alike. A picture is encoded once, however many texts it has.

What scores, and how, is behind `plugins/`: the BLIP filter, or another scorer with columns of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from capfilt.data.tokenizer import clean
from capfilt.plugins.registry import SCORERS, checked_scores, open_scorer, reference, score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.options import ScoreOptions
from capfilt.stages.pixels import Clock, batch_size_for, done, pictures
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS
from capfilt.tables.shards import Counts, Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace


class ScoreStage(ShardStage):
    """Writes a row per text of a picture that is there; texts of pictures that are not are dropped as `no_image`."""

    name = "score"
    version = 1
    uses_gpu = True

    def __init__(self, options: ScoreOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.images = workspace.part("images", options.images).expect("images")
        self.captions = [workspace.part("captions", name).expect("captions") for name in options.captions]
        self.filter = reference(
            SCORERS,
            options.filter,
            options.filter_option,
            "--filter-option",
            workspace.model,
            options.precision,
            options.compile,
        )
        self.output = output or workspace.part("scores", options.out or self.filter.name)
        self.columns = dict(open_scorer(self.filter).columns)
        self.contract = score_contract(self.columns)

    @cached_property
    def mark(self) -> str:
        """The scorer in the identity. Kept: it is a hash of all its weights."""
        return self.filter.mark(open_scorer(self.filter))

    def identity(self) -> Mapping[str, Any]:
        # What `select` may judge by; the BLIP filter's columns were never told, and its older parts still count.
        columns = {"columns": list(self.columns)} if self.filter.plugin else {}
        return {
            "options": option_values(self.options),
            "filter": self.mark,
            **columns,
            "images": self.images.info["fingerprint"],
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return {self.mark: self.filter.origin()}

    def shards(self) -> list[int]:
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def setup(self) -> None:
        self.scorer = open_scorer(self.filter)
        self.scorer.setup()

    def process(self, shard: int) -> Produced:
        found = self.images.read(shard, FOUND_COLUMNS)
        texts: dict[str, list[dict[str, Any]]] = {}
        for row in texts_of(found, (part.read(shard) for part in self.captions)).to_pylist():
            texts.setdefault(row["image_id"], []).append(row)
        rows_in = sum(len(each) for each in texts.values())
        made: list[dict[str, Any]] = []
        dropped: Counter[str] = Counter()
        failed: Counter[str] = Counter()
        kept = 0
        engine = Clock()
        asked_size = self.options.batch_size
        size = batch_size_for(self.scorer, asked_size)
        for batch in pictures(self.images, shard, self.scorer.prepare, size):
            asked: list[dict[str, Any]] = []
            judged: list[str] = []
            image_index: list[int] = []
            for row, failure, place in zip(batch.rows, batch.failures, batch.place, strict=True):
                for text in texts.pop(row["image_id"], []):
                    if failure == "no_image":
                        dropped[failure] += 1
                        continue
                    reason = failure or text["failure"] or _fault(text["text"])
                    entry = {"text_id": text["text_id"], "image_id": row["image_id"], "failure": reason}
                    made.append(entry)
                    if reason:
                        failed[reason] += 1
                    else:
                        asked.append(entry)
                        judged.append(text["text"])
                        image_index.append(place)
            with engine:
                scores = self._scores(batch.images, image_index, judged, size)
            for entry, values in zip(asked, scores, strict=True):
                if all(map(math.isfinite, values)):
                    entry |= dict(zip(self.columns, values, strict=True))
                    kept += 1
                else:
                    entry["failure"] = "not_finite"
                    failed["not_finite"] += 1
        counts = Counts(rows_in, kept, dict(dropped), dict(failed))
        used = batch_size_for(self.scorer, asked_size)
        return done(self.contract.table(made), counts, engine, asked_size, used)

    def _scores(
        self, images: list[Any], image_index: list[int], texts: list[str], batch_size: int
    ) -> list[list[float]]:
        """A row per text, a number per column."""
        if not texts:
            return []
        made = self.scorer.score(
            images,
            image_index,
            texts,
            max_text_tokens=self.options.max_text_tokens,
            batch_size=batch_size,
        )
        rows: list[list[float]] = checked_scores(self.filter, made, len(texts), list(self.columns)).tolist()
        return rows


def _fault(text: str | None) -> str | None:
    """Why a text cannot be scored, or None."""
    if text is None or not text.strip() or not clean(text):
        return "empty_text"
    return "too_long" if len(text) > MAX_TEXT_CHARACTERS else None
