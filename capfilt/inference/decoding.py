"""The captioner's loops: sampling or taking the best token row by row, and beam search. Tokens in, tokens out.

Images, strings, seeds and batches are captioner.py's. An image's cross-attention keys and values are computed once and
shared by all of its rows; self-attention's go into a static cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from capfilt.inference.sampling import draw, penalise_repetition
from capfilt.models.layers import Pair
from capfilt.models.text import SelfCache

IMPOSSIBLE = -1.0e9


class Writes(Protocol):
    """What the loops need of a model: `Blip` has it, and so has `BlipVqa.writer`."""

    def new_cache(self, rows: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """A self-attention cache for `rows` texts of at most `max_length` tokens."""

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """fp32 logits [R, V] of the token after `ids` int64 [R, T]; updates the cache."""


@dataclass(frozen=True)
class Limits:
    """What holds for every method; lengths count new tokens, the closing [SEP] included, the prompt not."""

    sep_id: int
    pad_id: int
    max_new_tokens: int
    min_new_tokens: int
    repetition_penalty: float


@dataclass(frozen=True)
class Decoded:
    """tokens int64 [R, T], padded after [SEP]; logprob fp32 [R]: sum over them under the model's own distribution."""

    tokens: Tensor
    logprob: Tensor


def sample(
    model: Writes,
    cross: Sequence[Pair],
    prompt: Tensor,
    rows: int,
    limits: Limits,
    uniform: Tensor | None = None,
    top_p: float = 0.9,
    top_k: int = 0,
    temperature: float = 1.0,
) -> Decoded:
    """Writes `rows` texts after `prompt` int64 [P], rows / images of them per image in `cross`.

    uniform: float64 [rows, max_new_tokens] for sampling, None for the most likely token each time.
    """
    device = prompt.device
    ids = prompt.expand(rows, -1)
    cache = model.new_cache(rows, ids.shape[1] + limits.max_new_tokens, cross)
    written = torch.full((rows, limits.max_new_tokens), limits.pad_id, dtype=torch.int64, device=device)
    logprob = torch.zeros(rows, device=device)
    open_rows = torch.ones(rows, dtype=torch.bool, device=device)
    step_ids = ids
    for step in range(limits.max_new_tokens):
        logits = model.decode(step_ids, cache, cross)
        scores = _restrict(logits, torch.cat([ids, written[:, :step]], dim=1), step, limits)
        if uniform is None:
            token = scores.argmax(-1)
        else:
            token = draw(scores, uniform[:, step], top_p, top_k, temperature)
        own = torch.log_softmax(logits, dim=-1).gather(1, token[:, None])[:, 0]
        logprob += torch.where(open_rows, own, torch.zeros_like(own))
        written[:, step] = torch.where(open_rows, token, torch.full_like(token, limits.pad_id))
        open_rows = open_rows & (token != limits.sep_id)
        if not bool(open_rows.any()):
            break
        step_ids = token[:, None]
    return Decoded(written, logprob)


def beam_search(
    model: Writes,
    cross: Sequence[Pair],
    prompt: Tensor,
    images: int,
    limits: Limits,
    beams: int,
    keep: int = 1,
    length_penalty: float = 1.0,
    exact_stop: bool = False,
) -> Decoded:
    """The `keep` best texts of every image, best first: rows i * keep .. i * keep + keep - 1 of the result.

    Semantics of transformers' `generate(num_beams=..., early_stopping=False)`: a text's score is its sum of log
    probabilities over (number of new tokens, [SEP] included) ** length_penalty; only the `beams` best continuations of
    a step may finish; an image is done when it has `beams` texts and the best open beam, scored at its present length,
    is no better than the worst of them. With a positive penalty a longer text could still win, so that rule may stop
    too early: `exact_stop` scores the open beam at the greatest length instead (transformers' "never").
    """
    device, width = prompt.device, limits.max_new_tokens
    # Twice as many continuations as beams: should the best `beams` all end here, as many are left to go on.
    wide = 2 * beams
    rows = images * beams
    ids = prompt.expand(rows, -1)
    cache = model.new_cache(rows, ids.shape[1] + width, cross)
    open_tokens = torch.full((images, beams, width), limits.pad_id, dtype=torch.int64, device=device)
    open_scores = torch.zeros(images, beams, device=device)
    open_scores[:, 1:] = IMPOSSIBLE  # at first all beams are the same text
    open_logprob = torch.zeros(images, beams, device=device)
    best_tokens = open_tokens.clone()
    best_scores = torch.full((images, beams), IMPOSSIBLE, device=device)
    best_logprob = torch.zeros(images, beams, device=device)
    hopeful = torch.ones(images, 1, dtype=torch.bool, device=device)
    may_finish = torch.arange(wide, device=device)[None] < beams
    step_ids = ids
    for step in range(width):
        logits = model.decode(step_ids, cache, cross)
        own = torch.log_softmax(logits, dim=-1)
        scores = _restrict(
            own, torch.cat([ids, open_tokens.view(rows, width)[:, :step]], dim=1), step, limits
        )
        vocabulary = scores.shape[1]
        total = (scores.view(images, beams, vocabulary) + open_scores[:, :, None]).view(images, -1)
        found = total.topk(min(wide, total.shape[1]), dim=-1)
        beam, token = found.indices // vocabulary, found.indices % vocabulary
        logprob = open_logprob.gather(1, beam) + own.view(images, -1).gather(1, found.indices)
        tokens = open_tokens.gather(1, beam[:, :, None].expand(-1, -1, width)).clone()
        tokens[:, :, step] = token
        ended = (token == limits.sep_id) if step + 1 < width else torch.ones_like(token, dtype=torch.bool)

        finished = ended & may_finish[:, : ended.shape[1]] & hopeful
        final = torch.where(finished, found.values / (step + 1) ** length_penalty, IMPOSSIBLE)
        best_scores, order = torch.cat([best_scores, final], dim=1).topk(beams, dim=-1)
        best_tokens = torch.cat([best_tokens, tokens], dim=1).gather(
            1, order[:, :, None].expand(-1, -1, width)
        )
        best_logprob = torch.cat([best_logprob, logprob], dim=1).gather(1, order)

        open_scores, order = torch.where(ended, IMPOSSIBLE, found.values).topk(beams, dim=-1)
        open_tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
        open_logprob = logprob.gather(1, order)
        length = width if exact_stop and length_penalty > 0 else step + 1
        reachable = open_scores[:, :1] / length**length_penalty
        hopeful = hopeful & (reachable > best_scores[:, -1:])
        if step + 1 == width or not bool(hopeful.any()):
            break
        first_row = torch.arange(images, device=device)[:, None] * beams
        cache.reorder((beam.gather(1, order) + first_row).view(-1))
        step_ids = open_tokens[:, :, step].reshape(rows, 1)
    return Decoded(best_tokens[:, :keep].reshape(images * keep, width), best_logprob[:, :keep].reshape(-1))


def _restrict(scores: Tensor, previous: Tensor, step: int, limits: Limits) -> Tensor:
    """Scores [R, V] with the repetition penalty, and without [SEP] while the text is too short."""
    if limits.repetition_penalty != 1.0:
        scores = penalise_repetition(scores, previous, limits.repetition_penalty)
    if step < limits.min_new_tokens:
        scores = scores.clone()
        scores[:, limits.sep_id] = float("-inf")
    return scores
