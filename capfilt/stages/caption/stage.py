"""`caption`: synthetic texts for every image of a part. What writes them, and how, is behind `plugins/`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from capfilt.errors import UserError
from capfilt.plugins.registry import CAPTIONERS, checked_captions, open_captioner, reference
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.caption import CaptionOptions
from capfilt.stages.inputs import input_hashes, shards_of
from capfilt.stages.pixels import Clock, Pictures, batch_size_for, done, pictures, settle, settled_batch_size
from capfilt.tables.contracts import CAPTIONS
from capfilt.tables.ids import text_id
from capfilt.tables.manifest import Counts
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class CaptionRows:
    """The rows of one captions shard in the making, and their account."""

    def __init__(self, options: CaptionOptions, captioner: str) -> None:
        self.options = options
        self.captioner = captioner
        self.made: list[dict[str, Any]] = []
        self.rows_in = self.kept = 0
        self.dropped: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def add(self, batch: Pictures, captions: list[tuple[str, float | None]]) -> list[dict[str, Any]]:
        """The rows of a batch, `samples` captions for each of its images that can be used; returns them."""
        samples = self.options.samples
        first = len(self.made)
        self.rows_in += len(batch.rows)
        for row, failure, place in zip(batch.rows, batch.failures, batch.place, strict=True):
            if failure == "no_image":
                self.dropped[failure] += 1
                continue
            image = row["image_id"]
            texts = (
                captions[place * samples : (place + 1) * samples] if not failure else [("", None)] * samples
            )
            reasons = set()
            for index, (text, logprob) in enumerate(texts):
                reason = failure or (None if text else "empty_text")
                if logprob is not None and not math.isfinite(logprob):
                    # Drawn from no distribution: whatever the text, nothing stands behind it.
                    reason, text, logprob = "not_finite", "", None
                reasons.add(reason)
                self.made.append(
                    {
                        "text_id": text_id(image, "synthetic", text, self.captioner, index),
                        "image_id": image,
                        "text": text or None,
                        "sample_index": index,
                        "captioner": self.captioner,
                        "decoding": self.options.method,
                        "logprob": logprob,
                        "failure": reason,
                    }
                )
            if None in reasons:
                self.kept += 1
            else:
                self.failed[min(reason for reason in reasons if reason)] += 1
        return self.made[first:]

    def counts(self) -> Counts:
        return Counts(self.rows_in, self.kept, dict(self.dropped), dict(self.failed))


class CaptionStage(ShardStage):
    """Writes `samples` rows per image; an image without pixels has none and is counted as dropped (`no_image`)."""

    name = "caption"
    # Since 3, a text whose probability is not finite is a failure; since 4, pictures are Pillow's bicubic pixels, of whole
    # pictures.
    version = 4
    contract = CAPTIONS
    uses_gpu = True
    rows_per_second = 10.0

    def __init__(self, options: CaptionOptions, workspace: Workspace, output: Part | None = None) -> None:
        if options.method == "greedy" and options.samples > 1:
            raise UserError(f"--samples {options.samples}: greedy decoding has only one text")
        if options.max_new_tokens < options.min_new_tokens:
            raise UserError(f"--max-new-tokens {options.max_new_tokens}: give at least --min-new-tokens")
        self.options = options
        self.captioner = reference(
            CAPTIONERS,
            options.captioner,
            options.captioner_option,
            "--captioner-option",
            workspace.model,
            options.precision,
            options.compile,
            options.draft,
        )
        open_captioner(self.captioner)
        self.images = workspace.input("images", options.images)
        self.output = output or workspace.part("captions", options.out or self.captioner.name)

    @cached_property
    def mark(self) -> str:
        """The captioner in the identity. Kept: it is a hash of all its weights."""
        return self.captioner.mark(open_captioner(self.captioner))

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options),
            "captioner": self.mark,
            "images": self.images.info["fingerprint"],
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return {self.mark: self.captioner.origin()}

    def shards(self) -> list[int]:
        return shards_of(self.images)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images)

    def setup(self) -> None:
        self.writer = open_captioner(self.captioner)
        self.writer.setup()
        settle(self.output, self.writer)

    def process(self, shard: int) -> Produced:
        size = self.batch_size()
        engine, rows = Clock(), CaptionRows(self.options, self.output.name)
        for batch in pictures(self.images, shard, self.writer, size):
            with engine:
                captions = self.captions(batch.images, batch.decoded, size)
            rows.add(batch, captions)
        table = CAPTIONS.table(rows.made)
        return done(table, rows.counts(), self.writer, engine, self.options.batch_size, self.batch_size())

    @cached_property
    def asked(self) -> int:
        """Pictures at a time that all shards are to have; 0 where nobody can know."""
        return settled_batch_size(self.output, self.writer, self.options.batch_size, self.ways)

    @property
    def ways(self) -> int:
        """Texts that are written per picture at the same time."""
        return self.options.num_beams if self.options.method == "beam" else self.options.samples

    def batch_size(self) -> int:
        """Pictures at a time, as far as is known now."""
        return batch_size_for(self.writer, self.asked, self.ways)

    def captions(self, images: Any, keys: list[str], batch_size: int) -> list[tuple[str, float | None]]:
        """(text, log-probability) of each sample of each image; a text of white space alone is none."""
        if not keys:
            return []
        o = self.options
        made = self.writer.caption(
            images,
            keys,
            samples=o.samples,
            seed=o.seed,
            method=o.method,
            top_p=o.top_p,
            top_k=o.top_k,
            temperature=o.temperature,
            num_beams=o.num_beams,
            length_penalty=o.length_penalty,
            beam_rule=o.beam_rule,
            prompt=o.prompt,
            max_new_tokens=o.max_new_tokens,
            min_new_tokens=o.min_new_tokens,
            repetition_penalty=o.repetition_penalty,
            batch_size=batch_size,
        )
        return [
            (text if text.strip() else "", logprob)
            for text, logprob in checked_captions(self.captioner, made, len(keys) * o.samples)
        ]
