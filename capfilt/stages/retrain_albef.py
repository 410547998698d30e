"""`retrain --model albef`: an ALBEF on the pairs that a BLIP would be retrained on.

Which pairs, how they are read, where towers and vocabulary come from and what lands in the checkpoint is what it is for a
BLIP (`train.py`, `pair_training.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from capfilt.models import build, preset
from capfilt.models.albef.model import Albef, AlbefConfig, AlbefObjective, AlbefPretraining
from capfilt.models.common.masking import Masking
from capfilt.models.common.ranks import Ranks
from capfilt.stages.train import Retrain, alignment


class RetrainAlbef(Retrain):
    """ITC, ITM and MLM with momentum distillation (ALBEF, section 3)."""

    model = "albef"
    version = 3  # texts are cleaned by ALBEF's rule
    shown = ("itc", "itm", "mlm", "itm_balanced_accuracy")

    def shape(self, vocab_size: int) -> AlbefConfig:
        return preset("albef", self.options.preset, vocab_size)

    def built(self, config: AlbefConfig) -> Albef:
        return build(config, seed=self.options.seed)

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        config = AlbefObjective(**alignment(self.options))
        return AlbefPretraining(model, Masking.of(tokenizer, self.options.mask_share), config, ranks)
