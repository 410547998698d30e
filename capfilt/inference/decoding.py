"""The captioner's loops: sampling or taking the best token row by row, and beam search. Tokens in, tokens out.

Images, strings, seeds and batches are captioner.py's. An image's cross-attention keys and values, and those of its prompt,
are computed once and shared by all of its rows; self-attention's go into a static cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from capfilt.inference.sampling import draw, penalise_repetition
from capfilt.models.common.layers import Pair
from capfilt.models.common.text import SelfCache

IMPOSSIBLE = -1.0e9
TRANSFORMERS, RELEASED = "transformers", "released"
BEAM_RULES = (TRANSFORMERS, RELEASED)
"""How beam search counts a text's length and when it stops: as today's transformers, or as BLIP's released code."""


class Writes(Protocol):
    """What the loops need of a model: `Blip` has it, and so has `Answering.writer`."""

    def new_cache(self, ways: int, max_length: int, cross: Sequence[Pair]) -> SelfCache:
        """A self-attention cache for `ways` texts of at most `max_length` tokens per image in `cross`."""

    def decode(self, ids: Tensor, cache: SelfCache, cross: Sequence[Pair]) -> Tensor:
        """fp32 logits [R, V] of the token after `ids` int64 [R, T]; updates the cache."""


@dataclass(frozen=True)
class Limits:
    """Limits of every method. Neither length counts the prompt; the longest counts the closing [SEP], the shortest does
    not: a text has at least `min_new_tokens` tokens before it.
    """

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
    device, images = prompt.device, len(cross[0][0])
    ways = rows // images
    cache = model.new_cache(ways, len(prompt) + limits.max_new_tokens, cross)
    written = torch.full((rows, limits.max_new_tokens), limits.pad_id, dtype=torch.int64, device=device)
    logprob = torch.zeros(rows, device=device)
    # Which rows of the result are still worked on.
    live = torch.arange(rows, device=device)
    open_rows = torch.ones(rows, dtype=torch.bool, device=device)
    logits = model.decode(prompt.expand(images, -1), cache, cross).repeat_interleave(ways, 0)
    for step in range(limits.max_new_tokens):
        scores = _restrict(logits, prompt, written[live, :step], step, limits)
        if uniform is None:
            token = scores.argmax(-1)
        else:
            token = draw(scores, uniform[live, step], top_p, top_k, temperature)
        own = torch.log_softmax(logits, dim=-1).gather(1, token[:, None])[:, 0]
        logprob[live] += torch.where(open_rows, own, torch.zeros_like(own))
        written[live, step] = torch.where(open_rows, token, torch.full_like(token, limits.pad_id))
        open_rows = open_rows & (token != limits.sep_id)
        if step + 1 == limits.max_new_tokens or not bool(open_rows.any()):
            break
        kept = _worth_keeping(open_rows.view(-1, ways).any(1))
        if kept is not None:
            cache.keep(kept)
            cross = [(keys[kept], values[kept]) for keys, values in cross]
            rows_kept = (kept[:, None] * ways + torch.arange(ways, device=device)).view(-1)
            live, open_rows, token = live[rows_kept], open_rows[rows_kept], token[rows_kept]
        logits = model.decode(token[:, None], cache, cross)
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
    rule: str = TRANSFORMERS,
) -> Decoded:
    """The `keep` best texts of every image, best first: rows i * keep .. i * keep + keep - 1 of the result.

    A text's score is its sum of log probabilities over length ** length_penalty; only the `beams` best continuations of a
    step may finish. `rule` is one of BEAM_RULES:

    "transformers", its `generate(num_beams=..., early_stopping=False)`: a length counts new tokens with [SEP]. An image is
    done when it has `beams` texts and its best open beam, scored at its present length, is no better than the worst.
    With a positive penalty a longer text could still win, so that rule may stop too early: `exact_stop` scores the open
    beam at the greatest length instead (transformers' "never").

    "released", what BLIP's released code does with its transformers, 4.15: a length counts the prompt and not [SEP]. An image
    is done when it has `beams` texts and the step's best continuation, an ending one too, scored at the length before it,
    is no better than the worst. At the greatest length all open beams are texts, and all that do not end compete.
    """
    device, width = prompt.device, limits.max_new_tokens
    # Twice as many continuations as beams: should the best `beams` all end here, as many are left to go on.
    wide = 2 * beams
    cache = model.new_cache(beams, len(prompt) + width, cross)
    open_tokens = torch.full((images, beams, width), limits.pad_id, dtype=torch.int64, device=device)
    open_scores = torch.zeros(images, beams, device=device)
    open_scores[:, 1:] = IMPOSSIBLE  # at first all beams are the same text
    open_logprob = torch.zeros(images, beams, device=device)
    best = _Texts(
        torch.full((images, beams), IMPOSSIBLE, device=device),
        open_tokens.clone(),
        torch.zeros(images, beams, device=device),
    )
    hopeful = torch.ones(images, 1, dtype=torch.bool, device=device)
    may_finish = torch.arange(wide, device=device)[None] < beams
    # Which images are still worked on, and what the others came to.
    live = torch.arange(images, device=device)
    found_tokens, found_logprob = best.tokens.clone(), best.logprob.clone()
    logits = model.decode(prompt.expand(images, -1), cache, cross).repeat_interleave(beams, 0)
    for step in range(width):
        own = torch.log_softmax(logits, dim=-1)
        scores = _restrict(own, prompt, open_tokens.view(-1, width)[:, :step], step, limits)
        vocabulary = scores.shape[1]
        total = (scores.view(-1, beams, vocabulary) + open_scores[:, :, None]).flatten(1)
        found = total.topk(min(wide, total.shape[1]), dim=-1)
        beam, token = found.indices // vocabulary, found.indices % vocabulary
        logprob = open_logprob.gather(1, beam) + own.view(len(total), -1).gather(1, found.indices)
        tokens = open_tokens.gather(1, beam[:, :, None].expand(-1, -1, width)).clone()
        tokens[:, :, step] = token
        last, released = step + 1 == width, rule == RELEASED
        ended = torch.ones_like(token, dtype=torch.bool) if last and not released else token == limits.sep_id

        finished = ended & may_finish[:, : ended.shape[1]] & hopeful
        length = len(prompt) + step if released else step + 1
        best = _better(best, _Texts(found.values, tokens, logprob), finished, length**length_penalty)

        open_scores, order = torch.where(ended, IMPOSSIBLE, found.values).topk(beams, dim=-1)
        open_tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
        open_logprob = logprob.gather(1, order)
        if exact_stop and length_penalty > 0:
            length = width
        reachable = (found.values if released else open_scores)[:, :1] / length**length_penalty
        hopeful = hopeful & (reachable > best.scores[:, -1:])
        if last and released:
            best = _better(
                best,
                _Texts(open_scores, open_tokens, open_logprob),
                hopeful.expand(-1, beams),
                (len(prompt) + width) ** length_penalty,
            )
        if last or not bool(hopeful.any()):
            break
        cache.reorder(beam.gather(1, order))
        kept = _worth_keeping(hopeful[:, 0])
        if kept is not None:
            found_tokens[live], found_logprob[live] = best.tokens, best.logprob
            cache.keep(kept)
            cross = [(keys[kept], values[kept]) for keys, values in cross]
            live, hopeful = live[kept], hopeful[kept]
            open_tokens, open_scores, open_logprob = open_tokens[kept], open_scores[kept], open_logprob[kept]
            best = _Texts(*(each[kept] for each in best))
        logits = model.decode(open_tokens[:, :, step].reshape(-1, 1), cache, cross)
    found_tokens[live], found_logprob[live] = best.tokens, best.logprob
    return Decoded(found_tokens[:, :keep].reshape(images * keep, width), found_logprob[:, :keep].reshape(-1))


class _Texts(NamedTuple):
    """Some texts per image: scores fp32 [B, N], tokens int64 [B, N, T], log probabilities fp32 [B, N]."""

    scores: Tensor
    tokens: Tensor
    logprob: Tensor


def _better(best: _Texts, texts: _Texts, finished: Tensor, divisor: float) -> _Texts:
    """As many as before: the best of `best` and of those `texts` that are `finished` (bool [B, N]), their scores divided."""
    scores = torch.where(finished, texts.scores / divisor, IMPOSSIBLE)
    kept, order = torch.cat([best.scores, scores], dim=1).topk(best.scores.shape[1], dim=-1)
    tokens = torch.cat([best.tokens, texts.tokens], dim=1)
    logprob = torch.cat([best.logprob, texts.logprob], dim=1)
    return _Texts(
        kept, tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2])), logprob.gather(1, order)
    )


def _worth_keeping(going: Tensor) -> Tensor | None:
    """Which images (int64) to go on with when only those in `going` (bool [B]) have a text that has not ended; None: all.

    At half of them or fewer, what a step saves soon exceeds what copying the rest's keys and values costs. On a GPU all
    stay: a step's time hardly depends on its rows there, and a step recorded as a graph has a fixed shape.
    """
    if going.device.type != "cpu" or 2 * int(going.sum()) > len(going):
        return None
    return going.nonzero()[:, 0]


def _restrict(scores: Tensor, prompt: Tensor, written: Tensor, step: int, limits: Limits) -> Tensor:
    """Scores [R, V] with the repetition penalty, and without [SEP] while the text is too short."""
    if limits.repetition_penalty != 1.0:
        previous = torch.cat([prompt.expand(len(written), -1), written], dim=1)
        scores = penalise_repetition(scores, previous, limits.repetition_penalty)
    if step < limits.min_new_tokens:
        scores = scores.clone()
        scores[:, limits.sep_id] = float("-inf")
    return scores
