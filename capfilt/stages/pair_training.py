"""Training on pairs of a picture and a text, with ITC, ITM and LM.

What every training shares is `training.py`'s; what each stage starts from is `train.py`'s.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pyarrow as pa
import torch

from capfilt.data.pair_shards import PairInput
from capfilt.data.pairs import Pairs
from capfilt.data.store import MEMORY_LIMIT
from capfilt.data.tokenizer import Tokenizer
from capfilt.errors import UserError
from capfilt.models.blip import Blip
from capfilt.models.kinds import PAIR_ROWS
from capfilt.models.pretraining import BlipPretraining, PretrainingConfig
from capfilt.models.ranks import Ranks
from capfilt.stages.training import Training
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

NAMED = 500_000
"""Texts named at a time, a row group each."""


class PairTraining(Training[Pairs]):
    """What the four stages that train a BLIP on pairs share."""

    version = 3  # one order and one crop, held or streamed, on any number of ranks
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

    def pair_inputs(self) -> list[PairInput]:
        """The parts with the pairs."""
        return [PairInput(part) for part in (*self.human, *self.web)]

    # What a training asks of its stage.

    def data(self, size: int) -> Pairs:
        o = self.options
        return Pairs(
            self.pair_inputs(),
            size=size,
            cache=0 if o.stream else MEMORY_LIMIT,
            workers=o.loader_workers,
        )

    def module(self, model: Blip, tokenizer: Tokenizer, ranks: Ranks) -> torch.nn.Module:
        return BlipPretraining(model, self.objective(tokenizer), ranks)

    def feed(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "mixing": shares(self.options.mix)}

    def prepare(self, data: Pairs, model: Blip, where: torch.device) -> None:
        if not self.options.cache_features:
            return
        if not (model.config.vision.trunk and model.config.vision.trunk_frozen):
            raise UserError("--cache-features: only a frozen trunk has features to cache (--preset trunk)")
        data.with_features(lambda pixels: model.visual_encoder.trunk_features(pixels.to(where)))

    def account(self, data: Pairs) -> dict[str, Any]:
        return {"texts": len(data), "images": data.pictures, "by_source": data.texts_by_source()}

    def named(self, data: Pairs) -> Iterator[pa.Table]:
        texts = ((text.key, image_id, text.source) for image_id, text in data.identities())
        while some := list(itertools.islice(texts, NAMED)):
            yield pa.table(dict(zip(("text_id", "image_id", "source"), zip(*some, strict=True), strict=True)))


def shares(mix: Sequence[str]) -> dict[str, float] | None:
    """`--mix SOURCE=WEIGHT ...` as the loader takes it; None where nothing is given. Raises UserError."""
    found: dict[str, float] = {}
    for item in mix:
        source, equals, weight = item.partition("=")
        try:
            found[source] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not source or not 0 <= found[source] < math.inf:
            raise UserError(
                f"--mix {item}: write SOURCE=WEIGHT, as in human=1, the weight a finite number of 0 or more"
            )
    return found or None
