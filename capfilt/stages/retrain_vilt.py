"""`retrain --model vilt`: a ViLT on the pairs that a BLIP would be retrained on.

Which pairs, how they are read, the vocabulary and what lands in the checkpoint is what it is for a BLIP (`train.py`,
`pair_training.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from capfilt.models import build, preset
from capfilt.models.common.masking import Masking
from capfilt.models.common.ranks import Ranks
from capfilt.models.vilt.model import MatchingConfig, Vilt, ViltConfig, ViltTraining
from capfilt.stages.options import RetrainOptions
from capfilt.stages.train import Retrain
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class RetrainVilt(Retrain):
    """Matching, whole masked words, word-patch alignment (ViLT, section 3.2)."""

    model = "vilt"
    version = 3  # texts are read as found, however many words they have
    shown = ("itm", "mlm", "wpa", "itm_balanced_accuracy")

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.loss = MatchingConfig(options.alignment, options.max_patches)
        super().__init__(options, workspace, output)

    def shape(self, vocab_size: int) -> ViltConfig:
        return preset("vilt", self.options.preset, vocab_size)

    def built(self, config: ViltConfig) -> Vilt:
        return build(config, seed=self.options.seed)

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        masking = Masking.of(tokenizer, self.options.mask_share, whole_words=True)
        return ViltTraining(model, masking, self.loss, ranks)
