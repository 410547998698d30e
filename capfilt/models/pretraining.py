"""BLIP's pretraining and finetuning objective: a Blip with momentum towers and a queue, and all its losses on one batch.

Not here: the losses by themselves (`objectives.py`), the network (`blip.py`), the loop (`capfilt.training`).
Sources: BLIP, arXiv 2201.12086, sec. 3.2; ALBEF, arXiv 2107.07651, sec. 3.2-3.3 (momentum distillation).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.blip import Blip, project
from capfilt.models.layers import Pair
from capfilt.models.objectives import (
    OBJECTIVES,
    FeatureQueue,
    Matching,
    contrastive_loss,
    contrastive_targets,
    ema_update,
    hard_negatives,
    language_labels,
    language_loss,
    matching_loss,
    matching_rows,
    mean_cosine,
    positives,
    similarities,
    token_loss,
)
from capfilt.models.ranks import ALONE, Ranks, Rows

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
    global_negatives: bool = True
    """Where several ranks train together: whether ITC and ITM draw on the whole batch, as one process would, or on each
    rank's own rows (and the queue, which is everyone's), as BLIP's released pretraining does."""
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

    def __init__(self, model: Blip, config: PretrainingConfig | None = None, ranks: Ranks = ALONE) -> None:
        super().__init__()
        self.model = model
        self.config = config or PretrainingConfig()
        self.ranks = ranks
        for objective in self.config.objectives:
            model.require("captioner" if objective == "lm" else "filter")
        contrastive = "itc" in self.config.objectives
        self.momentum = MomentumTowers(model) if contrastive and self.config.momentum is not None else None
        self.queue = FeatureQueue(self.config.queue_size if contrastive else 0, model.config.embed_dim)

    @property
    def leaves_unused(self) -> bool:
        """Whether some of the model's parameters get no gradient from these objectives."""
        return set(self.config.objectives) != set(OBJECTIVES)

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        towers = [self.model.visual_encoder]
        if self.momentum is not None:
            towers.append(self.momentum.visual_encoder)
        return [block for tower in towers for block in tower.blocks]

    @torch.no_grad()
    def before_step(self) -> None:
        """What moves once per step, before its first loss: clamps the temperature, lets the momentum towers follow."""
        if {"itc", "itm"} & set(self.config.objectives):
            self.model.temperature.clamp_(*self.config.temperature_range)
        if self.momentum is not None and self.config.momentum is not None:
            ema_update(*self.momentum.pairs(self.model), self.config.momentum)

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
        objectives, model = self.config.objectives, self.model
        rows = self.ranks.rows(*batch.ids.shape)
        images = self._images(batch)
        tokens = model.encode_image(images)
        cross = model.prefill_cross(tokens) if {"itm", "lm"} & set(objectives) else []
        found: dict[str, Tensor] = {}
        detached: dict[str, Tensor] = {}
        if {"itc", "itm"} & set(objectives):
            with torch.set_grad_enabled(torch.is_grad_enabled() and "itc" in objectives):
                contrast = self._contrast(batch, rows, images, tokens, alpha)
            if "itc" in objectives:
                found["itc"] = contrast.loss
                detached["image_cosine"], detached["text_cosine"] = contrast.cosines
                detached["temperature"] = model.temperature.detach().float().clone()
            if "itm" in objectives:
                matching = self._match(batch, rows, tokens, cross, contrast, hardness)
                found["itm"] = matching.loss
                detached["itm_accuracy"] = matching.accuracy
                detached["itm_balanced_accuracy"] = matching.balanced_accuracy
        if "lm" in objectives:
            found["lm"] = self._write(batch, cross)
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

    def _near(self, rows: Rows) -> Rows:
        """The rows that a row is contrasted with, beside the queue."""
        if self.config.global_negatives:
            return rows
        return ALONE.rows(rows.counts[self.ranks.rank], rows.length)

    def _contrast(self, batch: Batch, rows: Rows, images: Tensor, tokens: Tensor, alpha: float) -> Contrast:
        model, towers, near = self.model, self.momentum, self._near(rows)
        image, text = model.embed_image(tokens), _embed_text(model, batch)
        image_m, text_m = image, text
        if towers is not None:
            with torch.no_grad():
                image_m, text_m = towers.embed_image(images), _embed_text(towers, batch)
        image_all, text_all = near.gather(image_m), near.gather(text_m)
        image_index, text_index = near.gather(batch.image_index), near.gather(batch.text_index)
        queued = self.queue.candidates()
        image_candidates = torch.cat([image_all, queued.image])
        text_candidates = torch.cat([text_all, queued.text])
        matches = positives(
            batch.image_index,
            batch.text_index,
            torch.cat([image_index, queued.image_index]),
            torch.cat([text_index, queued.text_index]),
            self.config.multi_positive,
            near.offset,
        )
        valid = None
        if self.queue.filled:
            valid = torch.cat([torch.ones_like(image_index, dtype=torch.bool), queued.valid])
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
            image,
            text,
            image_candidates,
            text_candidates,
            model.temperature,
            targets,
            valid,
            # The rows that a rank has on average, so that the mean over ranks is the mean over everyone's rows.
            rows.total / self.ranks.world,
        )
        with torch.no_grad():
            scores = (
                similarities(image, text_all, model.temperature),
                similarities(text, image_all, model.temperature),
            )
        if self.training and self.queue.size:
            if near is not rows:
                image_all, text_all = rows.gather(image_m.detach()), rows.gather(text_m.detach())
                image_index, text_index = rows.gather(batch.image_index), rows.gather(batch.text_index)
            self.queue.enqueue(image_all.detach(), text_all.detach(), image_index, text_index)
        return Contrast(loss, *scores, (mean_cosine(image), mean_cosine(text)))

    def _match(
        self,
        batch: Batch,
        rows: Rows,
        tokens: Tensor,
        cross: Sequence[Pair],
        contrast: Contrast,
        hardness: float,
    ) -> Matching:
        near = self._near(rows)
        candidates = near.gather(batch.image_index), near.gather(batch.text_index)

        def draw(scores: Tensor) -> tuple[Tensor, Tensor]:
            # Rank 0's draws for everyone: with the same random state it draws what one process would.
            uniform = near.ranks.first(torch.rand(near.total, 1).to(scores.device))
            return hard_negatives(
                hardness * scores, batch.image_index, batch.text_index, candidates, near.mine(uniform)
            )

        negative_text, found = draw(contrast.image_to_text)
        negative_image, _ = draw(contrast.text_to_image)
        ids, all_masks = near.gather_texts(batch.ids, batch.mask)
        if near.ranks.world > 1:
            theirs = self.model.prefill_cross(near.fetch(tokens, negative_image))
            cross = [
                (torch.cat([keys, more_keys]), torch.cat([values, more_values]))
                for (keys, values), (more_keys, more_values) in zip(cross, theirs, strict=True)
            ]
            negative_image = len(tokens) + torch.arange(len(tokens), device=tokens.device)
        pairs = matching_rows(negative_image, negative_text, found, near.offset)
        mask = all_masks[pairs.text]
        groups = length_chunks(mask)
        order = torch.cat([some for some, _ in groups])
        sizes = [len(some) for some, _ in groups]
        # Gathered once and split, not once per group: the gradient of a gather is as large as what was gathered from.
        image = pairs.image[order]
        gathered = [tuple(torch.split(each.index_select(0, image), sizes) for each in pair) for pair in cross]
        logits = [
            self.model.match_logits(
                ids[pairs.text[some], :length],
                mask[some, :length],
                [(keys[group], values[group]) for keys, values in gathered],
            )
            for group, (some, length) in enumerate(groups)
        ]
        return matching_loss(torch.cat(logits), pairs.label[order], pairs.keep[order], self.ranks)

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
