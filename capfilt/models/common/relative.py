"""Biases of attention by relative position on a grid of patches with [CLS], as BEiT has them (arXiv 2106.08254, code).

Not here: the attention that adds a bias (`layers.py`), or which tower has one.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
Grid = tuple[int, int]
"""(rows, columns) of patches."""


@lru_cache(maxsize=64)
def grid_index(grid: Grid, device: torch.device) -> Tensor:
    """int64 [1+N, 1+N], query x key, [CLS] first: the row of a table that holds the bias of each pair of positions.

    Rows (dy + h - 1)(2w - 1) + dx + w - 1 for d = query - key, then [CLS] to patch, patch to [CLS], [CLS] to [CLS].
    """
    height, width = grid
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    apart = place[:, None] - place[None] + torch.tensor([height - 1, width - 1])
    last = offsets(grid)
    index = torch.full((len(place) + 1,) * 2, last)
    index[1:, 1:] = apart[..., 0] * (2 * width - 1) + apart[..., 1]
    index[1:, 0] = last + 1
    index[0, 0] = last + 2
    return index.to(device)


def offsets(grid: Grid) -> int:
    """How many differences there are between two places of a grid."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


class RelativePositions(nn.Module):
    """A module with a table of biases, `relative_position_bias_table` [rows, heads], zeros at first; or with none."""

    relative_position_bias_table: nn.Parameter | None
    grid: Grid | None

    def tabulate(self, grid: Grid | None, heads: int) -> None:
        """Makes the table for a grid; None: there is none."""
        self.grid = grid
        self.relative_position_bias_table = (
            None if grid is None else nn.Parameter(torch.zeros(offsets(grid) + 3, heads))
        )

    def relative_bias(self) -> Tensor | None:
        """[1, heads, 1+N, 1+N] for `attention`; None without a table."""
        table = self.relative_position_bias_table
        if table is None or self.grid is None:
            return None
        return table[grid_index(self.grid, table.device)].permute(2, 0, 1)[None]

    def resize(self, grid: Grid) -> None:
        """Takes another grid from now on; without a table nothing changes."""
        if self.relative_position_bias_table is not None and self.grid is not None:
            table = resized_table(self.relative_position_bias_table.detach(), self.grid, grid)
            self.relative_position_bias_table, self.grid = nn.Parameter(table), grid


class RelativePositionBias(RelativePositions):
    """A table that all blocks of a tower share: its output is their `bias`."""

    def __init__(self, grid: Grid, heads: int) -> None:
        super().__init__()
        self.tabulate(grid, heads)

    def forward(self) -> Tensor:
        """[1, heads, 1+N, 1+N]."""
        bias = self.relative_bias()
        assert bias is not None
        return bias


def resized_table(table: Tensor, grid: Grid, new: Grid) -> Tensor:
    """A table [rows, heads] for another grid, as BEiT's released code resizes one; rows after those of the grid stay.

    Old differences are spread in a geometric progression, so that near ones keep their values, and a cubic spline through them
    gives the new ones. The released code has squares only; here each side is spread for itself.
    """
    if grid == new:
        return table
    count = offsets(grid)
    values = table[:count].double().cpu().view(2 * grid[0] - 1, 2 * grid[1] - 1, -1)
    for side in (0, 1):
        values = _respaced(values.transpose(0, side), grid[side], new[side]).transpose(0, side)
    made = values.reshape(offsets(new), -1).to(table)
    return torch.cat([made, table[count:]])


def _respaced(values: Tensor, old: int, new: int) -> Tensor:
    """[2 old - 1, ...] -> [2 new - 1, ...]."""
    if old == new:
        return values
    if old == 1:
        return values.expand(2 * new - 1, *values.shape[1:])
    ratio = _ratio(old - 1, new - 1)
    far = np.cumsum(ratio ** np.arange(old - 1))
    known = np.concatenate([-far[::-1], [0.0], far])
    wanted = np.arange(1 - new, new).clip(known[0], known[-1])
    return torch.from_numpy(_spline(known, values.flatten(1).numpy(), wanted)).view(-1, *values.shape[1:])


def _spline(x: Array, y: Array, at: Array) -> Array:
    """The cubic spline through y [n, m] at x [n], not-a-knot as SciPy's, at other places; through 3 points the parabola.

    Written here: SciPy is none of what models run from.
    """
    count, steps = len(x), np.diff(x)
    if count < 4:
        return np.vander(at, count) @ np.linalg.solve(np.vander(x, count), y)
    slopes = np.diff(y, axis=0) / steps[:, None]
    system, wanted = np.zeros((count, count)), np.zeros_like(y)
    for i in range(1, count - 1):
        system[i, i - 1 : i + 2] = steps[i - 1], 2 * (steps[i - 1] + steps[i]), steps[i]
        wanted[i] = 6 * (slopes[i] - slopes[i - 1])
    # The third derivative does not jump at the second place, nor at the last but one.
    system[0, :3] = steps[1], -(steps[0] + steps[1]), steps[0]
    system[-1, -3:] = steps[-1], -(steps[-2] + steps[-1]), steps[-2]
    bends = np.linalg.solve(system, wanted)
    piece = np.clip(np.searchsorted(x, at) - 1, 0, count - 2)
    left, right, step = (at - x[piece])[:, None], (x[piece + 1] - at)[:, None], steps[piece][:, None]
    cubic = (bends[piece] * right**3 + bends[piece + 1] * left**3) / (6 * step)
    first = y[piece] / step - bends[piece] * step / 6
    last = y[piece + 1] / step - bends[piece + 1] * step / 6
    found: Array = cubic + first * right + last * left
    return found


def _ratio(count: int, reach: int) -> float:
    """The ratio, from 1.01 to 1.5, at which 1 + r + ... (`count` terms) is `reach`; to 1e-6, as released."""
    low, middle, high = 1.01, 1.5, 1.5
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (low, middle) if (1 - middle**count) / (1 - middle) > reach else (middle, high)
    return middle
