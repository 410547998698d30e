"""Optimal transport between two sets of tokens, by a proximal point method (IPOT, arXiv 1802.04307, algorithm 1).

How a text's words are matched with a picture's patches in ViLT's alignment loss (arXiv 2102.03334, sec. 3.2), as in UNITER's
(arXiv 1909.11740, sec. 3.2). What is done with the distance is `matching.py`'s.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from capfilt.models.common.layers import full_precision


def cosine_cost(left: Tensor, right: Tensor) -> Tensor:
    """1 - cosine of every token of `left` [B, M, D] with every one of `right` [B, N, D]: fp32 [B, M, N], in [0, 2]."""
    with full_precision(left):
        return 1.0 - F.normalize(left.float(), dim=-1) @ F.normalize(right.float(), dim=-1).transpose(1, 2)


@torch.no_grad()
def transport_plan(
    cost: Tensor, left: Tensor, right: Tensor, beta: float = 0.5, iterations: int = 50, inner: int = 1
) -> Tensor:
    """The plan fp32 [B, M, N] that moves equal masses on the left to equal masses on the right at the least `cost`.

    cost: [B, M, N]. left, right: bool [B, M] and [B, N], which tokens are there; the others give and take nothing. Each
    there has 1 / (their number); a plan of a side without tokens is 0. No gradient: the distance's is that of the cost
    under this plan (envelope theorem). The left sums are exact after every iteration, the right ones are on their way; with
    many iterations the plan is that of the exact linear programme.

    beta, iterations, inner: step size and counts (beta 0.5, 50 and 1: UNITER's and ViLT's code).
    """
    with full_precision(cost):
        there = left[:, :, None] & right[:, None, :]
        kernel = torch.exp(-cost.float() / beta) * there
        plan = there.float()
        # Both marginals, 0 where there is no token.
        rows = left / left.sum(dim=1, keepdim=True).clamp(min=1)
        columns = right / right.sum(dim=1, keepdim=True).clamp(min=1)
        by_row, by_column = rows, columns
        for _ in range(iterations):
            step = kernel * plan
            for _ in range(inner):
                by_column = _shares(columns, torch.einsum("bmn,bm->bn", step, by_row))
                by_row = _shares(rows, torch.einsum("bmn,bn->bm", step, by_column))
            plan = by_row[:, :, None] * step * by_column[:, None, :]
        return plan


def transport_distance(cost: Tensor, left: Tensor, right: Tensor, **options: float) -> Tensor:
    """fp32 [B]: the cost of `transport_plan`, with the gradient of the cost alone; arguments as there."""
    plan = transport_plan(cost.detach(), left, right, **options)  # type: ignore[arg-type]
    return (plan * cost.float()).sum(dim=(1, 2))


def _shares(mass: Tensor, moved: Tensor) -> Tensor:
    """mass / moved, 0 where there is no mass."""
    return torch.where(mass > 0, mass / moved.clamp(min=torch.finfo(moved.dtype).tiny), 0.0)
