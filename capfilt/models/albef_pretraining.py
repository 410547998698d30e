"""ALBEF's pretraining and finetuning objective: ITC, ITM and MLM, the first and the last taught by momentum towers too.

Not here: contrast and matching, which BLIP has too (`alignment.py`), which tokens are hidden (`masking.py`), the network
(`albef.py`), the loop (`capfilt.training`).
Source: ALBEF, arXiv 2107.07651, sec. 3.2-3.3.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.albef import Albef, without_end
from capfilt.models.alignment import Alignment, AlignmentConfig, Embeds
from capfilt.models.layers import Pair
from capfilt.models.masking import IGNORED, Masking
from capfilt.models.objectives import distilled_losses
from capfilt.models.ranks import ALONE, Ranks, Rows


@dataclass(frozen=True)
class AlbefObjective(AlignmentConfig):
    """Which losses, and their constants; retrieval is finetuned with ("itc", "itm")."""

    known: ClassVar[tuple[str, ...]] = ("itc", "itm", "mlm")

    objectives: tuple[str, ...] = ("itc", "itm", "mlm")
    queue_size: int = 65536
    """ALBEF, arXiv 2107.07651, sec. 4."""
    negative_floor: float = 0.0
    """ALBEF, released code: none."""


class AlbefPretraining(Alignment):
    """An Albef with what its training needs and its use does not.

    `losses(batch, alpha)` is one step's forward pass: an image is encoded once, and once its cross-attention keys and
    values are made for ITM's three rows and MLM's one; a text's own layers run once for ITC and ITM, whose 3B rows go
    through the fusing layers alone.
    """

    config: AlbefObjective

    def __init__(
        self,
        model: Albef,
        masking: Masking | None = None,
        config: AlbefObjective | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        config = config or AlbefObjective()
        if masking is None and "mlm" in config.objectives:
            raise UserError("masked language modelling needs to know its vocabulary: give a Masking")
        if "mlm" in config.objectives:
            model.require_words()
        super().__init__(model, config, ranks, lambda: self._towers(model, config))
        self.masking = masking

    @staticmethod
    def _towers(model: Albef, config: AlbefObjective) -> Albef:
        """A copy that follows the model and is moved by nothing else; without what nothing runs in it.

        It stays in training mode with the module it belongs to, dropout included, as in the released code.
        """
        towers = copy.deepcopy(model)
        del towers.itm_head, towers.temperature
        if "mlm" not in config.objectives:
            if model.config.words:
                del towers.mlm_head
            for layer in towers.text_encoder.layers:
                layer.crossattention = None
        return towers.requires_grad_(False)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" (weighted sum, with gradient), "itc", "itm", "mlm" as configured, and without gradient what
        `BlipPretraining.losses` gives, and "mlm_accuracy": the share of hidden tokens whose likeliest name is the right one.

        `alpha` is the weight of the momentum towers' word, in ITC's targets and in MLM's (see `alpha_ramp`); the rest is as
        there.
        """
        objectives, model, towers = self.config.objectives, self.model, self.momentum
        ids, mask = without_end(batch.ids, batch.mask)
        assert mask is not None
        rows = self.ranks.rows(*ids.shape)
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "mlm"} & set(objectives) else []
        tokens_m = None
        if towers is not None:
            with torch.no_grad():
                tokens_m = towers.encode_image(images)
        states = model.encode_text(ids, mask) if {"itc", "itm"} & set(objectives) else None

        def embeds() -> Embeds:
            live = model.embed_image(tokens), model.embed_states(states)
            if towers is None:
                return live, None
            with torch.no_grad():
                return live, (towers.embed_image(tokens_m), towers.embed_text(ids, mask))

        def texts(near: Rows) -> tuple[Tensor, Tensor]:
            assert states is not None
            if near.ranks.world == 1:
                return states, mask
            _, masks = near.gather_texts(ids, mask)
            return near.gather(F.pad(states, (0, 0, 0, near.length - states.shape[1]))), masks

        found, figures = self._aligned(
            *(batch, rows, tokens, cross, alpha, hardness),
            embeds=embeds,
            texts=texts,
            logits=model.match_states,
        )
        if "mlm" in objectives:
            found["mlm"], figures["mlm_accuracy"] = self._name(ids, mask, cross, tokens_m, alpha)
        return {"loss": self._weighed(found), **found, **figures}

    def _name(
        self, ids: Tensor, mask: Tensor, cross: Sequence[Pair], tokens_m: Tensor | None, alpha: float
    ) -> tuple[Tensor, Tensor]:
        """MLM: the loss of naming hidden tokens, and the share that is named right."""
        assert self.masking is not None
        ids, labels = self.masking(ids, mask)
        hidden = labels != IGNORED
        logits = self.model.mlm_logits(ids, mask, cross, hidden)
        teacher = None
        if self.momentum is not None and alpha > 0.0:
            with torch.no_grad():
                teacher = self.momentum.mlm_logits(ids, mask, self.momentum.prefill_cross(tokens_m), hidden)
        labels = labels[hidden]
        count = self.ranks.mean(hidden.sum()).clamp(min=1.0 / self.ranks.world)
        with torch.no_grad():
            right = (logits.argmax(dim=1) == labels).float().sum() / max(1, len(labels))
        return distilled_losses(logits, labels, teacher, alpha).sum() / count, right
