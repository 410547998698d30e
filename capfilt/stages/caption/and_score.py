"""`caption --filter`: captions and scores in one pass over the pictures, for two models with one vision tower.

A picture is decoded and encoded once. The parts are those that `caption` and `score` write, identities and fingerprints
included: either may go on with what the other began.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from capfilt.errors import RunError, UserError
from capfilt.inference.engine import same_tower
from capfilt.models import checkpoint
from capfilt.plugins.checkpoints import BlipCaptioner, BlipFilter
from capfilt.plugins.registry import SCORERS, reference
from capfilt.stages.base import Produced
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.caption.stage import CaptionRows, CaptionStage
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.pixels import Clock, done, pictures
from capfilt.stages.score import ScoreOptions
from capfilt.stages.score.stage import ScoreRows, ScoreStage, texts_by_image
from capfilt.tables.contracts import CAPTIONS
from capfilt.tables.manifest import Manifest
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS
from capfilt.tables.workspace import Workspace


class _Captioned:
    """Tells of the captions, whose account the stage's own leaves out."""

    def __init__(self, captions: Part) -> None:
        self.captions = captions

    def add(self, manifest: Manifest, stats: Mapping[str, Any]) -> None:
        pass

    def figures(self, seconds: float) -> Mapping[str, Any]:
        return {}

    def lines(self, seconds: float) -> Sequence[str]:
        counts = self.captions.counts()
        lost = f"{sum(counts.dropped.values()):,} dropped + {sum(counts.failed.values()):,} failed"
        account = f"{counts.rows_in:,} images in = {counts.kept:,} kept + {lost}"
        return [f"{self.captions.path}: {account}; {self.captions.rows:,} captions"]


class CaptionAndScore(ScoreStage):
    """Writes the scores part, and each of its shards' captions before it."""

    # A shard of captions is an input that the work itself makes.
    reads_manifests = False

    def __init__(self, options: CaptionOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.captioning = CaptionStage(dataclasses.replace(options, filter=""), workspace)
        self.captions_mark = ""
        scoring = ScoreOptions(
            filter=options.filter,
            images=options.images,
            captions=(self.captioning.output.name,),
            batch_size=options.batch_size,
            precision=options.precision,
            compile=options.compile,
            draft=options.draft,
        )
        scorer = reference(SCORERS, options.filter, (), "--filter", workspace.model)
        for named in (self.captioning.captioner, scorer):
            if named.plugin:
                raise UserError(
                    f"--filter scores with the captioner's own vision tower; {named.given} is a plug-in"
                )
        super().__init__(scoring, workspace, output)

    def caption_parts(self, workspace: Workspace) -> list[Part]:
        """Those that this stage writes."""
        return [self.captioning.output]

    def caption_marks(self) -> list[str]:
        stage = self.captioning
        return [stage.output.identity_fingerprint(stage.contract, stage.name, stage.full_identity())]

    def begin(self) -> str:
        if not self.output.exists:
            # Workers find out too, but only when there is something to clean up.
            towers = [
                checkpoint.load(Path(named.argument))[0].visual_encoder
                for named in (self.captioning.captioner, self.filter)
            ]
            if not same_tower(*towers):
                raise UserError(
                    f"--filter {self.filter.given}: its vision tower is not that of {self.captioning.captioner.given}; "
                    "finetune both with --freeze vision from one checkpoint, or run `capfilt score` afterwards"
                )
        self.captions_mark = self.captioning.begin()
        return super().begin()

    def shards(self) -> list[int]:
        return shards_of(self.images)

    def outputs(self) -> list[Part]:
        return [self.captioning.output, self.output]

    def tally(self) -> _Captioned:
        return _Captioned(self.captioning.output)

    def finish(self) -> None:
        self.captioning.finish()
        super().finish()

    def setup(self) -> None:
        self.captioning.setup()
        super().setup()
        writer, scorer = self.captioning.writer, self.scorer
        assert isinstance(writer, BlipCaptioner)
        assert isinstance(scorer, BlipFilter)
        self.vision = writer.engine
        writer.engine.share_vision(scorer.engine)

    def process(self, shard: int) -> Produced:
        if self.captioning.output.manifest(shard) is not None:
            return super().process(shard)
        start = time.monotonic()
        before = input_hashes(shard, self.images)
        captions, scores = self._both(shard)
        if input_hashes(shard, self.images) != before:
            raise RunError(
                f"{self.images.path}: shard {shard:05d} got a new generation while it was captioned; run again when that "
                "run is over"
            )
        stage = self.captioning
        mark = stage.shard_fingerprint(self.captions_mark, shard)
        seconds = time.monotonic() - start
        made = stage.output.commit(
            shard,
            captions.table,
            captions.counts,
            mark,
            seconds,
            stats=captions.stats,
            batch_size=captions.batch_size,
        )
        if made.fingerprint != mark:
            raise RunError(
                f"{stage.output.path}: shard {shard:05d} was made from other pictures meanwhile; run again"
            )
        return scores

    def _both(self, shard: int) -> tuple[Produced, Produced]:
        asked = self.options.batch_size
        writing, scoring = Clock(), Clock()
        captions = CaptionRows(self.captioning.options, self.captioning.output.name)
        scores = ScoreRows(self.columns)
        texts = texts_by_image(self.images.read(shard, FOUND_COLUMNS), ())
        size = min(self.captioning.batch_size(), self.batch_size())
        for batch in pictures(self.images, shard, self.scorer, size):
            with writing:
                encoded = self.vision.encode(batch.images) if batch.decoded else None
                written = self.captioning.captions(encoded, batch.decoded, size)
            for row in captions.add(batch, written):
                texts.setdefault(row["image_id"], []).append(row)
            wanted = scores.asked(batch, texts)
            with scoring:
                found = self.scores(encoded, wanted, size)
            scores.add(wanted, found)
        used = min(self.captioning.batch_size(), self.batch_size(), size)
        return (
            done(
                CAPTIONS.table(captions.made), captions.counts(), self.captioning.writer, writing, asked, used
            ),
            done(self.contract.table(scores.made), scores.counts(texts), self.scorer, scoring, asked, used),
        )
