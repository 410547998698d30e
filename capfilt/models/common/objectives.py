"""BLIP's three pretraining losses (ITC, ITM, LM) as pure functions, and the queue that ITC looks back in.

Not here: what puts them together for a batch (`pretraining.py`), the network itself (`blip.py`), the optimiser and the
loop (`capfilt.training`).
Sources: BLIP, arXiv 2201.12086, sec. 3.2 (the objectives); ALBEF, arXiv 2107.07651, sec. 3.2-3.3 (hard negatives,
momentum distillation); MoCo, arXiv 1911.05722, sec. 3 (queue). Departures from the released code are named in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.models.common.layers import full_precision, steady
from capfilt.models.common.ranks import ALONE, Ranks

OBJECTIVES = ("itc", "itm", "lm")


COLLAPSED_ITM = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)
"""ITM loss (nats) of a head that only knows its prior of one match in three rows: 0.6365."""


def hardness_ramp(step: int, ramp_steps: int) -> float:
    """ITM's negatives at `step`: from 0 (uniform) to 1 (the published draw) over `ramp_steps`; always 1 where that is 0.

    A model that starts from nothing cannot tell its hardest negatives from matches, sits at the class prior and learns
    nothing from ITM (BLIP's users report it on small corpora); easy ones first get it off the ground.
    """
    return 1.0 if ramp_steps <= 0 else min(1.0, step / ramp_steps)


def alpha_ramp(step: int, ramp_steps: int, alpha: float = 0.4) -> float:
    """Weight of the momentum's soft targets at `step`: linear from 0 to `alpha` over `ramp_steps`, then constant.

    `alpha` 0.4 is ALBEF's (arXiv 2107.07651, sec. 4); BLIP ramps it over the first two epochs of pretraining and the
    first one of finetuning, so `ramp_steps` is the caller's.
    """
    if ramp_steps <= 0:
        return alpha
    return alpha * min(1.0, step / ramp_steps)


def scaled_momentum(momentum: float, batch_size: int, published_batch_size: int) -> float:
    """`momentum` for another batch than the one it was published with: momentum ** (batch / published).

    The average then forgets as much per text, so that a small batch's towers do not run along with the live ones, and a
    large one's are not left behind. BLIP publishes 0.995 at 2,880 texts (arXiv 2201.12086, sec. 4.1); half of that batch
    takes 0.9975.
    """
    return float(momentum ** (batch_size / published_batch_size))


def mean_cosine(embeds: Tensor, valid: Tensor | None = None) -> Tensor:
    """fp32 scalar: the mean cosine of two different rows of unit vectors [B, E]; 1 where all are one point, near 0 where
    they are spread out. `valid` bool [B] leaves rows out; 0 for fewer than two.
    """
    with full_precision(embeds):
        rows = embeds.detach().float()
        if valid is not None:
            rows = rows * valid[:, None]
        count = torch.tensor(float(len(rows)), device=rows.device) if valid is None else valid.sum().float()
        # The squared length of the sum is every pair's cosine twice, and every row's own.
        pairs = (count * (count - 1)).clamp(min=1.0)
        return (rows.sum(dim=0).square().sum() - rows.square().sum()) / pairs


def positives(
    image_index: Tensor,
    text_index: Tensor,
    candidate_image_index: Tensor,
    candidate_text_index: Tensor,
    multi_positive: bool = True,
    offset: int = 0,
) -> Tensor:
    """Which candidates match which row: bool [B, C], the same matrix for image-to-text and text-to-image.

    The rows themselves are among the candidates, from number `offset` on: row i always matches candidate offset + i.
    With `multi_positive` every candidate of the same image or with the identical text matches too (BLIP's pretraining
    counts those as negatives, its retrieval finetuning does not for the same image). False gives the diagonal alone.
    """
    candidates = torch.arange(candidate_image_index.numel(), device=image_index.device)
    itself = offset + torch.arange(image_index.numel(), device=image_index.device)
    matrix = itself[:, None] == candidates[None, :]
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
    """Soft targets, fp32 [B, C]: alpha * softmax(momentum_similarity) + (1 - alpha) * matches / their row sum.

    `matches` bool [B, C]; `momentum_similarity` [B, C], already divided by the temperature, is needed where alpha > 0;
    `valid` bool [C] marks the candidates that exist. Rows sum to 1. ALBEF, arXiv 2107.07651, eq. 6; several matches of
    a row share the mass evenly, as in BLIP's retrieval finetuning.
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
    rows: float | Tensor | None = None,
    weight: Tensor | None = None,
    read: Tensor | None = None,
) -> Tensor:
    """ITC: fp32 scalar (nats), the mean of image-to-text and text-to-image cross-entropy against `targets`.

    `image_embeds`, `text_embeds` [B, E] and the candidates [C, E] are L2-normalised; `targets` = (image-to-text,
    text-to-image), each [B, C]; `valid` bool [C] drops candidates from both softmaxes; `rows` is what sums over
    rows are divided by (`Rows.share`), B by default; `weight` fp32 [B] is each row's, 1 by default; `read`
    bool [C] drops the other texts alone, whose pictures remain candidates (see `Batch.dropped`). BLIP,
    arXiv 2201.12086, sec. 3.2, with the momentum targets of ALBEF, arXiv 2107.07651, eq. 6. For independent random
    embeddings and one-hot targets it is about ln C + 1 / (2 E temperature^2).
    """
    image_to_text, text_to_image = targets
    if weight is not None:
        image_to_text, text_to_image = image_to_text * weight[:, None], text_to_image * weight[:, None]
    return (
        _soft_cross_entropy(
            similarities(image_embeds, text_candidates, temperature), image_to_text, both(valid, read)
        )
        + _soft_cross_entropy(similarities(text_embeds, image_candidates, temperature), text_to_image, valid)
    ) / (2 * (len(image_embeds) if rows is None else rows))


def both(valid: Tensor | None, read: Tensor | None) -> Tensor | None:
    """bool [C], where both are true; one of them where the other is None."""
    return valid if read is None else read if valid is None else valid & read


def soft_target_loss(
    image_embeds: Tensor,
    text_embeds: Tensor,
    image_candidates: Tensor,
    text_candidates: Tensor,
    temperature: Tensor | float,
    weight: Tensor,
    rows: float | Tensor,
    read: Tensor | None = None,
    sharpness: float = 0.05,
    floor: float = 1e-4,
) -> Tensor:
    """ITC of pictures without a text of their own: fp32 scalar (nats), the mean of both directions, weighted, over `rows`.

    `image_embeds` and `text_embeds` [n, E] are a picture's, and those that stand for its text (`stand_ins`). A picture's target
    among the texts is q = softmax(text_embeds . texts / `sharpness`); its stand-in's among the pictures is
    softmax(image_embeds . pictures / `sharpness`). Each direction has the cross-entropy of p with q, and the reverse one,
    -sum p log max(q, `floor`), which an unlikely target cannot make large (SCE, arXiv 1908.06112, sec. 3; IN2R 2026).
    Targets have no gradient. `weight` fp32 [n]; `rows`, `read` as in `contrastive_loss`.
    """
    total = torch.zeros((), device=image_embeds.device)
    for queries, judges, candidates, valid in (
        (image_embeds, text_embeds, text_candidates, read),
        (text_embeds, image_embeds, image_candidates, None),
    ):
        logits = similarities(queries, candidates, temperature)
        wanted = similarities(judges.detach(), candidates.detach(), sharpness)
        if valid is not None:
            logits, wanted = logits.masked_fill(~valid, -math.inf), wanted.masked_fill(~valid, -math.inf)
        target, log_likely = wanted.softmax(dim=1), logits.log_softmax(dim=1)
        likely = log_likely.exp()
        if valid is not None:
            log_likely = log_likely.masked_fill(~valid, 0.0)
        each = (target * log_likely).sum(dim=1) + (likely * target.clamp(min=floor).log()).sum(dim=1)
        total = total - (weight * each).sum()
    return total / (2 * rows)


@torch.no_grad()
def stand_ins(
    batch: Batch, model: nn.Module, embed: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(int64 [n], which rows of a batch have a soft target; fp32 unit vectors [n, E], the mean of their neighbours' texts).

    `embed` makes unit vectors [R, E] of ids and mask [R, L], without draws of `model`'s. Where no row has a target, the first
    one is told, whose weight is 0: weights that are split over ranks are run by all of them.
    """
    assert batch.soft is not None
    assert batch.near_ids is not None
    assert batch.near_mask is not None
    index = batch.soft.nonzero()[:, 0]
    index = index if len(index) else torch.zeros(1, dtype=torch.int64, device=batch.soft.device)
    with steady(model):
        found = embed(batch.near_ids[index].flatten(0, 1), batch.near_mask[index].flatten(0, 1))
    return index, F.normalize(found.float().view(len(index), -1, found.shape[-1]).mean(dim=1), dim=-1)


def similarities(queries: Tensor, candidates: Tensor, temperature: Tensor | float) -> Tensor:
    """queries [B, E] @ candidates [C, E] transposed, over the temperature: fp32 [B, C], free of autocast."""
    with full_precision(queries):
        return queries.float() @ candidates.float().T / temperature


def _soft_cross_entropy(logits: Tensor, target: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        log_probability = logits.log_softmax(dim=1)
    else:
        # The second fill keeps 0 * -inf out of the sum.
        log_probability = logits.masked_fill(~valid, -math.inf).log_softmax(dim=1).masked_fill(~valid, 0.0)
    return -(target * log_probability).sum()


def hard_negatives(
    similarity: Tensor,
    image_index: Tensor,
    text_index: Tensor,
    candidates: tuple[Tensor, Tensor] | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    floor: float = 1e-4,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One in-batch negative per row, drawn with probability proportional to softmax(similarity) + `floor`.

    `similarity` [B, C] is a query (row) against the candidates (columns), divided by the temperature: images against
    texts draws a negative text per image, its counterpart a negative image per text. `candidates` are their image and
    text numbers, int64 [C] each; by default they are the rows themselves. A candidate of the same image, or with the
    identical text, is never drawn, nor one for which `read` (bool [C]) is False. Returns (index int64 [B], found bool [B]).
    A row without a candidate has the index 0, which means nothing, and `found` False.

    `floor` 1e-4 is the released BLIP's. The draw is an inverse cumulative distribution over `uniform` [B, 1], by default
    from a CPU `generator` (default: torch's global one): the same seed draws alike on every device, and a non-finite
    similarity makes its candidate merely average instead of raising inside the sampler; the loss it came from is what
    reports it.
    """
    images, texts = (image_index, text_index) if candidates is None else candidates
    allowed = (image_index[:, None] != images[None, :]) & (text_index[:, None] != texts[None, :])
    if read is not None:
        allowed = allowed & read
    found = allowed.any(dim=1)
    scores = similarity.detach().float()
    scores = torch.where(torch.isfinite(scores), scores, 0.0).masked_fill(~allowed, -math.inf)
    # A row without candidates would be softmax over nothing: NaN. It becomes a draw that `found` discards.
    scores = torch.where(found[:, None], scores, 0.0)
    weights = torch.where(allowed, scores.softmax(dim=1) + floor, 0.0).double()
    cumulative = weights.cumsum(dim=1)
    if uniform is None:
        uniform = torch.rand(len(scores), 1, generator=generator)
    uniform = uniform.to(scores.device).double()
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    return torch.where(found, index.clamp(max=scores.shape[1] - 1), 0), found


class MatchingRows(NamedTuple):
    """The 3B rows of one ITM pass, in the order positives, negative images, negative texts."""

    image: Tensor  # int64 [3B], which image
    text: Tensor  # int64 [3B], which text
    label: Tensor  # int64 [3B], 1 = match
    keep: Tensor  # bool [3B], False where no negative was found


def matching_rows(
    negative_image: Tensor, negative_text: Tensor, found: Tensor, offset: int = 0
) -> MatchingRows:
    """Rows for `matching_loss` from one drawn image per text and one drawn text per image (int64 [B] each).

    Pair i is image i with text `offset` + i.

    A pair without any negative (`found` False) leaves the loss with its positive row too: otherwise a batch of one
    would teach the head that everything matches.
    """
    batch = torch.arange(len(found), device=found.device)
    label = torch.zeros(3 * len(found), dtype=torch.int64, device=found.device)
    label[: len(found)] = 1
    return MatchingRows(
        image=torch.cat([batch, negative_image, batch]),
        text=torch.cat([offset + batch, offset + batch, negative_text]),
        label=label,
        keep=found.repeat(3),
    )


class Matching(NamedTuple):
    """ITM results, fp32 scalars: `loss` in nats with a gradient, the accuracies in [0, 1] without."""

    loss: Tensor
    accuracy: Tensor
    balanced_accuracy: Tensor


def matching_loss(
    logits: Tensor,
    label: Tensor,
    keep: Tensor | None = None,
    ranks: Ranks = ALONE,
    weight: Tensor | None = None,
) -> Matching:
    """ITM: mean cross-entropy over the kept rows, accuracy, and balanced accuracy (mean recall of the classes present).

    `logits` [R, 2], `label` int64 [R] with 1 = match, `keep` bool [R], `weight` fp32 [R] of the loss alone; with
    other `ranks`, the mean is over their rows too (see `Rows`), the accuracies are of these rows. BLIP, arXiv 2201.12086,
    sec. 3.2. Two thirds of the rows are negatives, so accuracy 0.667 with balanced accuracy 0.5 and loss 0.6365 is a head
    that learned nothing but its prior. No row kept gives loss 0.
    """
    with full_precision(logits):
        logits = logits.float()
        kept = torch.ones_like(label, dtype=torch.float32) if keep is None else keep.float()
        rows = kept.sum().clamp(min=1.0)
        weight = kept if weight is None else kept * weight
        losses = F.cross_entropy(logits, label, reduction="none") * weight
        loss = losses.sum() / ranks.share(weight.sum())
        with torch.no_grad():
            right = (logits.argmax(dim=1) == label).float() * kept
            matched = kept * (label == 1)
            unmatched = kept * (label == 0)
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
    logits: Tensor,
    ids: Tensor,
    mask: Tensor,
    prompt_length: int = 0,
    label_smoothing: float = 0.1,
    ranks: Ranks = ALONE,
    weight: Tensor | None = None,
) -> Tensor:
    """LM: fp32 scalar (nats per predicted token), shifted cross-entropy over the texts' own tokens up to [SEP].

    `logits` [B, L, V], `ids` int64 [B, L], `mask` bool [B, L]. The first `prompt_length` ids, counting the start slot,
    are given and not learned ("a picture of " gives 4: the start slot and three words). `label_smoothing` 0.1: BLIP,
    arXiv 2201.12086, sec. 3.2; with it the loss cannot fall below the entropy of the smoothed target, 1.3577 at a
    vocabulary of 30524. No token to predict gives loss 0. With other `ranks`, the mean is over their tokens too. `weight`
    fp32 [B] is that of each text's tokens, 1 by default.
    """
    labels = language_labels(ids, mask, prompt_length)
    weight = of_tokens(weight, torch.ones_like(labels, dtype=torch.bool))
    return token_loss(logits[:, :-1].flatten(0, 1), labels.flatten(), label_smoothing, ranks, weight)


def of_tokens(weight: Tensor | None, where: Tensor) -> Tensor | None:
    """fp32 [T], the weight of its text (fp32 [B]) for each token at which bool [B, L] is true; None of None."""
    return None if weight is None else weight[:, None].expand_as(where)[where]


def token_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.1,
    ranks: Ranks = ALONE,
    weight: Tensor | None = None,
) -> Tensor:
    """`language_loss` of logits [T, V] and labels int64 [T], -100 where nothing is to be predicted; `weight` fp32 [T]."""
    with full_precision(logits):
        predicted = labels != -100
        if weight is None:
            total = F.cross_entropy(
                logits.float(), labels, ignore_index=-100, label_smoothing=label_smoothing, reduction="sum"
            )
            return total / ranks.share(predicted.sum())
        losses = distilled_losses(logits, labels, label_smoothing=label_smoothing)
        return (losses * weight).sum() / ranks.share((weight * predicted).sum())


def distilled_losses(
    logits: Tensor,
    labels: Tensor,
    teacher: Tensor | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """fp32 [T] (nats): (1 - alpha) * cross-entropy + alpha * -sum softmax(teacher) * log softmax(logits), 0 where the
    label is -100.

    `logits` and `teacher`, a momentum model's, [T, C]; `labels` int64 [T]. Without a teacher, the cross-entropy alone.
    ALBEF, arXiv 2107.07651, eq. 7.
    """
    with full_precision(logits):
        losses = F.cross_entropy(
            logits.float(), labels, ignore_index=-100, label_smoothing=label_smoothing, reduction="none"
        )
        if teacher is None or alpha == 0.0:
            return losses
        soft = F.cross_entropy(logits.float(), teacher.detach().float().softmax(dim=1), reduction="none")
        return (1.0 - alpha) * losses + alpha * soft.masked_fill(labels == -100, 0.0)


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
        """Views of the filled slots, C of them; the next `enqueue` may overwrite what they show."""
        used = slice(0, self.filled)
        return Candidates(
            self.image[used], self.text[used], self.image_index[used], self.text_index[used], self.valid[used]
        )
