"""`finetune text-assignment`: an ALBEF learns to look at two pictures, from pairs, before `finetune nlvr` (ALBEF, section 5).

The checkpoint is one that `finetune nlvr` starts from.
"""

from __future__ import annotations

from typing import Any

import torch

from capfilt.data.pairs import Pairs
from capfilt.models.albef import Albef
from capfilt.models.albef_tasks import nlvr_from_albef
from capfilt.models.kinds import Model
from capfilt.models.ranks import Ranks
from capfilt.models.text_assignment import ASSIGNED, TextAssignment
from capfilt.stages.options import FinetuneTextAssignmentOptions
from capfilt.stages.train import Finetune


class FinetuneTextAssignment(Finetune):
    """A text and two pictures: it belongs to the first, to the second, or to neither; a third each."""

    name = "finetune-text-assignment"
    starts = (Albef,)
    least = 3  # a text's own picture and two others
    shown = ("loss", "accuracy")
    options: FinetuneTextAssignmentOptions

    def planned(self) -> None:
        # A step on the way to `finetune nlvr`, whose model is the one to export.
        return None

    def initial(self, pairs: Pairs) -> tuple[Model, Any]:
        model, tokenizer = super().initial(pairs)
        assert isinstance(model, Albef)
        self.projection = model.vision_proj
        return nlvr_from_albef(model, self.options.seed, self.options.drop_path, ASSIGNED), tokenizer

    def module(self, model: Any, tokenizer: Any, ranks: Ranks) -> torch.nn.Module:
        return TextAssignment(model, self.projection)
