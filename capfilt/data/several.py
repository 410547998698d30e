"""Rows of several kinds in one training: each step has a batch of each kind.

Not here: the rows of one kind (`pairs.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from capfilt.data.loader import Batch
from capfilt.data.pairs import Pairs
from capfilt.data.tokenizer import Encodes


@dataclass
class StepBatch:
    """The batches of one step, by the kind of their rows; a `Batch` to those who move, split and count it.

    Attributes:
        of: the batches.
        first: the number that the first row of each kind has among all rows.
    """

    of: Mapping[str, Batch]
    first: Mapping[str, int]
    weight = None

    def __getitem__(self, rows: str) -> Batch:
        return self.of[rows]

    def __len__(self) -> int:
        return sum(map(len, self.of.values()))

    @property
    def example(self) -> Tensor:
        """int64 [B], the number of each row among the rows of all kinds."""
        return torch.cat([batch.example + self.first[rows] for rows, batch in self.of.items()])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> StepBatch:
        """The same with every tensor on `device`."""
        return self._each(lambda batch: batch.to(device, non_blocking=non_blocking))

    def split(self, parts: int) -> list[StepBatch]:
        """The same rows in order, in at most `parts` parts which all have rows of each kind."""
        parts = min(parts, *map(len, self.of.values()))
        split = [batch.split(parts) for batch in self.of.values()]
        return [
            StepBatch(dict(zip(self.of, some, strict=True)), self.first) for some in zip(*split, strict=True)
        ]

    def _each(self, change: Callable[[Batch], Batch]) -> StepBatch:
        return StepBatch({rows: change(batch) for rows, batch in self.of.items()}, self.first)


class Several:
    """Rows of several kinds; `len()` is the number of rows of the first kind, whose passes are the epochs."""

    def __init__(self, of: Mapping[str, Pairs]) -> None:
        self.of = of
        ends = [0, *itertools.accumulate(len(pairs) for pairs in of.values())]
        self.first = dict(zip(of, ends, strict=False))
        self.rows = ends[-1]

    def __len__(self) -> int:
        return len(next(iter(self.of.values())))

    @property
    def skipped(self) -> Mapping[str, int]:
        """Rows left out for a fault, by kind and reason."""
        return _named({rows: pairs.skipped for rows, pairs in self.of.items()})

    @property
    def deselected(self) -> Mapping[str, int]:
        """Rows left out without a fault, by kind and reason."""
        return _named({rows: pairs.deselected for rows, pairs in self.of.items()})

    def texts(self) -> Iterator[str]:
        """The texts of all kinds as found."""
        return itertools.chain.from_iterable(pairs.texts() for pairs in self.of.values())

    def batches(
        self, tokenizer: Encodes, batch_size: int, *, feeds: Mapping[str, Mapping[str, Any]], **options: Any
    ) -> Iterator[StepBatch]:
        """This rank's share of each step's batches, as `Pairs.batches` makes them; `feeds` has further options of a kind."""
        each = [
            pairs.batches(tokenizer, batch_size, **options, **feeds[rows]) for rows, pairs in self.of.items()
        ]
        for some in zip(*each, strict=True):
            yield StepBatch(dict(zip(self.of, some, strict=True)), self.first)


def _named(found: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    return {
        f"{rows}: {reason}": count for rows, some in found.items() for reason, count in sorted(some.items())
    }
