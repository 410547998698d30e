"""Training on pairs of a picture and a text, held or read as they are needed, with ITC, ITM and LM.

What every training shares is `training.py`'s; what each stage starts from is `train.py`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, ClassVar

import pyarrow as pa
import torch

from capfilt.data.corpus import Corpus, concat, from_images
from capfilt.data.stream import PairStream, StreamInput, refuse_barren
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models.blip.model import Blip, BlipPretraining, PretrainingConfig
from capfilt.models.common.ranks import Ranks
from capfilt.models.family import PAIR_ROWS
from capfilt.stages.pairs import Held, Pairs, Streamed, shares
from capfilt.stages.training import Training
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

IMAGE_COLUMNS = ("image_id", "source", "captions", "split", "status", "failure", "image")


NAMED = 500_000
"""Texts named at a time, a row group each."""


class PairTraining(Training[Pairs]):
    """What the four stages that train a BLIP on pairs share."""

    rows = PAIR_ROWS
    least = 2  # contrast and hard negatives
    shown: ClassVar[tuple[str, ...]] = ("itc", "itm", "lm", "itm_balanced_accuracy")

    def __init__(self, options: Any, workspace: Workspace, output: Part | None = None) -> None:
        super().__init__(options, workspace, output)
        shares(options.mix)
        if options.stream and options.cache_features:
            raise UserError("--stream and --cache-features: features are cached for pictures that are held")
        if options.loader_workers and not options.stream:
            raise UserError(f"--loader-workers {options.loader_workers}: only with --stream")
        if options.shard and options.cache_features:
            raise UserError("--shard and --cache-features: features are cached by models that are whole")
        if options.randaugment and options.cache_features:
            raise UserError("--randaugment changes pictures: it needs --augment, and no --cache-features")
        self.human = [workspace.input("images", name).check() for name in options.human]
        web = getattr(options, "web", ())
        self.web = [workspace.input("images", name).check() for name in web]

    def objective(self, tokenizer: Tokenizer) -> PretrainingConfig:
        """Which losses a BLIP is trained with."""
        return PretrainingConfig()

    @property
    def prompt(self) -> str:
        """What stands before every text."""
        return ""

    def inputs(self) -> list[Part]:
        return [*self.human, *self.web]

    def corpora(self, size: int) -> list[Corpus]:
        """The pairs, a corpus per kind of input."""
        return [
            from_images((t for part in parts for t in part.tables(IMAGE_COLUMNS)), size=size, training=True)
            for parts in (self.human, self.web)
            if parts
        ]

    def streamed(self) -> list[StreamInput]:
        """The same pairs, as a stream takes them."""
        return [StreamInput(part) for part in (*self.human, *self.web)]

    # What a training asks of its stage.

    def data(self, size: int) -> Pairs:
        if self.options.stream:
            return Streamed(PairStream(self.streamed()), size, self.options.loader_workers)
        corpus = concat(self.corpora(size))
        refuse_barren(self.streamed(), set(corpus.image_ids))
        return Held(corpus)

    def module(self, model: Blip, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return BlipPretraining(model, self.objective(tokenizer), ranks)

    def feed(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "mixing": shares(self.options.mix)}

    def prepare(self, data: Pairs, model: Blip, where: torch.device) -> None:
        if not self.options.cache_features:
            return
        if not (model.config.vision.trunk and model.config.vision.trunk_frozen):
            raise UserError("--cache-features: only a frozen trunk has features to cache (--preset trunk)")
        assert isinstance(data, Held)
        data.corpus = data.corpus.with_features(
            lambda pixels: model.visual_encoder.trunk_features(pixels.to(where)),
            progress=lambda count: None,
        )

    def account(self, data: Pairs) -> dict[str, Any]:
        return {"texts": len(data), "images": data.pictures, "by_source": data.texts_by_source()}

    def named(self, data: Pairs) -> Iterator[pa.Table]:
        texts = data.identities()
        while some := list(itertools.islice(texts, NAMED)):
            yield pa.table(dict(zip(("text_id", "image_id", "source"), zip(*some, strict=True), strict=True)))
