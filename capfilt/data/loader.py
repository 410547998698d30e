"""A batch, and what makers of batches share: orders, shares of sources and ranks, token tables, a thread that works ahead.

Not here: where a batch's rows come from (`pairs.py`, `task_corpus.py`). Every order is a pure function of options, seed and
step, so a run resumes at any step without reading what came before.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capfilt.data.cleaning import MAX_WORDS
from capfilt.data.tokenizer import MAX_TOKENS, Encodes
from capfilt.errors import UserError

Index = npt.NDArray[np.int64]
S = TypeVar("S")
T = TypeVar("T")


@dataclass
class Batch:
    """B examples, on the CPU until `to`.

    Attributes:
        ids, mask: the texts, int64 and bool [B, L]; [CLS] prompt text [SEP], mask False on padding.
        image_index: int64 [B]; equal exactly where the `image_id` is equal.
        text_index: int64 [B]; equal exactly where the cleaned text is equal.
        example: int64 [B], the number of each text among all there are.
        weight: float32 [B], how much each example counts in the losses; None where all count alike.
        sided: bool [B], True where the text names left or right, so that a flip makes it false.
        texts: the texts as found.
        synthetic: bool [B], True where a captioner wrote the text; None as all False.
        step, epoch: this batch's number from 0, and the epoch its first example belongs to.
        pixels: uint8 [B, 3, S, S], None where there are features.
        features: float16 [B, N, C] of a frozen trunk, None without.
        dropped: bool [B], True where only the picture counts, since its text was dropped; None where every text counts.
        soft: float32 [B], the weight of a dropped row's soft target, 0 without one; None where no row has one.
        near_ids, near_mask: int64 and bool [B, K, L] beside `soft`, as `ids` and `mask`: a text of each of the K nearest
            pictures.
    """

    ids: Tensor
    mask: Tensor
    image_index: Tensor
    text_index: Tensor
    example: Tensor
    weight: Tensor | None
    sided: Tensor
    texts: list[str]
    step: int
    epoch: int
    pixels: Tensor | None = None
    features: Tensor | None = None
    dropped: Tensor | None = None
    soft: Tensor | None = None
    near_ids: Tensor | None = None
    near_mask: Tensor | None = None
    synthetic: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def images(self) -> Tensor:
        """The model's input: the features where there are any, else the pixels."""
        found = self.pixels if self.features is None else self.features
        if found is None:
            raise UserError("a batch has neither pixels nor features: the loader must yield one of them")
        return found

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for copies to a GPU that overlap its work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def split(self, parts: int) -> list[Batch]:
        """The same examples in order, in at most `parts` batches of sizes that differ by one at most; none is empty."""
        rows = np.array_split(np.arange(len(self)), max(1, parts))
        return [self._slice(int(some[0]), int(some[-1]) + 1) for some in rows if len(some)]

    def _slice(self, start: int, stop: int) -> Batch:
        if (start, stop) == (0, len(self)):
            return self
        part = self._each(lambda tensor: tensor[start:stop])
        part.texts = self.texts[start:stop]
        return part

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(changed, name, change(value))
        return changed


class Plan:
    """Which of `count` rows make up which batch: epochs of shuffled rows that follow one another without a seam.

    Args:
        count: how many rows there are.
        batch_size: rows per batch; the batch that an epoch leaves unfinished goes on with the next.
        seed: decides everything random.
        epochs, steps: how long, exactly one of the two. The last batch of `epochs` may be smaller.

    Raises UserError where there is no row.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: float | None = None,
        steps: int | None = None,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError("give epochs or steps, and not both")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is not positive")
        if not count:
            raise UserError("the corpus has no examples: see its skipped and deselected counts for why")
        self.count, self.batch_size, self._seed = count, batch_size, seed
        self.examples = math.ceil(epochs * count) if epochs is not None else (steps or 0) * batch_size
        self.steps = math.ceil(self.examples / batch_size)
        self._epochs: dict[int, Index] = {}

    def rows(self, step: int) -> Index:
        """The rows of batch `step`, int64 [B]. Raises IndexError outside the plan."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first, last = step * self.batch_size, min((step + 1) * self.batch_size, self.examples)
        epochs, offsets = np.divmod(np.arange(first, last, dtype=np.int64), self.count)
        return np.concatenate(
            [self._order(number)[offsets[epochs == number]] for number in np.unique(epochs).tolist()]
        )

    def epoch(self, step: int) -> int:
        """The epoch that the first row of batch `step` belongs to."""
        return step * self.batch_size // self.count

    def _order(self, epoch: int) -> Index:
        if epoch not in self._epochs:
            self._epochs = {n: order for n, order in self._epochs.items() if n == epoch - 1}
            self._epochs[epoch] = np.random.default_rng([self._seed, 0, 1, epoch]).permutation(self.count)
        return self._epochs[epoch]


class Mix:
    """Which source gives the example at each position: shares that hold in every stretch, not only on average.

    Without `mixing` there is one source, called "". Raises UserError for an unknown source or weights that are not
    shares.
    """

    def __init__(self, present: AbstractSet[str], mixing: Mapping[str, float] | None, seed: int) -> None:
        shares = _shares(present, mixing)
        self.sources = [source for source, _ in shares]
        self.shares = [share for _, share in shares]
        self._bounds = _bounds(self.shares)
        self._first = int(np.random.default_rng([seed, 2**32 - 1]).integers(0, 2**63))
        self._taken = (0, [0] * len(shares))

    def which(self, positions: Index) -> Index:
        """The number of the source of each position."""
        # Weyl's sequence by the golden ratio, in exact 64-bit arithmetic: any stretch of it is evenly spread.
        with np.errstate(over="ignore"):
            spread = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(self._first)
        return np.searchsorted(self._bounds, spread, side="right").astype(np.int64)

    def counts(self, position: int) -> list[int]:
        """How many examples each source gave before `position`; remembers the last answer, so going on costs nothing."""
        start, counts = self._taken
        if position < start:
            start, counts = 0, [0] * len(counts)
        counts = list(counts)
        while start < position:
            stop = min(start + 1_000_000, position)
            found = np.bincount(self.which(np.arange(start, stop, dtype=np.int64)), minlength=len(counts))
            counts = [have + int(more) for have, more in zip(counts, found, strict=True)]
            start = stop
        self._taken = (start, counts)
        return counts


def _shares(present: AbstractSet[str], mixing: Mapping[str, float] | None) -> list[tuple[str, float]]:
    if mixing is None:
        return [("", 1.0)]
    here = ", ".join(sorted(present))
    for source, weight in mixing.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"mixing: the weight of {source!r} is {weight}: give a number from 0 up")
        if weight > 0 and source not in present:
            raise UserError(f"mixing: the corpus has no texts of source {source!r}, only of {here}")
    for source in sorted(set(present) - set(mixing)):
        raise UserError(f"mixing: source {source!r} is not named: give it a weight, 0 to leave it out")
    total = sum(mixing.values())
    if total <= 0:
        raise UserError("mixing: every weight is 0: give at least one source a weight")
    return [(source, weight / total) for source, weight in sorted(mixing.items()) if weight > 0]


def capped(mixing: Mapping[str, float], most: Mapping[str, float]) -> dict[str, float]:
    """`mixing`, source to weight, with no source above its share in `most`; the other sources share the rest as before.

    Raises UserError where only sources with such a bound are there.
    """
    total = sum(mixing.values())
    over = {source: most[source] for source, weight in mixing.items() if weight > most.get(source, 1) * total}
    left = sum(weight for source, weight in mixing.items() if source not in over)
    if not over:
        return dict(mixing)
    if left <= 0:
        raise UserError(
            f"--{next(iter(over))}-share: there are no texts of other sources to give the rest; add a part that has some"
        )
    rest = 1 - sum(over.values())
    return {source: over.get(source, weight / left * rest) for source, weight in mixing.items()}


def _bounds(shares: Sequence[float]) -> npt.NDArray[np.uint64]:
    """Upper ends, on the 64-bit circle, of all shares but the last."""
    return np.array([min(int(x * 2**64), 2**64 - 1) for x in np.cumsum(shares)[:-1]], dtype=np.uint64)


@dataclass(frozen=True)
class TokenTable:
    """Every text of a corpus as ids, made once: row i is `flat[starts[i] : starts[i + 1]]`."""

    flat: npt.NDArray[np.int32]
    starts: Index
    pad_id: int

    @classmethod
    def build(
        cls,
        texts: Sequence[str],
        tokenizer: Encodes,
        max_length: int = MAX_TOKENS,
        prompt: str = "",
        max_words: int | None = MAX_WORDS,
        raw: bool = False,
    ) -> TokenTable:
        """Tokenise `texts`, some thousands at a time; arguments as in `Tokenizer.encode_ragged`."""
        parts: list[npt.NDArray[np.int32]] = []
        lengths = np.zeros(len(texts) + 1, dtype=np.int64)
        for start in range(0, len(texts), 8192):
            rows = tokenizer.encode_ragged(texts[start : start + 8192], max_length, prompt, max_words, raw)
            lengths[start + 1 : start + 1 + len(rows)] = [len(row) for row in rows]
            parts.append(np.fromiter((i for row in rows for i in row), dtype=np.int32))
        flat = np.concatenate(parts) if parts else np.empty(0, dtype=np.int32)
        return cls(flat, np.cumsum(lengths), tokenizer.pad_id)

    def read(self, rows: Index, pad_to: int | None = None) -> tuple[Tensor, Tensor]:
        """Ids int64 [B, L] and mask bool [B, L]; L is the longest row's length, or `pad_to`."""
        begin, end = self.starts[rows], self.starts[rows + 1]
        longest = int((end - begin).max(initial=0))
        if pad_to is not None and pad_to < longest:
            raise ValueError(f"pad_to {pad_to} is smaller than a text of {longest} tokens")
        columns = np.arange(longest if pad_to is None else pad_to, dtype=np.int64)
        mask = columns[None, :] < (end - begin)[:, None]
        places = np.minimum(begin[:, None] + columns[None, :], max(len(self.flat) - 1, 0))
        ids = np.where(mask, self.flat[places], self.pad_id).astype(np.int64)
        return torch.from_numpy(ids), torch.from_numpy(mask)


def share(rows: Index, rank: int, world: int, parts: int = 1) -> Index:
    """The rows that `rank` of `world` has of a batch of them, a stretch of each of its `parts` (as `Batch.split` makes)."""
    if world == 1:
        return rows
    return np.concatenate([np.array_split(part, world)[rank] for part in np.array_split(rows, parts)])


def ahead(assemble: Callable[[S], T], items: Iterable[S], prefetch: int) -> Iterator[T]:
    """`assemble` of every item in order, up to `prefetch` of them ahead of the caller, in one thread."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="capfilt-batch")
    waiting: deque[Future[T]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(assemble, item))
            if len(waiting) > prefetch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
