"""`retrain --model vilt`: a ViLT on the pairs that a BLIP would be retrained on.

Which pairs, how they are read, the vocabulary and what lands in the checkpoint is what it is for a BLIP (`train.py`,
`pair_training.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from capfilt.models.masking import Masking
from capfilt.models.matching import MatchingConfig, ViltTraining
from capfilt.models.presets import vilt_preset
from capfilt.models.pretrained import load_vit_into_vilt
from capfilt.models.ranks import Ranks
from capfilt.models.vilt import Vilt, ViltConfig, build_vilt
from capfilt.stages.options import RetrainOptions
from capfilt.stages.train import Retrain
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace


class RetrainVilt(Retrain):
    """Matching, whole masked words, word-patch alignment (ViLT, section 3.2)."""

    model = "vilt"
    version = 4  # texts are read as found, however many words they have; one order, held or streamed
    shown = ("itm", "mlm", "wpa", "itm_balanced_accuracy")

    def __init__(self, options: RetrainOptions, workspace: Workspace, output: Part | None = None) -> None:
        self.loss = MatchingConfig(options.alignment, options.max_patches)
        super().__init__(options, workspace, output)

    def shape(self, vocab_size: int) -> ViltConfig:
        return vilt_preset(self.options.preset, vocab_size)

    def built(self, config: ViltConfig) -> Vilt:
        return build_vilt(config, seed=self.options.seed)

    def load_towers(self, model: Any) -> None:
        if self.options.vision_init:
            load_vit_into_vilt(model, self.options.vision_init)

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        masking = Masking.of(tokenizer, self.options.mask_share, whole_words=True)
        return ViltTraining(model, masking, self.loss, ranks)
