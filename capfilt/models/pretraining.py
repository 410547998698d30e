"""BLIP's pretraining and finetuning objective: a Blip with momentum towers and a queue, and all its losses on one batch.

Not here: the losses by themselves (`objectives.py`), contrast and matching, which ALBEF has too (`alignment.py`), the network
(`blip.py`), the loop (`capfilt.training`).
Sources: BLIP, arXiv 2201.12086, sec. 3.2; ALBEF, arXiv 2107.07651, sec. 3.2-3.3 (momentum distillation).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.models.alignment import Alignment, AlignmentConfig, Embeds, length_chunks
from capfilt.models.blip import Blip, project
from capfilt.models.layers import Pair
from capfilt.models.objectives import OBJECTIVES, language_labels, language_loss, token_loss
from capfilt.models.ranks import ALONE, Ranks


@dataclass(frozen=True)
class PretrainingConfig(AlignmentConfig):
    """Which losses, and their constants. The paper's and its released code's values, cited beside each.

    Pretraining is ("itc", "itm", "lm"), a captioner is finetuned with ("lm",) and a prompt, a filter with
    ("itc", "itm").
    """

    known: ClassVar[tuple[str, ...]] = OBJECTIVES

    objectives: tuple[str, ...] = OBJECTIVES
    label_smoothing: float = 0.1
    """Of the language model's targets (BLIP, sec. 3.2)."""
    prompt_length: int = 0
    """Ids at the start of each text, start slot included, that the language model is given and does not learn."""


class MomentumTowers(nn.Module):
    """Copies of what makes ITC embeddings, moved by `follow` and by nothing else: no gradients, no optimiser.

    They stay in training mode with the module they belong to, dropout included, as in the released code.
    """

    def __init__(self, model: Blip) -> None:
        super().__init__()
        self.visual_encoder = copy.deepcopy(model.visual_encoder)
        self.text_encoder = copy.deepcopy(model.text_encoder)
        for layer in self.text_encoder.layers:
            # Texts alone are read here, so the copy would carry a cross-attention per layer that nothing runs.
            layer.crossattention = None
        self.vision_proj = copy.deepcopy(model.vision_proj)
        self.text_proj = copy.deepcopy(model.text_proj)
        self.requires_grad_(False)

    def embed_image(self, images: Tensor) -> Tensor:
        return project(self.vision_proj, self.visual_encoder(images))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return project(self.text_proj, self.text_encoder(ids, mask, first=True))


class BlipPretraining(Alignment):
    """A Blip with what its training needs and its use does not.

    `losses(batch, alpha)` is one step's forward pass: the image is encoded once and its cross-attention keys and values
    are computed once for ITM's three rows and LM's one, ITM's 3B rows are one text pass. On a CPU the rows of the
    encoder's passes go through in groups of similar length.
    """

    config: PretrainingConfig

    def __init__(self, model: Blip, config: PretrainingConfig | None = None, ranks: Ranks = ALONE) -> None:
        config = config or PretrainingConfig()
        for objective in config.objectives:
            model.require("captioner" if objective == "lm" else "filter")
        super().__init__(model, config, ranks, lambda: MomentumTowers(model))

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" (weighted sum, with gradient), "itc", "itm", "lm" as configured, and without gradient
        "temperature", "image_cosine" and "text_cosine" (`mean_cosine` of the batch), "itm_accuracy",
        "itm_balanced_accuracy" where they apply.

        `alpha` is the weight of the momentum's soft targets (see `alpha_ramp`). `hardness` scales the similarities that
        ITM's negatives are drawn by: 1 is the published draw, 0 a uniform one. In training mode the call also fills the
        queue; draws come from torch's global generators. Without ITC, ITM's hard negatives come from similarities
        computed without gradient.

        Each micro-batch of a step is contrasted with itself and the queue, which holds the step's earlier ones by then;
        ITM's negatives are its own. That is what each of the released code's processes sees too: it gathers features
        for its queue and not for its logits.

        With other ranks, means are over everyone's rows (see `Rows`) and `global_negatives` says whom a row is
        contrasted with; the figures without gradient are of this rank's rows.
        """
        objectives, model, towers = self.config.objectives, self.model, self.momentum
        rows = self.ranks.rows(*batch.ids.shape)
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "lm"} & set(objectives) else []

        def embeds() -> Embeds:
            live = model.embed_image(tokens), _embed_text(model, batch)
            if towers is None:
                return live, None
            with torch.no_grad():
                return live, (towers.embed_image(images), _embed_text(towers, batch))

        found, figures = self._aligned(
            *(batch, rows, tokens, cross, alpha, hardness),
            embeds=embeds,
            texts=lambda near: near.gather_texts(batch.ids, batch.mask),
            logits=model.match_logits,
        )
        if "lm" in objectives:
            found["lm"] = self._write(batch, cross)
        return {"loss": self._weighed(found), **found, **figures}

    def _write(self, batch: Batch, cross: Sequence[Pair]) -> Tensor:
        # No padding mask: pads come last, so no token before them sees one through the causal mask.
        config = self.config
        if batch.ids.device.type != "cpu":
            logits = self.model.lm_logits(batch.ids, None, cross)
            return language_loss(
                logits, batch.ids, batch.mask, config.prompt_length, config.label_smoothing, self.ranks
            )
        # Pads are skipped where looking at them costs nothing: see `length_chunks`.
        labels = F.pad(language_labels(batch.ids, batch.mask, config.prompt_length), (0, 1), value=-100)
        groups = length_chunks(batch.mask)
        said, predicted = [], []
        for some, length in groups:
            near = (
                cross
                if len(groups) == 1
                else [(k.index_select(0, some), v.index_select(0, some)) for k, v in cross]
            )
            wanted = labels[some, :length]
            predicted.append(self.model.lm_logits(batch.ids[some, :length], None, near, wanted != -100))
            said.append(wanted[wanted != -100])
        return token_loss(torch.cat(predicted), torch.cat(said), config.label_smoothing, self.ranks)


def _embed_text(towers: Blip | MomentumTowers, batch: Batch) -> Tensor:
    groups = length_chunks(batch.mask)
    embedded = [
        towers.embed_text(batch.ids[some, :length], batch.mask[some, :length]) for some, length in groups
    ]
    return torch.cat(embedded)[torch.cat([some for some, _ in groups]).argsort()]
