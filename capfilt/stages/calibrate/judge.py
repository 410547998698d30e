"""The first stages of `calibrate`: the cosine of a text with a picture, and that cosine corrected for hubs.

`JudgePairs` judges the calibration pairs, `Judge` the corpus. Not here: which pairs those are (`held_out.py`), probabilities
(`stage.py`), the correction itself (`capfilt.calibration.hubs`).
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from capfilt.calibration.hubs import Bank
from capfilt.data.cleaning import clean
from capfilt.errors import UserError
from capfilt.models import checkpoint
from capfilt.plugins.checkpoints import FamilyScorer
from capfilt.plugins.registry import score_contract
from capfilt.stages.base import Produced, ShardStage, option_values
from capfilt.stages.calibrate import CalibrateOptions
from capfilt.stages.calibrate.held_out import Pairs, check_unseen, pairs_of
from capfilt.stages.inputs import captions_of, input_hashes, shards_of
from capfilt.stages.pixels import Clock, done, pictures, settle
from capfilt.stages.remembering import remembering
from capfilt.stages.score.stage import Asked, ScoreRows, texts_by_image
from capfilt.tables.contracts import SIGNALS, signal_fields
from capfilt.tables.shards import Part
from capfilt.tables.texts import FOUND_COLUMNS
from capfilt.tables.workspace import Workspace

HUB, PROBABILITY = "hub_score", "match_probability"
COLUMNS: Mapping[str, str] = {
    "itc_score": "cosine of the image and text embeddings, in [-1, 1]",
    HUB: "that cosine less what picture and text have with random pairs (docs/calibration.md)",
}
PAIR_COLUMNS: Mapping[str, tuple[str, str]] = {
    **{name: ("float", doc) for name, doc in COLUMNS.items()},
    "own": ("bool", "whether the text is the picture's own"),
    "failure": ("string", "why the pair has no score; null where it has"),
}
BATCH = 64
BANK_SHARDS = 16
"""Shards that the bank is drawn from, at most: every worker reads their pictures."""


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

    @cached_property
    def drawn(self) -> dict[int, dict[str, str]]:
        """The bank's pairs, text by image_id by shard: those of the smallest hashes with the seed, of some shards.

        Looked for before the work travels to workers, and travels along.
        """
        mark = str(self.options.seed).encode()

        def place(name: str) -> bytes:
            return hashlib.blake2b(name.encode(), key=mark).digest()

        shards = sorted(self.images.shards(), key=lambda shard: place(str(shard)))[:BANK_SHARDS]
        columns = [*FOUND_COLUMNS, "status"]
        able = (
            (place(row["image_id"]), shard, row["image_id"], text)
            for shard in sorted(shards)
            for row in self.images.read(shard, columns).to_pylist()
            if row["status"] == "success" and (text := _first(row["captions"])) is not None
        )
        found: dict[int, dict[str, str]] = {}
        for _, shard, image, text in heapq.nsmallest(self.options.bank, able):
            found.setdefault(shard, {})[image] = text
        return found

    def _bank(self) -> Bank:
        ids: list[str] = []
        vectors: list[tuple[Any, Any]] = []
        for shard, texts in sorted(self.drawn.items()):
            for batch in pictures(self.images, shard, self.scorer, BATCH, only=texts):
                if decoded := batch.decoded:
                    ids += decoded
                    said = [texts[image] for image in decoded]
                    vectors.append(self.embedded(batch.images, range(len(decoded)), said))
        if len(ids) < 2:
            raise UserError(f"{self.images.path}: fewer than 2 pictures with a text, so there is no bank")
        return Bank(ids, *(np.concatenate(side) for side in zip(*vectors, strict=True)))


def _first(texts: Sequence[str | None] | None) -> str | None:
    return next((text for text in texts or () if text and clean(text)), None)


class Judge(ShardStage):
    """Writes a row per text of a picture that is there, with its cosine and its hub score."""

    name = "calibrate-judge"
    version = 2  # the bank is of 16 shards at most
    accounts = "texts"
    uses_gpu = True
    rows_per_second = 10.0
    not_mine: tuple[str, ...] = ("method", "negatives", "resamples", "batch_size")

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.options, self.workspace = options, workspace
        self.corpus = self.images = workspace.input("images", options.images)
        self.captions = [workspace.input("captions", name) for name in options.captions]
        self.judging = Judging(options, workspace, self.corpus)
        self.contract = score_contract(COLUMNS)
        self.output = workspace.part("scores", f"{options.out}-judged")

    @cached_property
    def mark(self) -> str:
        """The filter in the identity. Kept: it is a hash of all its weights."""
        return self.judging.scorer.fingerprint()

    def identity(self) -> Mapping[str, Any]:
        return {
            "options": option_values(self.options, without=self.not_mine),
            "filter": self.mark,
            "columns": list(COLUMNS),
            # The bank is of the whole part.
            "images": self.corpus.digest(),
            "captions": [part.info["fingerprint"] for part in self.captions],
        }

    def origins(self) -> Mapping[str, Mapping[str, str]]:
        return checkpoint.origin(self.judging.path, self.options.filter)

    def shards(self) -> list[int]:
        _ = self.judging.drawn  # so that workers do not look for it again
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
        texts = self._texts(shard)
        size = self.options.batch_size or BATCH
        engine, rows = Clock(), ScoreRows(COLUMNS)
        for batch in pictures(self.images, shard, self.judging.scorer, size):
            asked = rows.asked(batch, texts)
            with engine:
                rows.add(asked, self._scores(batch.images, asked))
        return done(self._table(rows), rows.counts(texts), self.judging.scorer, engine, size, size)

    def _texts(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        """The texts to judge, by image."""
        found = self.images.read(shard, FOUND_COLUMNS)
        return texts_by_image(found, captions_of(self.images, found["image_id"], self.captions, shard))

    def _table(self, rows: ScoreRows) -> pa.Table:
        return self.contract.table(rows.made)

    def _scores(self, images: torch.Tensor, asked: Asked) -> list[list[float]]:
        if not asked.texts:
            return []
        seen, said = self.judging.embedded(images, asked.image_index, asked.texts)
        hubs = self.judging.bank.corrected([entry["image_id"] for entry in asked.entries], seen, said)
        cosines = np.einsum("te,te->t", seen, said)
        rows: list[list[float]] = np.stack([cosines, hubs], axis=1).tolist()
        return rows


class JudgePairs(Judge):
    """Writes a row per calibration pair: a picture with a text of its own, or with one of another picture."""

    name = "calibrate-pairs"
    version = 1
    not_mine = ("method", "resamples", "batch_size")

    def __init__(self, options: CalibrateOptions, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace)
        self.images = workspace.input("images", options.calibration)
        if self.images.path == self.corpus.path:
            raise UserError(f"--calibration {options.calibration}: is the part that is judged; give another")
        self.captions, self.contract = [], SIGNALS
        self.output = workspace.part("signals", f"{options.out}-pairs")

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "columns": list(PAIR_COLUMNS), "calibration": self.images.digest()}

    def begin(self) -> str:
        # The first stage of all, so that nothing is judged for a calibration that cannot be.
        check_unseen(self.options, self.workspace, self.images, self.corpus)
        _ = self.pairs
        return super().begin()

    def shards(self) -> list[int]:
        _ = self.pairs
        return super().shards()

    @cached_property
    def pairs(self) -> Pairs:
        """The pairs, by image; they travel to workers."""
        o = self.options
        return pairs_of(self.images, o.negatives, o.seed, f"--calibration {o.calibration}")

    def expected_rows(self, shard: int) -> int:
        ids = self.images.read(shard, ["image_id"])["image_id"].to_pylist()
        return sum(len(self.pairs.get(image, ())) for image in ids)

    def _texts(self, shard: int) -> dict[str, list[dict[str, Any]]]:
        ids = self.images.read(shard, ["image_id"])["image_id"].to_pylist()
        return {image: self.pairs[image] for image in ids if image in self.pairs}

    def _table(self, rows: ScoreRows) -> pa.Table:
        own = {(image, row["text_id"]): row["own"] for image, some in self.pairs.items() for row in some}
        made = [
            {**dict.fromkeys(PAIR_COLUMNS), **row, "own": own[row["image_id"], row["text_id"]]}
            for row in rows.made
        ]
        schema = pa.schema([*SIGNALS.schema, *signal_fields(PAIR_COLUMNS)])
        return SIGNALS.conform(pa.Table.from_pylist(made, schema))
