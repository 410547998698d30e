"""A corpus to batches: which examples in which order, assembled one batch ahead of the model.

Not here: where examples come from (`corpus.py`) or where their pixels are (`store.py`). The order is a pure function of
(corpus, options, seed, step), so a run resumes at any step without reading what came before.
"""

from __future__ import annotations

import copy
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from capfilt.data.cleaning import MAX_WORDS
from capfilt.data.tokenizer import MAX_TOKENS, Encodes
from capfilt.data.transforms import mentions_sides
from capfilt.errors import UserError

if TYPE_CHECKING:
    from capfilt.data.corpus import Corpus

Index = npt.NDArray[np.int64]
S = TypeVar("S")
T = TypeVar("T")
Transform = Callable[[Tensor, Tensor, int], Tensor]
"""Pixels uint8 [B, 3, S, S], whether each text names a side, bool [B], and the step -> pixels alike, on the CPU."""


@dataclass
class Batch:
    """B examples, on the CPU until `to`.

    Attributes:
        ids, mask: the texts, int64 and bool [B, L]; [CLS] prompt text [SEP], mask False on padding.
        image_index: int64 [B]; equal exactly where the `image_id` is equal.
        text_index: int64 [B]; equal exactly where the cleaned text is equal.
        example: int64 [B], the row of each text in the corpus.
        weight: float32 [B], the examples' weights.
        sided: bool [B], True where the text names left or right (see `transforms.augment`).
        texts: the texts as found.
        step, epoch: this batch's number from 0, and the epoch its first example belongs to.
        pixels: uint8 [B, 3, S, S], None where the corpus has features.
        features: float16 [B, N, C], None where it has not.
    """

    ids: Tensor
    mask: Tensor
    image_index: Tensor
    text_index: Tensor
    example: Tensor
    weight: Tensor
    sided: Tensor
    texts: list[str]
    step: int
    epoch: int
    pixels: Tensor | None = None
    features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def images(self) -> Tensor:
        """What a model sees: the features where the corpus has them, else the pixels."""
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


class _Stream:
    """An endless shuffled sequence of units; unit u is one of `rows[starts[u] : starts[u] + lengths[u]]`.

    Every unit comes once per pass. A unit of K rows gives each of them once in K passes.
    """

    def __init__(self, groups: Index, rows: Index, seed: Sequence[int]) -> None:
        order = np.argsort(groups, kind="stable")
        self._rows = rows[order]
        _, self._starts, self._lengths = np.unique(groups[order], return_index=True, return_counts=True)
        self._seed = list(seed)
        phases = np.random.default_rng([*self._seed, 0]).integers(0, 2**31, size=len(self._starts))
        self._phases = phases % self._lengths
        self._passes: dict[int, Index] = {}

    def __len__(self) -> int:
        return len(self._starts)

    def at(self, positions: Index) -> Index:
        """The rows at these positions of the sequence."""
        passes, offsets = positions // len(self), positions % len(self)
        units = np.empty_like(positions)
        for number in np.unique(passes).tolist():
            chosen = passes == number
            units[chosen] = self._permutation(number)[offsets[chosen]]
        chosen_rows: Index = self._rows[
            self._starts[units] + (passes + self._phases[units]) % self._lengths[units]
        ]
        return chosen_rows

    def _permutation(self, number: int) -> Index:
        if number not in self._passes:
            for old in [n for n in self._passes if n < number - 1]:
                del self._passes[old]
            self._passes[number] = np.random.default_rng([*self._seed, 1, number]).permutation(len(self))
        return self._passes[number]


class Plan:
    """Which rows of a corpus make up which batch.

    Without `mixing`, epochs follow one another without a seam: each holds every unit once, and the batch that an
    epoch leaves unfinished goes on with the next. With `mixing`, every source has such a sequence of its own and
    position p of the whole takes its next row from the source that a low-discrepancy sequence names: the shares hold
    in every stretch of batches, not only on average. An epoch then is as many examples as the mixed sources have.

    Args:
        image_of_text, sources: of the corpus, one entry per text.
        batch_size: examples per batch.
        seed: decides everything random.
        epochs, steps: how long, exactly one of the two. The last batch of `epochs` may be smaller.
        mixing: source to weight; weights are made to sum to 1, and a source of the corpus must be named, if with 0.
        one_text_per_image: a unit is an image (of one source, with `mixing`) with one of its texts, another one each
            epoch, instead of a text.

    Raises UserError for a corpus without examples, an unknown source or weights that are not shares.
    """

    def __init__(
        self,
        image_of_text: Index,
        sources: Sequence[str],
        batch_size: int,
        *,
        seed: int = 0,
        epochs: float | None = None,
        steps: int | None = None,
        mixing: Mapping[str, float] | None = None,
        one_text_per_image: bool = False,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise ValueError("give epochs or steps, and not both")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is not positive")
        count = len(image_of_text)
        if not count:
            raise UserError("the corpus has no examples: see its skipped and deselected counts for why")
        rows = np.arange(count, dtype=np.int64)
        groups = np.asarray(image_of_text, dtype=np.int64) if one_text_per_image else rows
        self.batch_size = batch_size
        self.mix = Mix(set(sources), mixing, seed)
        if mixing is None:
            self._streams = [_Stream(groups, rows, [seed, 0])]
        else:
            named = np.asarray(sources)
            self._streams = []
            for number, source in enumerate(self.mix.sources):
                mine = np.flatnonzero(named == source)
                self._streams.append(_Stream(groups[mine], rows[mine], [seed, 1 + number]))
        self.epoch_size = sum(map(len, self._streams))
        self.examples = (
            math.ceil(epochs * self.epoch_size) if epochs is not None else (steps or 0) * batch_size
        )
        self.steps = math.ceil(self.examples / batch_size)

    def rows(self, step: int) -> Index:
        """The rows of batch `step`, int64 [B]. Raises IndexError outside the plan."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        first, last = step * self.batch_size, min((step + 1) * self.batch_size, self.examples)
        positions = np.arange(first, last, dtype=np.int64)
        if len(self._streams) == 1:
            return self._streams[0].at(positions)
        before = self.mix.counts(first)
        which = self.mix.which(positions)
        out = np.empty_like(positions)
        for number, stream in enumerate(self._streams):
            places = np.flatnonzero(which == number)
            out[places] = stream.at(before[number] + np.arange(len(places), dtype=np.int64))
        return out

    def epoch(self, step: int) -> int:
        """The epoch that the first example of batch `step` belongs to."""
        return step * self.batch_size // self.epoch_size


class Mix:
    """Which source gives the example at each position: shares that hold in every stretch, not only on average.

    Without `mixing` there is one source, called "". Raises UserError for an unknown source or weights that are not
    shares.
    """

    def __init__(self, present: AbstractSet[str], mixing: Mapping[str, float] | None, seed: int) -> None:
        shares = _shares(present, mixing)
        self.sources = [source for source, _ in shares]
        self._bounds = _bounds([share for _, share in shares])
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


def batches(
    corpus: Corpus,
    tokenizer: Encodes,
    batch_size: int,
    *,
    seed: int = 0,
    epochs: float | None = None,
    steps: int | None = None,
    start_step: int = 0,
    max_text_tokens: int = MAX_TOKENS,
    max_words: int | None = MAX_WORDS,
    prompt: str = "",
    pad_to: int | None = None,
    mixing: Mapping[str, float] | None = None,
    one_text_per_image: bool = False,
    transform: Transform | None = None,
    prefetch: int = 1,
    rank: int = 0,
    world: int = 1,
    parts: int = 1,
) -> Iterator[Batch]:
    """Batches of a corpus, the same for the same arguments; see `Plan` for the order.

    Args:
        corpus: the examples; its features are given instead of pixels where it has them.
        tokenizer: its ids for every text are made once and kept with the corpus.
        batch_size, seed, epochs, steps, mixing, one_text_per_image: as in `Plan`.
        start_step: the first batch to yield; what comes before is neither decoded nor read.
        max_text_tokens: tokens per text, [CLS] and [SEP] included (BLIP pretrains with 30, finetunes with 35 or 40).
        max_words: words per text before tokenising (BLIP, official code: 30).
        prompt: put before every text.
        pad_to: a fixed L; the batch's longest text where None.
        transform: changes the pictures where batches are assembled, so ahead of the model. Where it is a function of its
            arguments alone, a resumed run sees what it would have seen.
        prefetch: batches assembled ahead, in one thread.
        rank, world, parts: only this rank's share of every batch, so that all ranks' shares are the batch; and of each of
            the `parts` that the batch is split into as well.

    Raises UserError at once, not at the first batch, for what `Plan` refuses.
    """
    plan = Plan(
        corpus.image_of_text,
        corpus.sources,
        batch_size,
        seed=seed,
        epochs=epochs,
        steps=steps,
        mixing=mixing,
        one_text_per_image=one_text_per_image,
    )
    if start_step < 0:
        raise ValueError(f"start_step {start_step} is negative")
    table = corpus.tokens(tokenizer, max_text_tokens, prompt, max_words)

    def assemble(step: int) -> Batch:
        rows = share(plan.rows(step), rank, world, parts)
        images = corpus.image_of_text[rows]
        ids, mask = table.read(rows, pad_to)
        texts = [corpus.texts[row] for row in rows.tolist()]
        pixels = features = None
        if corpus.features is not None:
            features = torch.from_numpy(corpus.features.read(images))
        else:
            pixels = torch.from_numpy(corpus.images.read(images))
        sided = torch.tensor([mentions_sides(text) for text in texts], dtype=torch.bool)
        if transform is not None and pixels is not None:
            pixels = transform(pixels, sided, step)
        return Batch(
            ids=ids,
            mask=mask,
            image_index=torch.from_numpy(corpus.image_index[images]),
            text_index=torch.from_numpy(corpus.text_index[rows]),
            example=torch.from_numpy(rows),
            weight=torch.from_numpy(corpus.weights[rows]),
            sided=sided,
            texts=texts,
            step=step,
            epoch=plan.epoch(step),
            pixels=pixels,
            features=features,
        )

    return ahead(assemble, range(start_step, plan.steps), prefetch)


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
