"""The processes that train one model together: what a rank's loss needs of the other ranks' rows.

Alone, everything here is the identity and costs nothing. Not here: how processes find each other, how gradients are
averaged and weights split (`capfilt.training.distributed`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together.

    `group` is for what happens inside a loss, forward and backward. It is not the one that gradients are averaged in: two
    ranks may come to these calls and to an average in different order, which within one group would mix them up.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    def rows(self, count: int, length: int = 0) -> Rows:
        """How the ranks' rows lie, `count` of them here, of texts `length` tokens long. All ranks call it together."""
        if self.world == 1:
            return Rows((count,), length, self)
        device = "cuda" if dist.get_backend(self.group) == "nccl" else "cpu"
        mine = torch.tensor([count, length], device=device)
        found = self.stack(mine).tolist()
        return Rows(tuple(each for each, _ in found), max(each for _, each in found), self)

    def stack(self, mine: Tensor) -> Tensor:
        """[W, ...]: the tensor of every rank, all of one shape, without gradient."""
        if self.world == 1:
            return mine[None]
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine.contiguous(), group=self.group)
        return torch.stack(every)

    def mean(self, value: Tensor) -> Tensor:
        """The mean over ranks, fp32, without gradient."""
        mean = value.detach().float()
        if self.world > 1:
            mean = mean.clone()
            dist.all_reduce(mean, group=self.group)
            mean /= self.world
        return mean

    def share(self, count: Tensor) -> Tensor:
        """The mean of the ranks' counts, or sums of weights, fp32; 1 where nobody has any.

        Each rank divides the sum over its rows by it. The mean over ranks is then the mean over everyone's rows.
        """
        mean = self.mean(count)
        return torch.where(mean > 0, mean, 1.0)

    def first(self, value: Tensor) -> Tensor:
        """Rank 0's tensor."""
        if self.world > 1:
            value = value.contiguous()
            dist.broadcast(value, src=0, group=self.group)
        return value


ALONE = Ranks()


@dataclass(frozen=True)
class Rows:
    """A batch whose rows lie on several ranks: rank r has `counts[r]` of them, numbered on from rank to rank.

    The gradient of what one rank does with another's rows flows back there. Where every rank's loss is divided by
    `Ranks.share`, the average of their gradients is then that of one process with all rows.
    """

    counts: tuple[int, ...]
    length: int  # of the longest text of any rank, in tokens
    ranks: Ranks

    @property
    def offset(self) -> int:
        """The number of this rank's first row."""
        return sum(self.counts[: self.ranks.rank])

    @property
    def total(self) -> int:
        return sum(self.counts)

    def share(self, weight: Tensor | None = None) -> float | Tensor:
        """As `Ranks.share`, of these rows, or of the weights fp32 [n] of this rank's."""
        return self.total / self.ranks.world if weight is None else self.ranks.share(weight.sum())

    def mine(self, whole: Tensor) -> Tensor:
        """This rank's rows of [total, ...]."""
        return whole[self.offset : self.offset + self.counts[self.ranks.rank]]

    def gather(self, mine: Tensor) -> Tensor:
        """[n, ...] of each rank -> [total, ...]."""
        if self.ranks.world == 1:
            return mine
        whole: Tensor = _Gather.apply(mine, self)  # type: ignore[no-untyped-call]
        return whole

    def gather_read(self, dropped: Tensor | None) -> Tensor | None:
        """bool [total], which rows' texts count, of `Batch.dropped` of each rank; None of None."""
        return None if dropped is None else self.gather((~dropped).long()).bool()

    def gather_texts(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """ids int64 and mask bool [n, L] of each rank -> [total, `length`]; what is added is masked."""
        if self.ranks.world == 1:
            return ids, mask
        more = (0, self.length - ids.shape[1])
        # One exchange for both; bool tensors do not travel everywhere.
        both = self.gather(torch.stack([F.pad(ids, more), F.pad(mask, more).long()], dim=1))
        return both[:, 0], both[:, 1].bool()

    def fetch(self, mine: Tensor, index: Tensor) -> Tensor:
        """Rows `index` int64 [M] of the whole batch -> [M, ...]; each travels only to the rank that asks for it."""
        if self.ranks.world == 1:
            return mine[index]
        fetched: Tensor = _Fetch.apply(mine, index, self)  # type: ignore[no-untyped-call]
        return fetched


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, rows: Rows) -> Tensor:
        ctx.rows = rows
        longest = max(rows.counts)
        padded = mine.new_zeros((longest, *mine.shape[1:]))
        padded[: len(mine)] = mine
        every = rows.ranks.stack(padded)
        return torch.cat([each[:count] for each, count in zip(every, rows.counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.rows.ranks.group)
        return ctx.rows.mine(gradient), None


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, index: Tensor, rows: Rows) -> Tensor:
        rank, group = rows.ranks.rank, rows.ranks.group
        asked = rows.ranks.rows(len(index))
        wanted = asked.gather(index)
        ends = torch.tensor(list(itertools.accumulate(rows.counts)), device=index.device)
        owner = torch.searchsorted(ends, wanted, right=True)
        asker = torch.repeat_interleave(torch.arange(rows.ranks.world), torch.tensor(asked.counts)).to(
            index.device
        )
        served = owner == rank
        # How many rows go to whom and come from whom; the one look at the device.
        sizes = torch.stack(
            [
                torch.bincount(asker[served], minlength=rows.ranks.world),
                torch.bincount(asked.mine(owner), minlength=rows.ranks.world),
            ]
        ).tolist()
        ctx.sent, ctx.received = sizes
        ctx.group, ctx.count = group, len(mine)
        ctx.given = wanted[served] - rows.offset
        # They come ordered by who sends them, and within that as they were asked for.
        ctx.order = asked.mine(owner).argsort(stable=True)
        arrived = mine.new_empty((len(index), *mine.shape[1:]))
        dist.all_to_all_single(arrived, mine[ctx.given].contiguous(), ctx.received, ctx.sent, group=group)
        fetched = torch.empty_like(arrived)
        fetched[ctx.order] = arrived
        return fetched

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        back = gradient.new_empty((sum(ctx.sent), *gradient.shape[1:]))
        dist.all_to_all_single(
            back, gradient[ctx.order].contiguous(), ctx.sent, ctx.received, group=ctx.group
        )
        own = gradient.new_zeros((ctx.count, *gradient.shape[1:]))
        return own.index_add_(0, ctx.given, back), None, None
