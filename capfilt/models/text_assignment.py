"""Text assignment: which of two pictures a text belongs to, or neither. ALBEF learns it before statements about two.

Source: ALBEF, arXiv 2107.07651, sec. 5 (NLVR2), and its released code for the draws.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.albef_tasks import AlbefNlvr
from capfilt.models.blip import project
from capfilt.models.kinds import blocks_of
from capfilt.models.layers import full_precision
from capfilt.models.objectives import distilled_losses, similarities

ASSIGNED = ("first", "second", "neither")
TEMPERATURE = 0.07
"""Of the similarities that wrong pictures are drawn by (released code)."""


class TextAssignment(nn.Module):
    """An AlbefNlvr that tells ASSIGNED apart, and its loss; each with a third of the texts.

    projection: the pretrained ALBEF's of images; stays as it is.
    """

    def __init__(self, model: AlbefNlvr, projection: nn.Linear) -> None:
        super().__init__()
        if model.labels != ASSIGNED:
            raise UserError(
                f"text assignment has the classes {', '.join(ASSIGNED)}, not {', '.join(model.labels)}"
            )
        self.model = model
        self.projection = copy.deepcopy(projection).requires_grad_(False)

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model)

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, the mean cross-entropy of the batch's texts that have two other pictures to be
        told from, and without one "accuracy" over these. Draws come from torch's global CPU generator.
        """
        if batch.pixels is None:
            raise UserError("text assignment learns from pictures, not from cached features")
        tokens = self.model.encode_image(batch.pixels)
        with torch.no_grad():
            embeds = project(self.projection, tokens)
            scores = similarities(embeds, embeds, TEMPERATURE)
        wrong, found = two_others(scores, batch.image_index, batch.text_index)
        own = torch.arange(len(tokens), device=tokens.device)
        label = torch.randint(3, (len(tokens),)).to(tokens.device)
        first = torch.where(label == 0, own, wrong[:, 0])
        second = torch.where(label == 0, wrong[:, 0], torch.where(label == 1, own, wrong[:, 1]))
        cross = self.model.prefill_cross(tokens[torch.cat([first, second])])
        logits = self.model.seen_logits(batch.ids, batch.mask, cross)
        with full_precision(logits):
            count = found.sum().clamp(min=1)
            loss = (distilled_losses(logits, label) * found).sum() / count
            accuracy = ((logits.detach().argmax(dim=1) == label) & found).sum() / count
        return {"loss": loss, "accuracy": accuracy}


def two_others(scores: Tensor, image_index: Tensor, text_index: Tensor) -> tuple[Tensor, Tensor]:
    """(int64 [B, 2], two different rows for each, drawn without replacement by softmax(scores); bool [B], whether there are
    two). Rows of the same image, or with the identical text, are never drawn.

    scores: fp32 [B, B], images with images.
    """
    allowed = (image_index[:, None] != image_index) & (text_index[:, None] != text_index)
    # The largest of log-weights with Gumbel noise are such a draw (arXiv 1903.06059).
    noise = -torch.log(-torch.log(torch.rand(scores.shape).clamp(1e-20, 1.0 - 1e-7))).to(scores.device)
    keys = (scores + noise).masked_fill(~allowed, -math.inf)
    found = allowed.sum(dim=1) >= 2
    if len(scores) < 2:
        return torch.zeros(len(scores), 2, dtype=torch.int64, device=scores.device), found
    return keys.topk(2, dim=1).indices, found
