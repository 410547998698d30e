"""`retrain --model albef`: an ALBEF on the pairs that a BLIP would be retrained on.

Which pairs, how they are read, where towers and vocabulary come from and what lands in the checkpoint is what it is for a
BLIP (`train.py`, `pair_training.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from capfilt.models.albef import Albef, AlbefConfig, build_albef
from capfilt.models.albef_pretraining import AlbefObjective, AlbefPretraining
from capfilt.models.masking import Masking
from capfilt.models.presets import albef_preset
from capfilt.models.ranks import Ranks
from capfilt.stages.train import Retrain, alignment


class RetrainAlbef(Retrain):
    """ITC, ITM and MLM with momentum distillation (ALBEF, section 3)."""

    model = "albef"
    version = 4  # texts are cleaned by ALBEF's rule; one order, held or streamed
    shown = ("itc", "itm", "mlm", "itm_balanced_accuracy")

    def shape(self, vocab_size: int) -> AlbefConfig:
        return albef_preset(self.options.preset, vocab_size)

    def built(self, config: AlbefConfig) -> Albef:
        return build_albef(config, seed=self.options.seed)

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        config = AlbefObjective(**alignment(self.options))
        return AlbefPretraining(model, Masking.of(tokenizer, self.options.mask_share), config, ranks)
