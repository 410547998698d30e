"""The first half of `calibrate`: the cosine of every text with its picture, and that cosine corrected for hubs.

Not here: probabilities (`stage.py`), the correction itself (`capfilt.calibration.hubs`).
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import torch

from capfilt.calibration.hubs import Bank
from capfilt.data.cleaning import clean
from capfilt.errors import UserError, naming
from capfilt.models import checkpoint
from capfilt.plugins.checkpoints import FamilyScorer
from capfilt.plugins.registry import score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.pixels import Clock, done, pictures, settle
from capfilt.stages.remembering import remembering
from capfilt.stages.score.stage import Asked, ScoreRows, texts_by_image
from capfilt.stages.training import EXPOSURES
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS
from capfilt.tables.workspace import Workspace

HUB, PROBABILITY = "hub_score", "match_probability"
COLUMNS: Mapping[str, str] = {
    "itc_score": "cosine of the image and text embeddings, in [-1, 1]",
    HUB: "that cosine less what picture and text have with random pairs (docs/calibration.md)",
}
BATCH = 64


class Judging:
    """A filter that embeds, and the bank of random pairs of the part that it judges."""

    def __init__(self, options: CalibrateOptions, workspace: Workspace, images: Part) -> None:
        self.options, self.workspace, self.images = options, workspace, images
        self.path = workspace.model(options.filter)
        how = ("compiled" if options.compile else "", "draft" if options.draft else "")
        self.scorer = FamilyScorer(str(self.path), options.precision, *how)
        if "embed" not in self.scorer.abilities:
            raise UserError(
                f"--filter {options.filter}: it embeds no pictures and texts, and the hub correction needs that; give a "
                "checkpoint that does (locked, clip, blip, albef)"
            )

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Within it, the filter is on its device, and the bank is embedded."""
        self.scorer.setup()
        with remembering(self.scorer.model._model, self.workspace):
            self.bank = self._bank()
            yield

    def embedded(
        self, images: Any, image_index: Sequence[int], texts: Sequence[str]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Unit vectors float32 [T, E] of each text's picture and of the texts."""
        return self.seen(images)[np.asarray(image_index)], self.read(texts)

    def seen(self, images: Any) -> npt.NDArray[np.float32]:
        """Unit vectors float32 [B, E] of pictures."""
        model = self.scorer.model
        out: npt.NDArray[np.float32] = model.embed_images(model.encode_images(images)).float().cpu().numpy()
        return out

    def read(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        """Unit vectors float32 [T, E] of texts."""
        embed = self.scorer.model.embed_texts
        parts = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
        return np.concatenate([embed(list(some)).float().cpu().numpy() for some in parts])

    def _bank(self) -> Bank:
        wanted = self._drawn()
        ids: list[str] = []
        vectors: list[tuple[Any, Any]] = []
        for shard in self.images.shards():
            found = self.images.read(shard, FOUND_COLUMNS)
            here = {
                row["image_id"]: text
                for row in found.to_pylist()
                if row["image_id"] in wanted and (text := _first(row["captions"])) is not None
            }
            if not here:
                continue
            for batch in pictures(self.images, shard, self.scorer, BATCH):
                chosen = [
                    (row["image_id"], place)
                    for row, place in zip(batch.rows, batch.place, strict=True)
                    if place >= 0 and row["image_id"] in here
                ]
                if chosen:
                    ids += [image for image, _ in chosen]
                    index = [place for _, place in chosen]
                    vectors.append(self.embedded(batch.images, index, [here[image] for image, _ in chosen]))
        if len(ids) < 2:
            raise UserError(f"{self.images.path}: fewer than 2 pictures with a text, so there is no bank")
        return Bank(ids, *(np.concatenate(side) for side in zip(*vectors, strict=True)))

    def _drawn(self) -> set[str]:
        """The images of the bank: those of the smallest hashes with the seed, whatever workers there are."""
        ids = (
            image
            for table in self.images.tables(["image_id", "status"])
            for image, status in zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True)
            if status == "success"
        )
        mark = str(self.options.seed).encode()
        return set(
            heapq.nsmallest(
                self.options.bank, ids, key=lambda image: hashlib.blake2b(image.encode(), key=mark).digest()
            )
        )


def _first(texts: Sequence[str | None] | None) -> str | None:
    return next((text for text in texts or () if text and clean(text)), None)


def trained_on(path: Path) -> set[str] | None:
    """The image_ids that a checkpoint's training saw; None where the checkpoint does not say."""
    exposures = path / EXPOSURES
    if not exposures.is_file():
        return None
    with naming(exposures):
        return set(pq.read_table(exposures, columns=["image_id"])["image_id"].to_pylist())


class Judge(ShardStage):
    """Writes a row per text of a picture that is there, with its cosine and its hub score."""

    name = "calibrate-judge"
    version = 1
    accounts = "texts"
    uses_gpu = True
    rows_per_second = 10.0

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options = options
        self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.judging = Judging(options, workspace, self.images)
        self.contract = score_contract(COLUMNS)
        self.output = workspace.part("scores", f"{options.out}-judged")

    @cached_property
    def mark(self) -> str:
        """The filter in the identity. Kept: it is a hash of all its weights."""
        return self.judging.scorer.fingerprint()

    def identity(self) -> Mapping[str, Any]:
        mine = ("method", "negatives", "resamples", "batch_size")
        return {
            "options": option_values(self.options, without=mine),
            "filter": self.mark,
            "columns": list(COLUMNS),
            # The bank is of the whole part.
            "images": self.images.digest(),
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.judging.path, self.options.filter)

    def shards(self) -> list[int]:
        return shards_of(self.images, *self.captions)

    def inputs(self, shard: int) -> list[str]:
        return input_hashes(shard, self.images, *self.captions)

    def setup(self) -> None:
        self._during = contextlib.ExitStack()
        self._during.enter_context(self.judging.ready())
        settle(self.output, self.judging.scorer)

    def teardown(self) -> None:
        self._during.close()

    def process(self, shard: int) -> Produced:
        found = self.images.read(shard, FOUND_COLUMNS)
        texts = texts_by_image(found, captions_of(self.images, found["image_id"], self.captions, shard))
        size = self.options.batch_size or BATCH
        engine, rows = Clock(), ScoreRows(COLUMNS)
        for batch in pictures(self.images, shard, self.judging.scorer, size):
            asked = rows.asked(batch, texts)
            with engine:
                rows.add(asked, self._scores(batch.images, asked))
        scorer = self.judging.scorer
        return done(self.contract.table(rows.made), rows.counts(texts), scorer, engine, size, size)

    def _scores(self, images: torch.Tensor, asked: Asked) -> list[list[float]]:
        if not asked.texts:
            return []
        seen, said = self.judging.embedded(images, asked.image_index, asked.texts)
        hubs = self.judging.bank.corrected([entry["image_id"] for entry in asked.entries], seen, said)
        cosines = np.einsum("te,te->t", seen, said)
        rows: list[list[float]] = np.stack([cosines, hubs], axis=1).tolist()
        return rows
