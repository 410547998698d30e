"""What the finetuned models learn from: answers to questions (VQA), labels of texts about one picture or two.

Each is a module with `losses(batch, alpha, hardness)`, as the training loop wants it; how examples become batches is
`capfilt.data.task_corpus`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.data.task_corpus import TaskBatch
from capfilt.errors import UserError
from capfilt.models.common.answering import Answering, answer_loss
from capfilt.models.common.layers import blocks_of, full_precision
from capfilt.models.common.momentum import followed
from capfilt.models.common.objectives import distilled_losses, ema_update


@dataclass(frozen=True)
class AnsweringConfig:
    """What decides VQA's loss."""

    label_smoothing: float = 0.1  # BLIP, arXiv 2201.12086, sec. 3.2, as in pretraining


class Judging(Protocol):
    """A model that judges texts with pictures.

    Attributes:
        labels: the classes it tells apart, in order.
        pictures: how many pictures a text has.
    """

    labels: tuple[str, ...]
    pictures: int

    def judge(self, ids: Tensor, mask: Tensor, images: Tensor) -> Tensor:
        """fp32 logits [B, labels] of ids int64 [B, L], mask bool [B, L], images [B, pictures, 3, S, S]."""


class TaskTraining(nn.Module):
    """A finetuned model and, with a momentum, a copy that follows it and whose word is a part of its targets.

    momentum: of the copy (ALBEF, arXiv 2107.07651, sec. 3.3 and code: 0.995); None for none. The weight of its word is the
    `alpha` of `losses`.
    """

    def __init__(self, model: Any, momentum: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.rate = momentum
        # In training mode with the model, as ALBEF's released code has it.
        self.momentum = copy.deepcopy(model).requires_grad_(False) if momentum is not None else None

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        return blocks_of(self.model) + (blocks_of(self.momentum) if self.momentum is not None else [])

    def after_step(self) -> None:
        """After a step that moved the weights: move the copy."""
        if self.momentum is not None and self.rate is not None:
            ema_update(*followed(self.momentum, self.model), self.rate)

    def taught(self, alpha: float, say: Callable[[Any], Tensor]) -> Tensor | None:
        """What the copy says, without gradient; None where nobody listens."""
        if self.momentum is None or alpha == 0.0:
            return None
        with torch.no_grad():
            return say(self.momentum)


class VqaTraining(TaskTraining):
    """A model that answers in words, and its loss."""

    def __init__(
        self, model: Answering, config: AnsweringConfig | None = None, momentum: float | None = None
    ) -> None:
        super().__init__(model, momentum)
        self.config = config or AnsweringConfig()

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient (`answer_loss`), and without one "accuracy": the mean over questions of the
        weight of the answer that greedy decoding writes, 0 where nobody gave it, as a share of the question's weights.
        """
        assert isinstance(batch, TaskBatch)
        if batch.answer_ids is None or batch.answer_mask is None or batch.answer_weight is None:
            raise UserError("a batch has no answers: its examples must be of the task vqa")
        # Every question's answers are its A rows side by side; attention reads one copy of its keys for all of them.
        ids, mask = batch.answer_ids.flatten(0, 1), batch.answer_mask.flatten(0, 1)

        def say(model: Answering) -> Tensor:
            question = model.encode_question(batch.ids, batch.mask, model.encode_image(_pixels(batch)))
            return model.answer_logits(ids, mask, model.prefill_cross(question), batch.mask)

        logits, teacher = say(self.model), self.taught(alpha, say)
        weights = batch.answer_weight
        smoothing = self.config.label_smoothing
        loss = answer_loss(logits, ids, mask, weights.flatten(), len(batch), smoothing, teacher, alpha)
        with torch.no_grad():
            # An answer whose every token is the likeliest after those before it is what greedy decoding writes.
            written = (logits[:, :-1].argmax(dim=2) == ids[:, 1:]) | ~mask[:, 1:]
            right = written.all(dim=1).view_as(weights) * weights
            accuracy = (right.sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)).mean()
        return {"loss": loss, "accuracy": accuracy}


class ClassifierTraining(TaskTraining):
    """A model that judges texts with one picture or two, and its loss.

    softmax: whether the answers of a closed list compete, or each is judged by itself.
    """

    model: Judging

    def __init__(self, model: Judging, momentum: float | None = None, softmax: bool = False) -> None:
        super().__init__(model, momentum)
        self.softmax = softmax

    def losses(self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0) -> dict[str, Tensor]:
        """fp32 scalars: "loss" with gradient, and "accuracy".

        Labels: the mean of `distilled_losses`, and the share of examples whose likeliest class is the right one. Targets of a
        closed list: binary cross-entropy summed over the answers (ViLT, arXiv 2102.03334, code), or with `softmax` the
        cross-entropy with every answer's share of the question's worth (Kazemi and Elqursh, arXiv 1704.03162), the mean
        over questions; and the mean worth of the likeliest answer.
        """
        assert isinstance(batch, TaskBatch)
        pixels = _pixels(batch)
        pixels = pixels[:, None] if pixels.dim() == 4 else pixels
        if pixels.shape[1] != self.model.pictures:
            raise UserError(
                f"a batch has {pixels.shape[1]} pictures per text, and the model looks at {self.model.pictures}"
            )

        def say(model: Judging) -> Tensor:
            return model.judge(batch.ids, batch.mask, pixels)

        logits = say(self.model)
        best = logits.detach().argmax(dim=1)
        with full_precision(logits):
            if batch.targets is not None:
                if self.softmax:
                    shares = batch.targets / batch.targets.sum(dim=1, keepdim=True).clamp(min=1e-6)
                    loss = F.cross_entropy(logits, shares)
                else:
                    loss = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="sum")
                    loss = loss / len(batch)
                accuracy = batch.targets.gather(1, best[:, None]).mean()
            elif batch.label is not None:
                loss = distilled_losses(logits, batch.label, self.taught(alpha, say), alpha).mean()
                accuracy = (best == batch.label).float().mean()
            else:
                raise UserError("a batch has neither labels nor targets of a closed list to learn from")
        return {"loss": loss, "accuracy": accuracy}


def _pixels(batch: Batch) -> Tensor:
    if batch.pixels is None:
        raise UserError("a batch has no pixels: these models are trained on pictures, not on cached features")
    return batch.pixels
