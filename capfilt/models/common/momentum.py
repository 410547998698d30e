"""What BLIP and ALBEF learn alike: images and texts aligned by contrast, with a queue and momentum towers, and pairs told
from mismatched ones by hard negatives; alone or over several ranks.

Not here: the losses by themselves (`objectives.py`), and what else each learns (`pretraining.py`, `albef_pretraining.py`).
Sources: ALBEF, arXiv 2107.07651, sec. 3.2-3.3; BLIP, arXiv 2201.12086, sec. 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from capfilt.data.loader import Batch
from capfilt.errors import UserError
from capfilt.models.common.layers import Pair
from capfilt.models.common.objectives import (
    FeatureQueue,
    Matching,
    both,
    contrastive_loss,
    contrastive_targets,
    ema_update,
    hard_negatives,
    matching_loss,
    matching_rows,
    mean_cosine,
    positives,
    scaled_momentum,
    similarities,
    soft_target_loss,
    stand_ins,
)
from capfilt.models.common.ranks import ALONE, Ranks, Rows

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
class AlignmentConfig:
    """Which losses, and the constants of contrast and matching: BLIP's, where the two papers differ."""

    known: ClassVar[tuple[str, ...]] = ("itc", "itm")

    objectives: tuple[str, ...] = ("itc", "itm")
    weights: Mapping[str, float] = field(default_factory=dict)
    """Factor per objective; 1 where not named (BLIP, arXiv 2201.12086, sec. 3.2, and ALBEF, sec. 3.2: the plain sum)."""
    queue_size: int = 57600
    """Past pairs kept as ITC candidates (BLIP, released pretraining configuration); 0: the batch alone."""
    momentum: float | None = 0.995
    """EMA of the momentum towers (ALBEF, arXiv 2107.07651, sec. 4). None: no towers; the candidates are the live
    embeddings and there are no soft targets, for half the cost of a small step."""
    multi_positive: bool = True
    """Candidates of the same image or with the identical text are positives; False is the papers' pretraining."""
    negative_floor: float = 1e-4
    """The number added to every candidate's probability to be ITM's negative (BLIP, released pretraining)."""
    own_negatives: bool = False
    """Whether ITM's negatives are drawn by the similarities of the model's own embeddings (BLIP, released retrieval), and not
    of its embeddings with the momentum towers' (the released pretrainings, and ALBEF's retrieval)."""
    global_negatives: bool = True
    """Where several ranks train together: whether ITC and ITM draw on the whole batch, as one process would, or on each
    rank's own rows (and the queue, which is everyone's), as the released pretrainings do."""
    temperature_range: tuple[float, float] = (0.001, 0.5)
    """The learned temperature is clamped to this in place before every step (ALBEF and BLIP, released code)."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.objectives) - set(self.known))
        if unknown or not self.objectives:
            raise UserError(
                f"objectives {list(self.objectives)}: name at least one of {', '.join(self.known)}"
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


Embeds = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]
"""Unit vectors [B, E] of a batch's images and texts: the model's, and those of its momentum towers."""


class Contrast(NamedTuple):
    """ITC's results: `loss` in nats with a gradient, and without one the batch's own similarities [B, B] and the mean
    cosines of its image and text embeddings.
    """

    loss: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    cosines: tuple[Tensor, Tensor]


def followed(towers: nn.Module, model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """(the towers' parameters, those of the model they follow: of the same names); a frozen one never moves and is left
    out.
    """
    live = dict(model.named_parameters(remove_duplicate=False))
    mine = {name: each for name, each in towers.named_parameters() if live[name].requires_grad}
    return list(mine.values()), [live[name] for name in mine]


class Alignment(nn.Module):
    """A model with what its training needs and its use does not: momentum towers and the queue.

    What inherits it has `losses`, of which `_aligned` gives ITC and ITM. The model has a vision tower, a temperature and
    `prefill_cross`; `momentum` has the vision tower too, and gets no gradient.
    """

    def __init__(
        self, model: Any, config: AlignmentConfig, ranks: Ranks, momentum: Callable[[], nn.Module]
    ) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.ranks = ranks
        contrastive = "itc" in config.objectives
        self.momentum: Any = momentum() if contrastive and config.momentum is not None else None
        self.queue = FeatureQueue(
            config.queue_size if "itc" in config.objectives else 0, model.config.embed_dim
        )
        self._bound()

    @property
    def leaves_unused(self) -> bool:
        """Whether some of the model's parameters get no gradient from these objectives."""
        return set(self.config.objectives) != set(self.config.known)

    def blocks(self) -> list[nn.Module]:
        """What is run as a whole, once per pass, and so can have its weights gathered just then."""
        towers = [self.model.visual_encoder]
        if self.momentum is not None:
            towers.append(self.momentum.visual_encoder)
        return [block for tower in towers for block in tower.blocks]

    def after_step(self) -> None:
        """After a step that moved the weights: clamp the temperature and move the momentum towers."""
        self._bound()
        if self.momentum is not None and self.config.momentum is not None:
            ema_update(*followed(self.momentum, self.model), self.config.momentum)

    @torch.no_grad()
    def _bound(self) -> None:
        if {"itc", "itm"} & set(self.config.objectives):
            self.model.temperature.clamp_(*self.config.temperature_range)

    @property
    def settled(self) -> bool:
        """Whether the queue is full: until then ITC has ever more candidates, and its loss rises with them."""
        return self.queue.filled == self.queue.size

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
        if self.momentum is None:
            return batch.images
        # Both towers hold the same frozen trunk.
        found: Tensor = self.model.visual_encoder.seen_once(batch.images)
        return found

    def _near(self, rows: Rows) -> Rows:
        """The rows that a row is contrasted with, beside the queue."""
        if self.config.global_negatives:
            return rows
        return ALONE.rows(rows.counts[self.ranks.rank], rows.length)

    def _weighed(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.config.weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()

    def _aligned(
        self,
        batch: Batch,
        rows: Rows,
        tokens: Tensor,
        cross: Sequence[Pair],
        alpha: float,
        hardness: float,
        embeds: Callable[[], Embeds],
        texts: Callable[[Rows], tuple[Tensor, Tensor]],
        logits: Callable[[Tensor, Tensor, Sequence[Pair]], Tensor],
        embed_text: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(losses with a gradient, figures without) of "itc" and "itm", those that are configured.

        cross: `prefill_cross` of the rows' image tokens. texts: gives (texts [N, L, ...], mask bool [N, L]) of all N rows
        that a row is contrasted with. logits: fp32 [R, 2] of R such texts, their mask, and as many images' keys and values.
        embed_text: unit vectors of ids and mask, for soft targets (`Batch.soft`).
        """
        objectives = self.config.objectives
        losses: dict[str, Tensor] = {}
        figures: dict[str, Tensor] = {}
        if not {"itc", "itm"} & set(objectives):
            return losses, figures
        with torch.set_grad_enabled(torch.is_grad_enabled() and "itc" in objectives):
            contrast = self._contrast(batch, rows, *embeds(), alpha, embed_text)
        if "itc" in objectives:
            losses["itc"] = contrast.loss
            figures["image_cosine"], figures["text_cosine"] = contrast.cosines
            figures["temperature"] = self.model.temperature.detach().float().clone()
        if "itm" in objectives:
            matching = self._match(batch, rows, tokens, cross, contrast, hardness, texts, logits)
            losses["itm"] = matching.loss
            figures["itm_accuracy"] = matching.accuracy
            figures["itm_balanced_accuracy"] = matching.balanced_accuracy
        return losses, figures

    def _contrast(
        self,
        batch: Batch,
        rows: Rows,
        embeds: tuple[Tensor, Tensor],
        momentum_embeds: tuple[Tensor, Tensor] | None,
        alpha: float,
        embed_text: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Contrast:
        """ITC of the rows' image and text embeddings, against those of the towers (None: against themselves)."""
        (image, text), near = embeds, self._near(rows)
        temperature = self.model.temperature
        image_m, text_m = embeds if momentum_embeds is None else momentum_embeds
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
        read, valid, legible = near.gather_read(batch.dropped), None, None
        if self.queue.filled:
            valid = torch.cat([torch.ones_like(image_index, dtype=torch.bool), queued.valid])
        if read is not None:
            legible = torch.cat([read, queued.valid])
        with torch.no_grad():
            image_to_text = text_to_image = None
            if momentum_embeds is not None and alpha > 0.0:
                image_to_text = similarities(image_m, text_candidates, temperature)
                text_to_image = similarities(text_m, image_candidates, temperature)
            targets = (
                contrastive_targets(matches, alpha, image_to_text, both(valid, legible)),
                contrastive_targets(matches, alpha, text_to_image, valid),
            )
        share = rows.share(batch.weight)
        loss = contrastive_loss(
            image,
            text,
            image_candidates,
            text_candidates,
            temperature,
            targets,
            valid,
            share,
            batch.weight,
            legible,
        )
        if batch.soft is not None:
            assert embed_text is not None
            index, stood = stand_ins(batch, self, embed_text)
            loss = loss + soft_target_loss(
                *(image[index], stood, image_all, text_all, temperature, batch.soft[index]),
                *(share, read),
            )
        with torch.no_grad():
            own = self.config.own_negatives and momentum_embeds is not None
            drawn = (
                (near.gather(image.detach()), near.gather(text.detach())) if own else (image_all, text_all)
            )
            scores = (
                similarities(image, drawn[1], temperature),
                similarities(text, drawn[0], temperature),
            )
        if self.training and self.queue.size:
            if near is not rows:
                image_all, text_all = rows.gather(image_m.detach()), rows.gather(text_m.detach())
                image_index, text_index = rows.gather(batch.image_index), rows.gather(batch.text_index)
                read = rows.gather_read(batch.dropped)
            entries = (image_all.detach(), text_all.detach(), image_index, text_index)
            self.queue.enqueue(*(entries if read is None else (each[read] for each in entries)))
        return Contrast(loss, *scores, (mean_cosine(image), mean_cosine(text)))

    def _match(
        self,
        batch: Batch,
        rows: Rows,
        tokens: Tensor,
        cross: Sequence[Pair],
        contrast: Contrast,
        hardness: float,
        texts: Callable[[Rows], tuple[Tensor, Tensor]],
        logits: Callable[[Tensor, Tensor, Sequence[Pair]], Tensor],
    ) -> Matching:
        """ITM of the rows and their hard negatives; see `_aligned`."""
        near = self._near(rows)
        candidates = near.gather(batch.image_index), near.gather(batch.text_index)
        read = near.gather_read(batch.dropped)

        def draw(scores: Tensor) -> tuple[Tensor, Tensor]:
            # Rank 0's draws for everyone: with the same random state it draws what one process would.
            uniform = near.mine(near.ranks.first(torch.rand(near.total, 1).to(scores.device)))
            index = batch.image_index, batch.text_index
            floor = self.config.negative_floor
            return hard_negatives(hardness * scores, *index, candidates, uniform, floor=floor, read=read)

        negative_text, found = draw(contrast.image_to_text)
        negative_image, _ = draw(contrast.text_to_image)
        everyones, all_masks = texts(near)
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
        found_logits = [
            logits(
                everyones[pairs.text[some], :length],
                mask[some, :length],
                [(keys[group], values[group]) for keys, values in gathered],
            )
            for group, (some, length) in enumerate(groups)
        ]
        weight = None if batch.weight is None else batch.weight.repeat(3)[order]
        return matching_loss(
            torch.cat(found_logits), pairs.label[order], pairs.keep[order], self.ranks, weight
        )


def told(options: Any) -> dict[str, Any]:
    """The fields of an `AlignmentConfig` that options (`MomentumOptions`) decide."""
    momentum: float | None = options.momentum or None
    if options.momentum_batch_size and momentum:
        momentum = scaled_momentum(momentum, options.batch_size, options.momentum_batch_size)
    return {
        "queue_size": options.queue_size,
        "momentum": momentum,
        "multi_positive": options.multi_positive,
        "global_negatives": options.global_negatives,
    }
