"""One step of choosing a token: penalties, the nucleus, and draws that belong to a text rather than to a batch.

The loops over steps live in decoding.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SHORTLISTS = (64, 512)
"""So many of the likeliest tokens are sorted; all, where a nucleus is longer still. Sorting 30,524 is slow, and what a trained
model's nucleus of 0.9 holds is hardly ever more than the first."""


def uniforms(seed: int, keys: Sequence[str], samples: int, steps: int) -> Tensor:
    """float64 [len(keys) * samples, steps] in [0, 1): row i * samples + k depends on (seed, keys[i], k) alone.

    So a text's draws are the same in whatever batch, order or process it is written. One Philox stream per row, keyed
    by a hash; step t of a row is the t-th number of its stream, however many steps are asked for.
    """
    rows = np.empty((len(keys) * samples, steps))
    for index, key in enumerate(keys):
        name = key.encode("utf-8", "surrogatepass")
        for sample in range(samples):
            digest = hashlib.blake2b(f"{seed}:{sample}:".encode() + name, digest_size=16).digest()
            stream = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
            rows[index * samples + sample] = stream.random(steps)
    return torch.from_numpy(rows)


def penalise_repetition(scores: Tensor, previous: Tensor, penalty: float) -> Tensor:
    """Scores [R, V] with those of tokens in `previous` [R, T] divided by the penalty if positive, else multiplied.

    CTRL, arXiv 1909.05858, sec. 4.1, with the sign fix every implementation has; the prompt counts as previous.
    """
    seen = scores.gather(1, previous)
    seen = torch.where(seen < 0, seen * penalty, seen / penalty)
    return scores.scatter(1, previous, seen)


def draw(logits: Tensor, uniform: Tensor, top_p: float, top_k: int, temperature: float) -> Tensor:
    """Tokens int64 [R] of fp32 logits [R, V] by inverse CDF at `uniform` float64 [R].

    The nucleus (arXiv 1904.09751, sec. 3.1) is the smallest set of most likely tokens with mass >= top_p; it is
    renormalised and laid out from most to least likely. top_k 0 means no limit by count. A row's token depends on that
    row alone.
    """
    probabilities = torch.softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)
    vocabulary = logits.shape[1]
    if top_k:
        chosen = probabilities.topk(min(top_k, vocabulary), dim=-1)
        total = chosen.values.double().sum(-1, keepdim=True)
        return _inverse_cdf(chosen.values.double() / total, chosen.indices, uniform, top_p)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    rows = torch.arange(len(logits), device=logits.device)
    # Decided row by row: a row must not be drawn differently because a neighbour's nucleus is long.
    for width in (*(each for each in SHORTLISTS if each < vocabulary), vocabulary):
        if width < vocabulary:
            likely, order = probabilities.topk(width, dim=-1)
        else:
            likely, order = probabilities.sort(dim=-1, descending=True, stable=True)
        tokens[rows] = _inverse_cdf(likely.double(), order, uniform, top_p)
        if width == vocabulary:
            break
        long = likely.double().sum(-1) < top_p
        if not bool(long.any()):
            break
        rows, probabilities, uniform = rows[long], probabilities[long], uniform[long]
    return tokens


def _inverse_cdf(sorted_probabilities: Tensor, tokens: Tensor, uniform: Tensor, top_p: float) -> Tensor:
    """Rows of descending probabilities (of the whole distribution) and their tokens -> the drawn tokens [R]."""
    cumulative = sorted_probabilities.cumsum(-1)
    # A token is in the nucleus while the mass before it is below top_p; the first always is.
    size = ((cumulative - sorted_probabilities) < top_p).sum(-1, keepdim=True).clamp_min(1)
    mass = cumulative.gather(1, size - 1)
    position = torch.searchsorted(cumulative, uniform[:, None] * mass, right=True)
    return tokens.gather(1, torch.minimum(position, size - 1))[:, 0]
