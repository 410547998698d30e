"""BLIP's three pretraining losses (ITC, ITM, LM) as pure functions, and `BlipPretraining`: all of them on one batch.

Not here: the network itself (`capfilt.models.blip`), the optimiser and the loop (`capfilt.training`), how rows become
batches (`capfilt.data.corpus`).
Sources: BLIP, arXiv 2201.12086, sec. 3.2 (the objectives); ALBEF, arXiv 2107.07651, sec. 3.2-3.3 (hard negatives,
momentum distillation); MoCo, arXiv 1911.05722, sec. 3 (queue). Departures from the released code are named in place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.blip import Blip, project
from capfilt.models.layers import Pair, full_precision

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
) -> Tensor:
    """Which candidates match which row: bool [B, C], the same matrix for image-to-text and text-to-image.

    The first B candidates are the batch itself, so row i always matches candidate i. With `multi_positive` every
    candidate of the same image or with the identical text matches too (BLIP's pretraining counts those as negatives,
    its retrieval finetuning does not for the same image). False gives the diagonal alone.
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
) -> Tensor:
    """ITC: fp32 scalar (nats), the mean of image-to-text and text-to-image cross-entropy against `targets`.

    `image_embeds`, `text_embeds` [B, E] and the candidates [C, E] are L2-normalised; `targets` = (image-to-text,
    text-to-image), each [B, C]; `valid` bool [C] drops candidates from both softmaxes. BLIP, arXiv 2201.12086,
    sec. 3.2, with the momentum targets of ALBEF, arXiv 2107.07651, eq. 6. For independent random embeddings and one-hot
    targets it is about ln C + 1 / (2 E temperature^2).
    """
    image_to_text, text_to_image = targets
    return (
        _soft_cross_entropy(similarities(image_embeds, text_candidates, temperature), image_to_text, valid)
        + _soft_cross_entropy(similarities(text_embeds, image_candidates, temperature), text_to_image, valid)
    ) / 2


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
    return -(target * log_probability).sum(dim=1).mean()


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

    A pair without any negative (`found` False) leaves the loss with its positive row too: otherwise a batch of one
    would teach the head that everything matches.
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
    """ITM: mean cross-entropy over the kept rows, accuracy, and balanced accuracy (mean recall of the classes present).

    `logits` [R, 2], `label` int64 [R] with 1 = match, `keep` bool [R]. BLIP, arXiv 2201.12086, sec. 3.2. Two thirds of
    the rows are negatives, so accuracy 0.667 with balanced accuracy 0.5 and loss 0.6365 is a head that learned nothing
    but its prior. No row kept gives loss 0.
    """
    with full_precision(logits):
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
    with full_precision(logits):
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
        """Views of the filled slots, C of them; the next `enqueue` may overwrite what they show."""
        used = slice(0, self.filled)
        return Candidates(
            self.image[used], self.text[used], self.image_index[used], self.text_index[used], self.valid[used]
        )


CHUNK_ROWS = 32
MAX_CHUNKS = 4


def length_chunks(mask: Tensor) -> list[tuple[Tensor, int]]:
    """Rows of `mask` bool [R, L] in groups of similar length: (row numbers int64, length of the longest) each.

    A batch of web texts is padded to almost twice its mean length, and on a CPU every pad costs what a word costs. On
    other devices all rows are one group at full length, because looking at lengths would stall them.
    """
    rows = len(mask)
    groups = min(MAX_CHUNKS, rows // CHUNK_ROWS)
    if mask.device.type != "cpu" or groups < 2:
        return [(torch.arange(rows, device=mask.device), mask.shape[1])]
    lengths = mask.sum(dim=1)
    order = lengths.argsort(stable=True)
    return [(part, int(lengths[part[-1]])) for part in order.chunk(groups)]


@dataclass(frozen=True)
class PretrainingConfig:
    """Which losses, and their constants. The paper's and its released code's values, cited beside each.

    Pretraining is ("itc", "itm", "lm"), a captioner is finetuned with ("lm",) and a prompt, a filter with
    ("itc", "itm").
    """

    objectives: tuple[str, ...] = OBJECTIVES
    weights: Mapping[str, float] = field(default_factory=dict)
    """Factor per objective; 1 where not named (BLIP, arXiv 2201.12086, sec. 3.2: the plain sum)."""
    queue_size: int = 57600
    """Past pairs kept as ITC candidates (BLIP, released pretraining configuration); 0: the batch alone."""
    momentum: float | None = 0.995
    """EMA of the momentum towers (ALBEF, arXiv 2107.07651, sec. 4). None: no towers; the candidates are the live
    embeddings and there are no soft targets, for half the cost of a small step."""
    multi_positive: bool = True
    """Candidates of the same image or with the identical text are positives; False is the paper's pretraining."""
    label_smoothing: float = 0.1
    """Of the language model's targets (BLIP, sec. 3.2)."""
    prompt_length: int = 0
    """Ids at the start of each text, start slot included, that the language model is given and does not learn."""
    temperature_range: tuple[float, float] = (0.001, 0.5)
    """The learned temperature is clamped to this in place before every step (BLIP, released code)."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.objectives) - set(OBJECTIVES))
        if unknown or not self.objectives:
            raise UserError(
                f"objectives {list(self.objectives)}: name at least one of {', '.join(OBJECTIVES)}"
            )
        stray = sorted(set(self.weights) - set(self.objectives))
        if stray:
            raise UserError(
                f"weights: {', '.join(stray)} is not among the objectives {', '.join(self.objectives)}"
            )
        if self.queue_size < 0:
            raise UserError(f"queue_size {self.queue_size}: give 0 (the batch alone) or more")
        if self.momentum is not None and not 0.0 <= self.momentum < 1.0:
            raise UserError(f"momentum {self.momentum}: give a number in [0, 1), or none")


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
            del layer.crossattention
        self.vision_proj = copy.deepcopy(model.vision_proj)
        self.text_proj = copy.deepcopy(model.text_proj)
        self.requires_grad_(False)

    def pairs(self, model: Blip) -> tuple[list[Tensor], list[Tensor]]:
        """(own parameters, the live ones they follow); a frozen live parameter never moves and is left out."""
        live = dict(model.named_parameters(remove_duplicate=False))
        names = [name for name, _ in self.named_parameters() if live[name].requires_grad]
        mine = dict(self.named_parameters())
        return [mine[name] for name in names], [live[name] for name in names]

    def embed_image(self, images: Tensor) -> Tensor:
        return project(self.vision_proj, self.visual_encoder(images))

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return project(self.text_proj, self.text_encoder(ids, mask, first=True))


class Contrast(NamedTuple):
    """ITC's results: `loss` in nats with a gradient, and without one the batch's own similarities [B, B] and the mean
    cosines of its image and text embeddings.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    cosines: tuple[Tensor, Tensor]


class BlipPretraining(nn.Module):
    """A Blip with what its training needs and its use does not: momentum towers and the queue.

    `losses(batch, alpha)` is one step's forward pass: the image is encoded once and its cross-attention keys and values
    are computed once for ITM's three rows and LM's one, ITM's 3B rows are one text pass. On a CPU the rows of the
    encoder's passes go through in groups of similar length.
    """

    def __init__(self, model: Blip, config: PretrainingConfig | None = None) -> None:
        super().__init__()
        self.model = model
        self.config = config or PretrainingConfig()
        for objective in self.config.objectives:
            model.require("captioner" if objective == "lm" else "filter")
        contrastive = "itc" in self.config.objectives
        self.momentum = MomentumTowers(model) if contrastive and self.config.momentum is not None else None
        self.queue = FeatureQueue(self.config.queue_size if contrastive else 0, model.config.embed_dim)

    def losses(
        self, batch: Batch, alpha: float = 0.0, hardness: float = 1.0, first: bool = True
    ) -> dict[str, Tensor]:
        """fp32 scalars: "loss" (weighted sum, with gradient), "itc", "itm", "lm" as configured, and without gradient
        "temperature", "image_cosine" and "text_cosine" (`mean_cosine` of the batch), "itm_accuracy",
        "itm_balanced_accuracy" where they apply.

        `alpha` is the weight of the momentum's soft targets (see `alpha_ramp`). `hardness` scales the similarities that
        ITM's negatives are drawn by: 1 is the published draw, 0 a uniform one. In training mode the call also clamps
        the temperature, moves the momentum towers before they are used, and fills the queue; draws come from torch's
        global generators. Without ITC, ITM's hard negatives come from similarities computed without gradient.

        `first` False is a further micro-batch of the same step: weights have not moved, so neither does what follows
        them. Each micro-batch is contrasted with itself and the queue, which holds the step's earlier ones by then; ITM's
        negatives are its own. That is what each of the released code's processes sees too: it gathers features for its
        queue and not for its logits.
        """
        objectives, model = self.config.objectives, self.model
        if self.training and first:
            self._before_step()
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "lm"} & set(objectives) else []
        found: dict[str, Tensor] = {}
        detached: dict[str, Tensor] = {}
        if {"itc", "itm"} & set(objectives):
            with torch.set_grad_enabled(torch.is_grad_enabled() and "itc" in objectives):
                contrast = self._contrast(batch, images, tokens, alpha)
            if "itc" in objectives:
                found["itc"] = contrast.loss
                detached["image_cosine"], detached["text_cosine"] = contrast.cosines
                detached["temperature"] = model.temperature.detach().float().clone()
            if "itm" in objectives:
                near = (hardness * contrast.image_to_text, hardness * contrast.text_to_image)
                matching = self._match(batch, cross, *near)
                found["itm"] = matching.loss
                detached["itm_accuracy"] = matching.accuracy
                detached["itm_balanced_accuracy"] = matching.balanced_accuracy
        if "lm" in objectives:
            # No padding mask: pads come last, so no token before them sees one through the causal mask.
            logits = model.lm_logits(batch.ids, None, cross)
            found["lm"] = language_loss(
                logits, batch.ids, batch.mask, self.config.prompt_length, self.config.label_smoothing
            )
        total = torch.stack([self.config.weights.get(name, 1.0) * loss for name, loss in found.items()]).sum()
        return {"loss": total, **found, **detached}

    @torch.no_grad()
    def figures(self) -> dict[str, Tensor]:
        """fp32 scalars that a log line has and a step has not: "queue_cosine", the larger `mean_cosine` of the queue's
        images and texts, once it holds some.
        """
        queued = self.queue.candidates()
        if self.queue.filled < 2:
            return {}
        sides = (mean_cosine(queued.image, queued.valid), mean_cosine(queued.text, queued.valid))
        return {"queue_cosine": torch.maximum(*sides)}

    @torch.no_grad()
    def _before_step(self) -> None:
        self.model.temperature.clamp_(*self.config.temperature_range)
        if self.momentum is not None and self.config.momentum is not None:
            ema_update(*self.momentum.pairs(self.model), self.config.momentum)

    def _images(self, batch: Batch) -> Tensor:
        images = batch.features if batch.features is not None else batch.pixels
        if images is None:
            raise UserError("a batch has neither pixels nor features: the loader must yield one of them")
        tower = self.model.visual_encoder
        if (
            self.momentum is not None
            and images.dim() == 4
            and tower.config.trunk
            and tower.config.trunk_frozen
        ):
            # Both towers hold the same frozen trunk: run it once.
            return tower.trunk_features(images)
        return images

    def _contrast(self, batch: Batch, images: Tensor, tokens: Tensor, alpha: float) -> Contrast:
        model, towers = self.model, self.momentum
        image, text = model.embed_image(tokens), _embed_text(model, batch)
        image_m, text_m = image, text
        if towers is not None:
            with torch.no_grad():
                image_m, text_m = towers.embed_image(images), _embed_text(towers, batch)
        queued = self.queue.candidates()
        image_candidates = torch.cat([image_m, queued.image])
        text_candidates = torch.cat([text_m, queued.text])
        matches = positives(
            batch.image_index,
            batch.text_index,
            torch.cat([batch.image_index, queued.image_index]),
            torch.cat([batch.text_index, queued.text_index]),
            self.config.multi_positive,
        )
        valid = None
        if self.queue.filled:
            valid = torch.cat([torch.ones_like(batch.image_index, dtype=torch.bool), queued.valid])
        with torch.no_grad():
            image_to_text = text_to_image = None
            if towers is not None and alpha > 0.0:
                image_to_text = similarities(image_m, text_candidates, model.temperature)
                text_to_image = similarities(text_m, image_candidates, model.temperature)
            targets = (
                contrastive_targets(matches, alpha, image_to_text, valid),
                contrastive_targets(matches, alpha, text_to_image, valid),
            )
        loss = contrastive_loss(
            image, text, image_candidates, text_candidates, model.temperature, targets, valid
        )
        with torch.no_grad():
            near = (
                similarities(image, text_m, model.temperature),
                similarities(text, image_m, model.temperature),
            )
        if self.training:
            self.queue.enqueue(image_m.detach(), text_m.detach(), batch.image_index, batch.text_index)
        return Contrast(loss, *near, (mean_cosine(image), mean_cosine(text)))

    def _match(
        self, batch: Batch, cross: Sequence[Pair], image_to_text: Tensor, text_to_image: Tensor
    ) -> Matching:
        negative_text, found = hard_negatives(image_to_text, batch.image_index, batch.text_index)
        negative_image, _ = hard_negatives(text_to_image, batch.image_index, batch.text_index)
        rows = matching_rows(negative_image, negative_text, found)
        mask = batch.mask[rows.text]
        groups = length_chunks(mask)
        order = torch.cat([some for some, _ in groups])
        sizes = [len(some) for some, _ in groups]
        # Gathered once and split, not once per group: the gradient of a gather is as large as what was gathered from.
        image = rows.image[order]
        gathered = [
            (torch.split(keys[image], sizes), torch.split(values[image], sizes)) for keys, values in cross
        ]
        logits = [
            self.model.match_logits(
                batch.ids[rows.text[some], :length],
                mask[some, :length],
                [(keys[group], values[group]) for keys, values in gathered],
            )
            for group, (some, length) in enumerate(groups)
        ]
        return matching_loss(torch.cat(logits), rows.label[order], rows.keep[order])


def _embed_text(towers: Blip | MomentumTowers, batch: Batch) -> Tensor:
    groups = length_chunks(batch.mask)
    embedded = [
        towers.embed_text(batch.ids[some, :length], batch.mask[some, :length]) for some, length in groups
    ]
    return torch.cat(embedded)[torch.cat([some for some, _ in groups]).argsort()]
