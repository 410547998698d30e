"""`retrain --model clip`: a CLIP on the pairs that a BLIP would be retrained on.

Which pairs, how they are read and what lands in the checkpoint is what it is for a BLIP (`train.py`, `pair_training.py`).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from capfilt.data.bpe import BpeTokenizer
from capfilt.data.cleaning import trained_clip
from capfilt.errors import UserError
from capfilt.models.clip import Clip, ClipConfig, build_clip
from capfilt.models.contrast import ClipTraining, ContrastConfig
from capfilt.models.presets import clip_preset
from capfilt.models.ranks import Ranks
from capfilt.stages.options import RetrainOptions
from capfilt.stages.train import Retrain
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class RetrainClip(Retrain):
    """The symmetric contrastive loss, or the sigmoid one, over the batches of all ranks (CLIP, section 2.3)."""

    # Since 2, texts are no longer cut to their first 30 words; since 3, a ResNet's running statistics follow what trains:
    # averaged over ranks and by --ema, moved once a step; since 4, texts are repaired and the image side is initialised as
    # released; since 5, one order, held or streamed.
    version = 5
    model = "clip"
    shown = ("contrast", "accuracy", "scale")

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.loss = ContrastConfig(options.contrast, options.contrast_chunk)
        super().__init__(options, workspace, output)
        if options.patch_size and self.shape(1000).vision.stages:
            raise UserError(
                f"--patch-size {options.patch_size}: the preset {options.preset} is a ResNet, without patches"
            )

    def shape(self, vocab_size: int) -> ClipConfig:
        return clip_preset(self.options.preset, vocab_size)

    def vocabulary(self, pairs: Any) -> BpeTokenizer:
        vocab = self.options.vocab
        cleaning = trained_clip()
        if vocab == "corpus":
            return BpeTokenizer.train(pairs.texts(), self.options.vocab_size, cleaning=cleaning)
        own = Path(vocab).is_dir() or vocab.endswith(".json")
        return (BpeTokenizer.load(vocab) if own else BpeTokenizer.from_merges(vocab)).cleaned_as(cleaning)

    def sized(self, tokenizer: BpeTokenizer) -> ClipConfig:
        config: ClipConfig = super().sized(tokenizer)
        return dataclasses.replace(config, logit_bias=self.loss.loss == "sigmoid")

    def built(self, config: ClipConfig) -> Clip:
        return build_clip(config, seed=self.options.seed)

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return ClipTraining(model, self.loss, ranks)
