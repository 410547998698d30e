"""`retrain --model clip`: a CLIP on the pairs that a BLIP would be retrained on.

Which pairs, how they are read and what lands in the checkpoint is what it is for a BLIP (`train.py`, `pair_training.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.errors import UserError
from capfilt.models.clip import ClipConfig, build_clip
from capfilt.models.contrast import ClipTraining, ContrastConfig
from capfilt.models.kinds import Model
from capfilt.models.presets import clip_preset
from capfilt.models.ranks import Ranks
from capfilt.stages.options import RetrainOptions
from capfilt.stages.pairs import Pairs
from capfilt.stages.train import Retrain
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace

FOR_BLIP = ("vision_init", "text_init", "cache_features")
"""Options that name parts of a BLIP."""


class RetrainClip(Retrain):
    """The symmetric contrastive loss, or the sigmoid one, over the batches of all ranks (CLIP, section 2.3)."""

    model = "clip"
    shown = ("contrast", "accuracy", "scale")

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        given = [name for name in FOR_BLIP if getattr(options, name)]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')}: is for --model blip")
        self.loss = ContrastConfig(options.contrast, options.contrast_chunk)
        super().__init__(options, workspace, output)

    def shape(self, vocab_size: int) -> ClipConfig:
        return clip_preset(self.options.preset, vocab_size)

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        o = self.options
        if self.start:
            return super().initial(pairs)
        if o.vocab == "corpus":
            tokenizer = BpeTokenizer.train(pairs.texts(), o.vocab_size)
        else:
            read = (
                BpeTokenizer.load
                if Path(o.vocab).is_dir() or o.vocab.endswith(".json")
                else BpeTokenizer.from_merges
            )
            tokenizer = read(o.vocab)
        config = self.shape(tokenizer.vocab_size)
        vision = dataclasses.replace(config.vision, image_size=self.image_size())
        made = dataclasses.replace(config, vision=vision, logit_bias=self.loss.loss == "sigmoid")
        return build_clip(made, seed=o.seed), tokenizer

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return ClipTraining(model, self.loss, ranks)
