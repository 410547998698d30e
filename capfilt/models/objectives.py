"""BLIP's three pretraining losses (ITC, ITM, LM) as pure functions, and `BlipPretraining`, which runs them over one batch.

Not here: the network itself (`capfilt.models.blip`), the optimiser and the loop (`capfilt.training`), how rows become
batches (`capfilt.data.corpus`).
Sources: BLIP, arXiv 2201.12086, sec. 3.2 (the objectives); ALBEF, arXiv 2107.07651, sec. 3.2-3.3 (momentum distillation,
hard negatives); MoCo, arXiv 1911.05722, sec. 3 (queue). Departures from the released code are named where they happen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.errors import UserError

OBJECTIVES = ("itc", "itm", "lm")
COLLAPSED_ITM = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
"""ITM loss (nats) of a head that only knows its prior of one match in three rows: 0.6365."""


def _fp32(tensor: Tensor) -> AbstractContextManager[object]:
    # Temperature division and softmax over tens of thousands of candidates lose the loss in half precision, so every
    # loss leaves autocast first.
    return torch.autocast(device_type=tensor.device.type, enabled=False)


def alpha_ramp(step: int, ramp_steps: int, alpha: float = 0.4) -> float:
    """Weight of the momentum's soft targets at `step`: linear from 0 to `alpha` over `ramp_steps`, then constant.

    `alpha` 0.4 is ALBEF's (arXiv 2107.07651, sec. 4); BLIP ramps it over the first two epochs of pretraining and the first
    one of finetuning, so `ramp_steps` is the caller's.
    """
    if ramp_steps <= 0:
        return alpha
    return alpha * min(1.0, step / ramp_steps)


def positives(
    image_index: Tensor,
    text_index: Tensor,
    candidate_image_index: Tensor,
    candidate_text_index: Tensor,
    multi_positive: bool = True,
) -> Tensor:
    """Which candidates match which row: bool [B, C], the same matrix for image-to-text and text-to-image.

    The first B candidates are the batch itself, so row i always matches candidate i. With `multi_positive` every candidate
    of the same image or with the identical text matches too (the paper's pretraining counts those as negatives, its
    retrieval finetuning and ours do not). False gives the paper's diagonal.
    """
    rows, candidates = image_index.numel(), candidate_image_index.numel()
    matrix = torch.eye(rows, candidates, dtype=torch.bool, device=image_index.device)
    if multi_positive:
        matrix |= image_index[:, None] == candidate_image_index[None, :]
        matrix |= text_index[:, None] == candidate_text_index[None, :]
    return matrix


def contrastive_targets(
    matches: Tensor,
    alpha: float = 0.0,
    momentum_similarity: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Soft targets, fp32 [B, C], rows summing to 1: alpha * softmax(momentum_similarity) + (1 - alpha) * matches / row sum.

    `matches` bool [B, C]; `momentum_similarity` [B, C] already divided by the temperature, needed only where alpha > 0;
    `valid` bool [C] marks the candidates that exist. ALBEF, arXiv 2107.07651, eq. 6; rows with several matches share the
    mass evenly, as BLIP's retrieval finetuning does.
    """
    hard = matches.float()
    if valid is not None:
        hard = hard * valid
    hard = hard / hard.sum(dim=1, keepdim=True).clamp(min=1.0)
    if alpha == 0.0 or momentum_similarity is None:
        return hard
    scores = momentum_similarity.float()
    if valid is not None:
        scores = scores.masked_fill(~valid, -math.inf)
    return alpha * scores.softmax(dim=1) + (1.0 - alpha) * hard


def contrastive_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_candidates: Tensor,
    text_candidates: Tensor,
    temperature: Tensor | float,
    targets: tuple[Tensor, Tensor],
    valid: Tensor | None = None,
) -> Tensor:
    """ITC: fp32 scalar (nats), the mean of image-to-text and text-to-image cross-entropy against `targets`.

    `image_embeds`, `text_embeds` [B, E] and the candidates [C, E] are L2-normalised; `targets` = (image-to-text,
    text-to-image), each [B, C]; `valid` bool [C] drops candidates from both softmaxes. BLIP, arXiv 2201.12086, sec. 3.2,
    with the momentum targets of ALBEF, arXiv 2107.07651, eq. 6. For independent random embeddings and one-hot targets the
    expected value is about ln C + 1 / (2 E temperature^2).
    """
    with _fp32(image_embeds):
        return _soft_cross_entropy(
            image_embeds.float() @ text_candidates.float().T / temperature,
            text_embeds.float() @ image_candidates.float().T / temperature,
            targets,
            valid,
        )


def _soft_cross_entropy(
    image_to_text: Tensor, text_to_image: Tensor, targets: tuple[Tensor, Tensor], valid: Tensor | None
) -> Tensor:
    total = image_to_text.new_zeros(())
    for logits, target in zip((image_to_text, text_to_image), targets, strict=True):
        if valid is None:
            log_probability = logits.log_softmax(dim=1)
        else:
            # The second fill keeps 0 * -inf out of the sum.
            log_probability = (
                logits.masked_fill(~valid, -math.inf).log_softmax(dim=1).masked_fill(~valid, 0.0)
            )
        total = total - (target * log_probability).sum(dim=1).mean()
    return total / 2


def hard_negatives(
    similarity: Tensor,
    image_index: Tensor,
    text_index: Tensor,
    generator: torch.Generator | None = None,
    floor: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """One in-batch negative per row, drawn with probability proportional to softmax(similarity) + `floor`.

    `similarity` [B, B] is a query (row) against the batch's candidates (columns), divided by the temperature: images
    against texts draws a negative text per image, its counterpart a negative image per text. A candidate of the same
    image, or with the identical text, is never drawn. Returns (index int64 [B], found bool [B]); where a row has no
    candidate left, `found` is False and its index (the row itself) means nothing.

    `floor` 1e-4 is the released BLIP's. The draw is an inverse cumulative distribution over uniforms from a CPU
    `generator` (default: torch's global one): the same seed draws alike on every device, and a non-finite similarity
    makes its candidate merely average instead of raising inside the sampler; the loss it came from is what reports it.
    """
    allowed = (image_index[:, None] != image_index[None, :]) & (text_index[:, None] != text_index[None, :])
    found = allowed.any(dim=1)
    scores = similarity.detach().float()
    scores = torch.where(torch.isfinite(scores), scores, 0.0).masked_fill(~allowed, -math.inf)
    # A row without candidates would be softmax over nothing: NaN. It becomes a draw of itself that `found` discards.
    scores = torch.where(found[:, None], scores, 0.0)
    weights = torch.where(allowed, scores.softmax(dim=1) + floor, 0.0).double()
    cumulative = weights.cumsum(dim=1)
    uniform = torch.rand(len(scores), 1, generator=generator).to(scores.device).double()
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    rows = torch.arange(len(scores), device=scores.device)
    return torch.where(found, index.clamp(max=len(scores) - 1), rows), found


class MatchingRows(NamedTuple):
    """The 3B rows of one ITM pass, in the order positives, negative images, negative texts."""

    image: Tensor  # int64 [3B], which image of the batch
    text: Tensor  # int64 [3B], which text of the batch
    label: Tensor  # int64 [3B], 1 = match
    keep: Tensor  # bool [3B], False where no negative was found


def matching_rows(negative_image: Tensor, negative_text: Tensor, found: Tensor) -> MatchingRows:
    """Rows for `matching_loss` from one drawn image per text and one drawn text per image (int64 [B] each).

    A pair without any negative (`found` False) leaves the loss with its positive row too: otherwise a batch of one would
    teach the head that everything matches.
    """
    batch = torch.arange(len(found), device=found.device)
    label = torch.zeros(3 * len(found), dtype=torch.int64, device=found.device)
    label[: len(found)] = 1
    return MatchingRows(
        image=torch.cat([batch, negative_image, batch]),
        text=torch.cat([batch, batch, negative_text]),
        label=label,
        keep=found.repeat(3),
    )


class Matching(NamedTuple):
    """ITM results, fp32 scalars: `loss` in nats with a gradient, the accuracies in [0, 1] without."""

    loss: Tensor
    accuracy: Tensor
    balanced_accuracy: Tensor


def matching_loss(logits: Tensor, label: Tensor, keep: Tensor | None = None) -> Matching:
    """ITM: mean cross-entropy over the kept rows, with accuracy and balanced accuracy (mean recall of the classes present).

    `logits` [R, 2], `label` int64 [R] with 1 = match, `keep` bool [R]. BLIP, arXiv 2201.12086, sec. 3.2. Two thirds of the
    rows are negatives, so accuracy 0.667 with balanced accuracy 0.5 and loss 0.6365 is a head that learned nothing but
    its prior. No row kept gives loss 0.
    """
    with _fp32(logits):
        logits = logits.float()
        weight = torch.ones_like(label, dtype=torch.float32) if keep is None else keep.float()
        rows = weight.sum().clamp(min=1.0)
        loss = (F.cross_entropy(logits, label, reduction="none") * weight).sum() / rows
        with torch.no_grad():
            right = (logits.argmax(dim=1) == label).float() * weight
            matched = weight * (label == 1)
            unmatched = weight * (label == 0)
            recall_matched = (right * matched).sum() / matched.sum().clamp(min=1.0)
            recall_unmatched = (right * unmatched).sum() / unmatched.sum().clamp(min=1.0)
            classes = (matched.sum() > 0).float() + (unmatched.sum() > 0).float()
            balanced = (recall_matched + recall_unmatched) / classes.clamp(min=1.0)
        return Matching(loss, right.sum() / rows, balanced)


def language_labels(ids: Tensor, mask: Tensor, prompt_length: int = 0) -> Tensor:
    """What position t should predict: ids[t + 1], or -100 where that is a pad or one of the first `prompt_length` ids.

    `ids` int64 [B, L], `mask` bool [B, L] True on text; returns int64 [B, L - 1].
    """
    labels = ids[:, 1:].masked_fill(~mask[:, 1:].bool(), -100)
    if prompt_length > 1:
        labels[:, : prompt_length - 1] = -100
    return labels


def language_loss(
    logits: Tensor, ids: Tensor, mask: Tensor, prompt_length: int = 0, label_smoothing: float = 0.1
) -> Tensor:
    """LM: fp32 scalar (nats per predicted token), shifted cross-entropy over the texts' own tokens up to [SEP].

    `logits` [B, L, V], `ids` int64 [B, L], `mask` bool [B, L]. The first `prompt_length` ids, counting the start slot,
    are given and not learned ("a picture of " gives 4: the start slot and three words). `label_smoothing` 0.1: BLIP,
    arXiv 2201.12086, sec. 3.2; with it the loss cannot fall below the entropy of the smoothed target, 1.3577 at a
    vocabulary of 30524. No token to predict gives loss 0.
    """
    labels = language_labels(ids, mask, prompt_length)
    with _fp32(logits):
        total = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(),
            labels.flatten(),
            ignore_index=-100,
            label_smoothing=label_smoothing,
            reduction="sum",
        )
        return total / (labels != -100).sum().clamp(min=1)


@torch.no_grad()
def ema_update(averages: Iterable[Tensor], live: Iterable[Tensor], momentum: float = 0.995) -> None:
    """average <- momentum * average + (1 - momentum) * live, in place. 0.995: ALBEF, arXiv 2107.07651, sec. 4."""
    into, source = list(averages), list(live)
    if into:
        torch._foreach_lerp_(into, source, 1.0 - momentum)


class Candidates(NamedTuple):
    """What a batch is contrasted with besides itself: embeddings fp32 [C, E], indices int64 [C], valid bool [C]."""

    image: Tensor
    text: Tensor
    image_index: Tensor
    text_index: Tensor
    valid: Tensor


class FeatureQueue(nn.Module):
    """Ring buffer of the last `size` pairs of embeddings with their image and text numbers.

    Takes any batch, larger than itself included (the newest `size` rows stay). Unfilled slots are not candidates, where
    the released code contrasts with random vectors until the queue has filled and asserts that the batch divides it.
    A non-finite row is stored as invalid, so one broken batch cannot poison the next thousands of steps.
    Everything is part of `state_dict()`.
    """

    image: Tensor
    text: Tensor
    image_index: Tensor
    text_index: Tensor
    valid: Tensor

    def __init__(self, size: int, embed_dim: int) -> None:
        super().__init__()
        self.size = size
        self.position = 0
        self.filled = 0
        self.register_buffer("image", torch.zeros(size, embed_dim))
        self.register_buffer("text", torch.zeros(size, embed_dim))
        self.register_buffer("image_index", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("text_index", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))

    # Position and fill stay Python integers: reading them from a device tensor would stall the GPU in every step.
    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.position, self.filled], dtype=torch.int64)

    def set_extra_state(self, state: Tensor) -> None:
        self.position, self.filled = (int(value) for value in state.tolist())

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor, image_index: Tensor, text_index: Tensor) -> None:
        """Store B rows (embeddings [B, E], indices int64 [B]), overwriting the oldest."""
        if self.size == 0 or len(image) == 0:
            return
        image, text = image[-self.size :].float(), text[-self.size :].float()
        rows = len(image)
        slots = (self.position + torch.arange(rows, device=self.image.device)) % self.size
        finite = torch.isfinite(image).all(dim=1) & torch.isfinite(text).all(dim=1)
        # Zeros, not NaN, under the mask: a masked NaN would still reach the gradient as 0 * NaN.
        self.image[slots] = image.masked_fill(~finite[:, None], 0.0)
        self.text[slots] = text.masked_fill(~finite[:, None], 0.0)
        self.image_index[slots] = image_index[-self.size :]
        self.text_index[slots] = text_index[-self.size :]
        self.valid[slots] = finite
        self.position = (self.position + rows) % self.size
        self.filled = min(self.size, self.filled + rows)

    def candidates(self) -> Candidates:
        """Views of the filled slots (C = how many rows are stored). Copy before the next `enqueue` if they must last."""
        used = slice(0, self.filled)
        return Candidates(
            self.image[used], self.text[used], self.image_index[used], self.text_index[used], self.valid[used]
        )
