"""`score`: a scorer judges web and synthetic texts alike. A picture is encoded once, however many texts it has.

What scores, and how, is behind `plugins/`: the BLIP filter, or another scorer with columns of its own.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from capfilt.data.cleaning import clean
from capfilt.plugins.registry import SCORERS, checked_scores, open_scorer, reference, score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.pixels import Clock, Pictures, batch_size_for, done, pictures, settle, settled_batch_size
from capfilt.stages.score import ScoreOptions
from capfilt.tables.contracts import MAX_TEXT_CHARACTERS
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS, texts_of
from capfilt.tables.workspace import Workspace


@dataclass
class Asked:
    """The texts of a batch that can be scored: the row that waits for it, the text, and the place of its image."""

    entries: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    image_index: list[int] = field(default_factory=list)


class ScoreRows:
    """The rows of one scores shard in the making, and their account."""

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns
        self.made: list[dict[str, Any]] = []
        self.rows_in = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def asked(self, batch: Pictures, texts: dict[str, list[dict[str, Any]]]) -> Asked:
        """What is to be scored of a batch; its images are taken out of `texts`, rows of theirs by image."""
        asked = Asked()
        for row, failure, place in zip(batch.rows, batch.failures, batch.place, strict=True):
            for text in texts.pop(row["image_id"], []):
                self.rows_in += 1
                if failure == "no_image":
                    self.dropped[failure] += 1
                    continue
                reason = failure or text["failure"] or _fault(text["text"])
                entry = {"text_id": text["text_id"], "image_id": row["image_id"], "failure": reason}
                self.made.append(entry)
                if reason:
                    self.failed[reason] += 1
                else:
                    asked.entries.append(entry)
                    asked.texts.append(text["text"])
                    asked.image_index.append(place)
        return asked

    def add(self, asked: Asked, scores: list[list[float]]) -> None:
        """Puts the scores where they belong."""
        for entry, values in zip(asked.entries, scores, strict=True):
            if all(map(math.isfinite, values)):
                entry |= dict(zip(self.columns, values, strict=True))
                self.kept += 1
            else:
                entry["failure"] = "not_finite"
                self.failed["not_finite"] += 1

    def counts(self, left: Mapping[str, list[dict[str, Any]]]) -> Counts:
        """The account. `left`: texts whose image did not come; a shard that has any does not add up."""
        rows_in = self.rows_in + sum(map(len, left.values()))
        return Counts(rows_in, self.kept, dict(self.dropped), dict(self.failed))


def texts_by_image(found: pa.Table, captions: Iterable[pa.Table]) -> dict[str, list[dict[str, Any]]]:
    """The rows of `texts_of`, by their image."""
    texts: dict[str, list[dict[str, Any]]] = {}
    for row in texts_of(found, captions).to_pylist():
        texts.setdefault(row["image_id"], []).append(row)
    return texts


class ScoreStage(ShardStage):
    """Writes a row per text of a picture that is there; texts of pictures that are not are dropped as `no_image`."""

    name = "score"
    accounts = "texts"
    # Since 3, an image's texts are queries of one copy of its keys: the last digits differ; since 4, pictures are Pillow's
    # bicubic pixels, of whole pictures.
    version = 4
    uses_gpu = True
    rows_per_second = 10.0

    def __init__(self, options: ScoreOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.filter = reference(
            SCORERS,
            options.filter,
            options.filter_option,
            "--filter-option",
            workspace.model,
            options.precision,
            options.compile,
            options.draft,
        )
        self.columns = dict(open_scorer(self.filter).columns)
        self.contract = score_contract(self.columns)
        self.images = workspace.input("images", options.images)
        self.captions = self.caption_parts(workspace)
        self.output = output or workspace.part("scores", options.out or self.filter.name)

    def caption_parts(self, workspace: Workspace) -> list[Part]:
        """The captions parts to score."""
        return [workspace.input("captions", name) for name in self.options.captions]

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
            "captions": self.caption_marks(),
        }

    def caption_marks(self) -> list[str]:
        """The captions parts in the identity."""
        return [part.info["fingerprint"] for part in self.captions]

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return {self.mark: self.filter.origin()}

    def shards(self) -> list[int]:
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def setup(self) -> None:
        self.scorer = open_scorer(self.filter)
        self.scorer.setup()
        settle(self.output, self.scorer)

    def process(self, shard: int) -> Produced:
        found = self.images.read(shard, FOUND_COLUMNS)
        texts = texts_by_image(found, captions_of(self.images, found["image_id"], self.captions, shard))
        size = self.batch_size()
        engine, rows = Clock(), ScoreRows(self.columns)
        for batch in pictures(self.images, shard, self.scorer, size):
            asked = rows.asked(batch, texts)
            with engine:
                scores = self.scores(batch.images, asked, size)
            rows.add(asked, scores)
        return done(
            self.contract.table(rows.made),
            rows.counts(texts),
            self.scorer,
            engine,
            self.options.batch_size,
            self.batch_size(),
        )

    @cached_property
    def asked(self) -> int:
        """Pictures at a time that all shards are to have; 0 where nobody can know."""
        return settled_batch_size(self.output, self.scorer, self.options.batch_size)

    def batch_size(self) -> int:
        """Pictures at a time, as far as is known now."""
        return batch_size_for(self.scorer, self.asked)

    def scores(self, images: Any, asked: Asked, batch_size: int) -> list[list[float]]:
        """A row per text, a number per column."""
        if not asked.texts:
            return []
        made = self.scorer.score(
            images,
            asked.image_index,
            asked.texts,
            max_text_tokens=self.options.max_text_tokens,
            batch_size=batch_size,
        )
        rows: list[list[float]] = checked_scores(
            self.filter, made, len(asked.texts), list(self.columns)
        ).tolist()
        return rows


def _fault(text: str | None) -> str | None:
    """Why a text cannot be scored, or None."""
    if text is None or not text.strip() or not clean(text):
        return "empty_text"
    return "too_long" if len(text) > MAX_TEXT_CHARACTERS else None
