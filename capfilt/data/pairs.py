"""Pairs of a picture and a text in batches, and pictures or texts alone: the one source of every training on them.

Which texts count is `examples.py`'s, row groups are read by `pair_shards.py`, and `loader.py` says what a batch is.

Design: the order is a pure function of (counts per row group, batch size, options, seed, position). Every epoch draws a new
order of row groups, cuts it into windows of neighbours, and shuffles each window. A batch lies in the order of its window's
row groups, so that a rank, which takes a stretch of every batch, reads a stretch of every window. A run therefore resumes at
any step, on any number of ranks, by reading from the window it stopped in. A window of encoded pictures stays in memory, and
the next one; with a cache, decoded pictures do too, up to a limit, and are read and decoded once. The cache changes no row, no
order and no pixel: decoding and cropping are the same functions with and without it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from capfilt.data.cleaning import MAX_WORDS, clean
from capfilt.data.examples import Text
from capfilt.data.images import BadImage
from capfilt.data.loader import Batch, Index, Mix, ahead, capped, share
from capfilt.data.neighbours import DOUBTED, NEIGHBOURS, SOFT_FROM, TRUSTED, Neighbours
from capfilt.data.pair_shards import DROPPED, PairInput, PairShards, RowGroup, refusal
from capfilt.data.rows import IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.data.store import MEMORY_LIMIT, ArrayStore, cpu_workers
from capfilt.data.tokenizer import MAX_TOKENS, Encodes, NoTexts
from capfilt.data.transforms import Views, mentions_sides, training_picture, training_uint8
from capfilt.errors import RunError, UserError

Pixels = npt.NDArray[np.uint8]
_Read = tuple["array[int]", int, bool]

WINDOW = 4096
"""Texts shuffled together, at least; their pictures are held encoded, about 50 kB each for 512-pixel JPEGs."""
WINDOW_BATCHES = 64
"""Batches shuffled together, at least: two texts of a row group seldom meet in a batch, nor in a rank's share of it."""
_PREFETCH = 2
_FEATURED = 64  # pictures whose features are computed together
_ROW = np.dtype([("epoch", "i8"), ("group", "i8"), ("place", "i8"), ("depth", "f8"), ("source", "i8")])
"""A text of a batch: its row group, its place among its source's texts there, and how deep in the window the group lies."""


class _Example(NamedTuple):
    number: int
    picture: int
    image_id: str
    text: str
    source: str
    weight: float
    probability: float
    kept: bool


@dataclass(frozen=True)
class _Group:
    """The contents of a row group: texts by source (all under ""), and the encoded pictures that no cache holds."""

    examples: dict[str, list[_Example]]
    data: dict[int, bytes]


@dataclass(frozen=True)
class _Request:
    """A rank's share of one batch, as any process can make it.

    `places` are of its texts in the batch of all ranks. A picture is its bytes, its pixels, or why it cannot be seen. `near`
    has texts of each example's neighbours, none where its own text counts; None where no example has any.
    """

    step: int
    epoch: int
    places: list[int]
    examples: list[_Example]
    pictures: dict[int, bytes | Pixels | str]
    near: list[list[_Example]] | None = None


@dataclass(frozen=True)
class _Made:
    batch: Batch | None
    broken: dict[int, str]
    reason: str = ""


class Pairs:
    """The training pairs of some parts, or their pictures alone, or their texts alone.

    Args:
        inputs: the parts.
        rows: PAIR_ROWS, IMAGE_ROWS or TEXT_ROWS. A batch of pictures alone has no ids (int64
            [B, 0]); a batch of texts alone has neither pixels nor features.
        size: side of the pictures in pixels.
        cache: bytes of decoded pictures that stay in memory; 0 reads each picture whenever it is needed.
        workers: processes that decode; 0 decodes in threads of this one.
        weights: what a text's weight does. draws: a text of weight w is drawn in the share w of the epochs. loss: it has that
            weight in the batch, and all texts are drawn alike. ignore: nothing.
        dropped: whether pictures stay whose texts a verdict dropped: see `PairShards`.

    `len()` is the number of texts, or of pictures alone. Raises UserError for a part without such a column, or that gives none.
    """

    def __init__(
        self,
        inputs: Sequence[PairInput],
        *,
        size: int,
        rows: str = PAIR_ROWS,
        cache: int = MEMORY_LIMIT,
        workers: int = 0,
        weights: str = "draws",
        dropped: bool = False,
    ) -> None:
        self.size, self.rows, self._cache, self._workers = size, rows, cache, workers
        self._shards = PairShards(inputs, rows, dropped)
        self._skipped, self._deselected = Counter[str](), Counter[str]()
        self._groups: list[RowGroup] = []
        texts: list[dict[str, int]] = []
        images: list[int] = []
        found_weights: list[list[tuple[str, float]]] = []
        left_out = [Counter[str]() for _ in inputs]
        for number, shard, counted in self._shards.counted():
            self._groups += [RowGroup(number, shard, group) for group in range(len(counted.texts))]
            texts += counted.texts
            images += counted.images
            found_weights += counted.weights or [[]] * len(counted.texts)
            self._skipped.update(counted.skipped)
            self._deselected.update(counted.deselected)
            left_out[number] += Counter(counted.skipped) + Counter(counted.deselected)
        self._sources = sorted({source for found in texts for source in found})
        self._counts = {
            source: np.array([found.get(source, 0) for found in texts], dtype=np.int64)
            for source in self._sources
        }
        self._counts[""] = sum(self._counts.values(), np.zeros(len(self._groups), np.int64))
        self._first_text = np.concatenate([[0], np.cumsum(self._counts[""])])
        self._first_picture = np.concatenate([[0], np.cumsum(images, dtype=np.int64)])
        drawn = weights == "draws" and any(found_weights)
        self._weights = self._weighed(found_weights, texts) if drawn else {}
        self._lost = weights == "loss" and any(found_weights)
        self._near: Neighbours[_Example] | None = None
        self._broken: dict[int, str] = {}
        self._met: dict[int, str] = {}
        self._texts: dict[int, dict[str, list[_Example]]] = {}
        self._cached: dict[int, Pixels] = {}
        self._used = 0
        self._features: ArrayStore | None = None
        self._views: Views | None = None
        self._decoders = ThreadPoolExecutor(cpu_workers(), thread_name_prefix="capfilt-decode")
        for number, left in enumerate(left_out):
            self._refuse_barren(number, left)

    def _weighed(
        self, weights: list[list[tuple[str, float]]], texts: list[dict[str, int]]
    ) -> dict[str, list[npt.NDArray[np.float64]]]:
        """By source ("" for all), the weights of each row group's texts."""
        full = [
            some or [(source, 1.0) for source, count in found.items() for _ in range(count)]
            for some, found in zip(weights, texts, strict=True)
        ]
        return {
            source: [np.array([w for name, w in some if source in ("", name)], np.float64) for some in full]
            for source in ("", *self._sources)
        }

    @property
    def drawn(self) -> float:
        """Texts per epoch: the sum of the weights."""
        return self._drawn("")

    def _drawn(self, source: str) -> float:
        if not self._weights:
            return float(self._counts[source].sum())
        return float(sum(group.sum() for group in self._weights[source]))

    def _refuse_barren(self, number: int, left_out: Counter[str]) -> None:
        """Raise UserError where an input has no pair, or none with a picture that decodes."""
        for group, where in enumerate(self._groups):
            if where.source == number and self._counts[""][group]:
                if self.rows == TEXT_ROWS:
                    return
                data = self._read(group).data
                if any(isinstance(self._square(data[key]), np.ndarray) for key in data):
                    return
                left_out["no_picture"] += len(data)
        raise refusal(self._shards.inputs[number], left_out, self.rows)

    def __len__(self) -> int:
        return int(self._first_text[-1])

    @property
    def pictures(self) -> int:
        """How many pictures have a usable text (a picture of two parts counts twice)."""
        return int(self._first_picture[-1])

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many texts or pictures are left out for a fault, by reason; a picture, once a batch was to show it."""
        return self._skipped + Counter(self._met.values())

    @property
    def deselected(self) -> Mapping[str, int]:
        """How many texts are left out without a fault, by reason."""
        return dict(self._deselected)

    def texts_by_source(self) -> dict[str, int]:
        """How many texts each source has, sources in alphabetical order."""
        return {source: int(self._counts[source].sum()) for source in self._sources}

    def identities(self) -> Iterator[tuple[str, Text]]:
        """(image_id, text) of every text, in the order of `Batch.example`; reads all texts, no pictures."""
        for where in self._groups:
            for entry in self._shards.entries(where, False):
                for text in entry.texts:
                    yield entry.row["image_id"], text

    def texts(self) -> Iterator[str]:
        """The texts as found, in that order; none where pictures are alone."""
        return (text.text or "" for _, text in self.identities() if self.rows != IMAGE_ROWS)

    @torch.no_grad()
    def with_features(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Make batches give features of a frozen trunk in place of pixels, computed here once per picture.

        `compute` makes of uint8 [B, 3, S, S] on the CPU a float tensor [B, tokens, channels] on any device. Raises ValueError
        where features are not finite in float16.
        """

        def squares() -> Iterator[tuple[int, Pixels]]:
            for group in range(len(self._groups)):
                read = self._read(group)
                self._texts[group], data = read.examples, read.data
                for key, found in zip(data, self._decoders.map(self._square, data.values()), strict=True):
                    if isinstance(found, str):
                        self._broken[key] = found
                    else:
                        yield key, found

        found, store = squares(), None
        while some := [each for _, each in zip(range(_FEATURED), found, strict=False)]:
            made = compute(torch.from_numpy(np.stack([square for _, square in some])))
            made = made.detach().to("cpu", torch.float16)
            if not torch.isfinite(made).all():
                raise ValueError("features are not finite in float16: scale them down, or use the pixels")
            shape = tuple(made.shape[1:])
            store = store or ArrayStore(self.pictures, shape, np.float16)
            store.array[[key for key, _ in some]] = made.numpy()
        self._features, self._met = store, dict(self._broken)

    def with_neighbours(self) -> None:
        """Make batches give dropped pictures a soft target: texts of their neighbours; `with_features` comes first.

        Raises UserError where there are too few pictures to be neighbours.
        """
        examples = [one for group in range(len(self._groups)) for one in self._texts[group][""]]
        seen = [one for one in examples if one.picture not in self._broken]
        if all(one.kept for one in seen):
            return
        assert self._features is not None
        self._near = Neighbours(
            {one.picture: one.image_id for one in seen if not one.kept},
            [(one.picture, one.image_id, one) for one in seen if one.kept and one.probability > TRUSTED],
            self._features,
        )

    def batches(
        self,
        tokenizer: Encodes,
        batch_size: int,
        *,
        steps: int,
        seed: int = 0,
        start_step: int = 0,
        mixing: Mapping[str, float] | None = None,
        most: Mapping[str, float] | None = None,
        views: Views | None = None,
        rank: int = 0,
        world: int = 1,
        parts: int = 1,
        max_text_tokens: int = MAX_TOKENS,
        max_words: int | None = MAX_WORDS,
        prompt: str = "",
    ) -> Iterator[Batch]:
        """This rank's share of batches `start_step` to `steps - 1`, the same for the same arguments, any cache and any workers.

        Args:
            batch_size: texts per batch, over all ranks. A picture that does not decode leaves its batch smaller.
            mixing: source to weight, as `Mix` takes them.
            most: source to the largest share of the texts that it gives, whether mixed or not (`loader.capped`).
            views: a text's own view of its picture; all of it, as a square, where None.
            rank, world, parts: as in `loader.share`.
            max_text_tokens, max_words, prompt: of a text, as in `Tokenizer.encode_ragged`.

        Epochs follow one another without a seam. `image_index` and `text_index` are hashes, so that they compare across ranks.
        Raises UserError for mixing that does not fit, RunError for a share with fewer than two pictures that decode.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        if self.rows == IMAGE_ROWS:
            tokenizer, prompt = NoTexts(), ""
        mix = Mix(set(self._sources), self._capped(mixing, most or {}), seed)
        window = max(WINDOW, WINDOW_BATCHES * batch_size)
        orders = [
            # The window of each source lasts for as many batches.
            _Order(self._counts[source], [seed, number], window * part, number, self._weights.get(source))
            for number, (source, part) in enumerate(zip(mix.sources, mix.shares, strict=True))
        ]
        reach = max(order.size / (batch_size * part) for order, part in zip(orders, mix.shares, strict=True))
        if (views is None) != (self._views is None):
            self._cached, self._used = {}, 0  # squares in place of whole pictures, or the other way round
        self._views = views
        plan = _plan(mix, orders, batch_size, start_step, steps, rank, world, parts)
        soft = (math.ceil(SOFT_FROM * steps), seed)
        requests = self._requests(plan, mix.sources, math.ceil(reach) + 1, soft)
        remembers = self._cache > 0 and not self._workers
        work = _Assemble(
            tokenizer,
            self.size,
            max_text_tokens,
            max_words,
            prompt,
            views,
            {} if remembers else None,
            self.rows,
            self._lost,
            DROPPED in self._sources,
        )
        return self._deliver(work, requests)

    def _capped(
        self, mixing: Mapping[str, float] | None, most: Mapping[str, float]
    ) -> Mapping[str, float] | None:
        """`mixing` within the bounds; None where texts keep them as they are."""
        shares = mixing or {source: self._drawn(source) for source in self._sources}
        found = capped(shares, most)
        return mixing if found == shares else found

    # ------------------------------------------------------------------ reading

    def _square(self, data: bytes) -> Pixels | str:
        return _decoded(data, lambda: training_uint8(data, self.size))

    def _whole(self, data: bytes) -> Pixels | str:
        return _decoded(data, lambda: training_picture(data, self.size))

    def _read(self, group: int) -> _Group:
        """A row group from its shard, with all pictures that are wanted and not known to be broken."""
        place, picture = int(self._first_text[group]), int(self._first_picture[group])
        examples: dict[str, list[_Example]] = {"": []}
        data = {}
        seen = self.rows != TEXT_ROWS
        for entry in self._shards.entries(self._groups[group], seen):
            image_id = entry.row["image_id"]
            if seen and picture not in self._broken:
                data[picture] = (entry.row["image"] or {}).get("bytes") or b""
            for text in entry.texts:
                one = _Example(
                    *(place, picture, image_id, text.text or ""),
                    *(text.source, text.weight, text.probability, text.kept),
                )
                examples[""].append(one)
                examples.setdefault(text.source, []).append(one)
                place += 1
            picture += 1
        return _Group(examples, data)

    def _group(self, group: int) -> _Group:
        """A row group, its pictures decoded into the cache while that has room."""
        pictures = range(int(self._first_picture[group]), int(self._first_picture[group + 1]))
        known = self._texts.get(group)
        if known is not None and (
            self._features is not None or all(key in self._cached or key in self._broken for key in pictures)
        ):
            return _Group(known, {})
        read = self._read(group)
        if not self._cache:
            return read
        self._texts[group] = read.examples
        left = {key: data for key, data in read.data.items() if key not in self._cached}
        if self._used < self._cache:
            decode = self._square if self._views is None else self._whole
            for key, pixels in zip(list(left), self._decoders.map(decode, left.values()), strict=True):
                if isinstance(pixels, str):
                    self._broken[key] = pixels
                elif self._used < self._cache:
                    self._used += pixels.nbytes
                    self._cached[key] = pixels
                    del left[key]
        return _Group(read.examples, left)

    def _requests(
        self, plan: Iterator[_Step], sources: Sequence[str], reach: int, soft: tuple[int, int]
    ) -> Iterator[tuple[_Request, Tensor | None]]:
        """The requests of the batches. A thread reads row groups `reach` steps before the first batch that needs them.

        `soft` is the step from which neighbours' texts come with them, and the seed that draws these.
        """
        groups: dict[int, Future[_Group]] = {}
        last: dict[int, int] = {}
        waiting: deque[_Step] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="capfilt-read") as pool:
            try:
                while True:
                    step = next(plan, None)
                    if step is not None:
                        waiting.append(step)
                        for group in dict.fromkeys(step.rows["group"].tolist()):
                            last[group] = step.number
                            if group not in groups:
                                groups[group] = pool.submit(self._group, group)
                    if not waiting:
                        return
                    if step is None or len(waiting) > reach:
                        due = waiting.popleft()
                        yield self._request(due, groups, sources, soft)
                        for group in set(due.rows["group"].tolist()):
                            if last[group] == due.number:
                                del groups[group], last[group]
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _request(
        self,
        step: _Step,
        groups: Mapping[int, Future[_Group]],
        sources: Sequence[str],
        soft: tuple[int, int],
    ) -> tuple[_Request, Tensor | None]:
        examples: list[_Example] = []
        pictures: dict[int, bytes | Pixels | str] = {}
        for _, number, place, _, source in step.rows.tolist():
            group = groups[number].result()
            one = group.examples[sources[source]][place]
            examples.append(one)
            if one.picture in self._broken:
                pictures[one.picture] = self._broken[one.picture]
            elif one.picture in self._cached:
                pictures[one.picture] = self._cached[one.picture]
            elif self.rows != TEXT_ROWS:  # nothing where features stand for it
                pictures[one.picture] = group.data.get(one.picture, b"")
        features = None
        if self._features is not None:
            seen = [one.picture for one in examples if one.picture not in self._broken]
            features = torch.from_numpy(self._features.read(np.array(seen, dtype=np.int64)))
        near, (start, seed) = None, soft
        if self._near is not None and step.number >= start:
            near = [
                []
                if one.kept or one.picture in self._broken
                else self._near.texts(one.picture, [seed, step.number, place])
                for one, place in zip(examples, step.places, strict=True)
            ]
        return _Request(step.number, step.epoch, step.places, examples, pictures, near), features

    # ------------------------------------------------------------------ batches

    def _deliver(
        self, work: _Assemble, requests: Iterator[tuple[_Request, Tensor | None]]
    ) -> Iterator[Batch]:
        made: Iterator[_Made]
        if self._workers:
            # A "sample index" of the loader is a whole request: what to decode travels to the process, and batches come
            # back in order through shared memory.
            made = iter(
                DataLoader(
                    work,
                    batch_size=None,
                    sampler=requests,
                    num_workers=self._workers,
                    prefetch_factor=_PREFETCH,
                    multiprocessing_context="spawn",
                    generator=torch.Generator(),  # else its seed is drawn from the training's random state
                    collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batching it gets one item, not a list
                )
            )
        else:
            made = ahead(work.__getitem__, requests, _PREFETCH)
        pin = torch.cuda.is_available()  # copies from ordinary memory make a GPU wait for them
        for each in made:
            self._broken.update(each.broken)
            self._met.update(each.broken)
            if each.batch is None:
                raise RunError(each.reason)
            yield each.batch.pin_memory() if pin else each.batch


class _Step(NamedTuple):
    """A rank's share of one batch: the places of its texts in the whole, and the texts as `_ROW`."""

    number: int
    epoch: int
    places: list[int]
    rows: npt.NDArray[Any]


def _plan(
    mix: Mix,
    orders: Sequence[_Order],
    batch_size: int,
    start: int,
    stop: int,
    rank: int,
    world: int,
    parts: int,
) -> Iterator[_Step]:
    for order, first in zip(orders, mix.counts(start * batch_size), strict=True):
        order.begin(first)
    places = share(np.arange(batch_size), rank, world, parts)
    for step in range(start, stop):
        which = mix.which(np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64))
        rows = np.empty(batch_size, dtype=_ROW)
        for number, order in enumerate(orders):
            at = np.flatnonzero(which == number)
            rows[at] = order.take(len(at))
        epoch = int(rows["epoch"][0])
        rows = rows[np.argsort(rows["depth"], kind="stable")]
        yield _Step(step, epoch, places.tolist(), rows[places])


class _Order:
    """The endless order of one source's texts, a function of its counts per row group alone."""

    def __init__(
        self,
        counts: Index,
        seed: Sequence[int],
        window: float,
        source: int = 0,
        weights: Sequence[npt.NDArray[np.float64]] | None = None,
    ) -> None:
        self._groups = np.flatnonzero(counts)
        self._weights = (
            None if weights is None else np.concatenate([weights[int(group)] for group in self._groups])
        )
        if self._weights is not None and not self._weights.sum():
            raise UserError(
                "every text to train on has the weight 0; leave such parts out, or train with --weights ignore"
            )
        self._counts = counts[self._groups]
        self._seed, self._source = list(seed), source
        self._total = int(self._counts.sum())
        # Windows are alike: a small one at the end would be hardly shuffled.
        self._cuts = max(1, int(self._total // window))
        self.begin(0)

    @property
    def size(self) -> float:
        """Texts per window, on average."""
        return self._total / self._cuts

    def begin(self, position: int) -> None:
        """Go to a position; what lies before it is not drawn."""
        self._windows = self._from(position)
        self._rest = np.empty(0, dtype=_ROW)

    def take(self, count: int) -> npt.NDArray[Any]:
        """The next `count` texts, as `_ROW`."""
        found = [self._rest]
        missing = count - len(self._rest)
        while missing > 0:
            found.append(next(self._windows))
            missing -= len(found[-1])
        rows = np.concatenate(found)
        self._rest = rows[count:]
        return rows[:count]

    def _from(self, start: int) -> Iterator[npt.NDArray[Any]]:
        """Windows from a position on; the first may be the rest of one."""
        if self._weights is not None:
            yield from self._weighted_from(start)
        epoch, start = divmod(start, self._total)
        while True:
            yield from self._windows_of(epoch, start, self._counts, None)
            start = 0
            epoch += 1

    def _weighted_from(self, start: int) -> Iterator[npt.NDArray[Any]]:
        """As `_from`, where a text of weight w is in the share w of the epochs: as evenly spaced as its weight allows."""
        assert self._weights is not None
        phase = np.random.default_rng([*self._seed, 2**31]).random(len(self._weights))
        group = np.repeat(np.arange(len(self._groups)), self._counts)
        within = np.arange(len(group)) - np.repeat(np.cumsum(self._counts) - self._counts, self._counts)
        for epoch in itertools.count():
            # Times before the end of this epoch, less those before its beginning.
            taken = np.floor(self._weights * (epoch + 1) + phase) > np.floor(self._weights * epoch + phase)
            counts = np.bincount(group[taken], minlength=len(self._groups))
            if start < counts.sum():
                yield from self._windows_of(epoch, start, counts, within[taken])
                start = 0
            else:
                start -= int(counts.sum())

    def _windows_of(
        self, epoch: int, start: int, sizes: Index, places: npt.NDArray[np.int64] | None
    ) -> Iterator[npt.NDArray[Any]]:
        """The windows of one epoch from a position on; `sizes` are texts per row group, `places` theirs where not all are."""
        total, first = int(sizes.sum()), np.cumsum(sizes) - sizes
        order = np.random.default_rng([*self._seed, epoch, 0]).permutation(len(self._groups))
        ends = np.cumsum(sizes[order])
        cuts = np.flatnonzero(np.diff((ends - 1) * self._cuts // total)) + 1
        for number, inside in enumerate(np.split(order, cuts)):
            counts = sizes[inside]
            size = int(counts.sum())
            if start >= size:
                start -= size
                continue
            drawn = np.random.default_rng([*self._seed, epoch, 1 + number]).permutation(size)[start:]
            start = 0
            depth = np.searchsorted(np.cumsum(counts), drawn, side="right")
            within = drawn - (np.cumsum(counts) - counts)[depth]
            rows = np.empty(len(drawn), dtype=_ROW)
            rows["epoch"], rows["source"] = epoch, self._source
            rows["group"] = self._groups[inside[depth]]
            rows["place"] = within if places is None else places[first[inside[depth]] + within]
            rows["depth"] = depth / len(inside)
            yield rows


@dataclass
class _Assemble(Dataset[_Made]):
    """Makes a batch of a request, in any process. `known` remembers what was made of texts, where they fit in memory."""

    tokenizer: Encodes
    size: int
    max_text_tokens: int
    max_words: int | None
    prompt: str
    views: Views | None
    known: dict[int, _Read] | None
    rows: str = PAIR_ROWS
    weighed: bool = False
    drops: bool = False
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    def __getitem__(self, asked: tuple[_Request, Tensor | None]) -> _Made:
        request, features = asked
        if self._pool is None:
            here = torch.utils.data.get_worker_info() is None
            self._pool = ThreadPoolExecutor(cpu_workers() if here else 1, thread_name_prefix="capfilt-decode")
        texts = self._read(request.examples)
        shown: list[Pixels | None] = [None] * len(request.examples)
        broken = {key: found for key, found in request.pictures.items() if isinstance(found, str)}
        seen = self.rows != TEXT_ROWS
        if features is None and seen:
            rows_of: dict[int, list[int]] = {}
            for row, example in enumerate(request.examples):
                rows_of.setdefault(example.picture, []).append(row)
            # A picture is let go with its views: whole ones of a batch would be too many. Squares at hand need no thread.
            busy = self.views is not None or any(isinstance(one, bytes) for one in request.pictures.values())
            made = (self._pool.map if busy else map)(
                lambda key: self._views(request, key, rows_of[key], [texts[row][2] for row in rows_of[key]]),
                rows_of,
            )
            for (key, rows), found in zip(rows_of.items(), made, strict=True):
                if isinstance(found, str):
                    broken[key] = found
                else:
                    for row, view in zip(rows, found, strict=True):
                        shown[row] = view
        good = [row for row, each in enumerate(request.examples) if each.picture not in broken]
        if seen and len(good) < min(2, len(request.examples)):
            first = request.examples[0].image_id
            reasons = dict(Counter(broken.values()))
            return _Made(
                None,
                broken,
                f"step {request.step + 1}: {len(broken)} pictures in a row do not decode ({reasons}; the first is {first}); "
                "look at the part with `capfilt doctor --verify`",
            )
        examples = [request.examples[row] for row in good]
        ids, mask = self.tokenizer.pad([texts[row][0] for row in good], None)
        pixels = None
        if features is None and seen:
            pixels = torch.from_numpy(np.stack([view for view in shown if view is not None]))
        batch = Batch(
            ids=ids,
            mask=mask,
            image_index=torch.tensor([_hash(each.image_id) for each in examples]),
            text_index=torch.tensor([texts[row][1] for row in good]),
            example=torch.tensor([each.number for each in examples]),
            weight=torch.tensor([(each.weight if self.weighed else 1.0) * each.kept for each in examples])
            if self.weighed or self.drops
            else None,
            sided=torch.tensor([texts[row][2] for row in good], dtype=torch.bool),
            texts=[each.text for each in examples],
            synthetic=torch.tensor([each.source == "synthetic" for each in examples], dtype=torch.bool),
            step=request.step,
            epoch=request.epoch,
            pixels=pixels,
            features=features,
            dropped=torch.tensor([not each.kept for each in examples]) if self.drops else None,
        )
        if request.near is not None:
            near = [request.near[row] for row in good]
            batch.soft = torch.tensor(
                [
                    DOUBTED * (1 - one.probability) * bool(some)
                    for one, some in zip(examples, near, strict=True)
                ]
            )
            batch.near_ids, batch.near_mask = self._near(near)
        return _Made(batch, broken)

    def _near(self, near: Sequence[Sequence[_Example]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [B, K, L]; those of an empty text where there are no neighbours."""
        empty = self.tokenizer.encode_ragged([""], self.max_text_tokens, self.prompt, self.max_words)
        read = (self._read(some) if some else [] for some in near)
        rows = [[ids for ids, _, _ in some] or empty * NEIGHBOURS for some in read]
        ids, mask = self.tokenizer.pad([row for some in rows for row in some], None)
        shape = len(near), NEIGHBOURS, -1
        return ids.view(shape), mask.view(shape)

    def _read(self, examples: Sequence[_Example]) -> list[_Read]:
        """Of each text its ids, its hash after cleaning, and whether it names a side."""
        known = {} if self.known is None else self.known
        fresh = {each.number: each.text for each in examples if each.number not in known}
        ids = self.tokenizer.encode_ragged(
            list(fresh.values()), self.max_text_tokens, self.prompt, self.max_words
        )
        for (number, text), found in zip(fresh.items(), ids, strict=True):
            known[number] = array("i", found), _hash(clean(text)), mentions_sides(text)
        return [known[each.number] for each in examples]

    def _views(self, request: _Request, key: int, rows: list[int], sided: list[bool]) -> list[Pixels] | str:
        """The views that the texts `rows` have of one picture, or why it cannot be seen."""
        found = request.pictures[key]
        if isinstance(found, bytes):
            data = found
            make = training_uint8 if self.views is None else training_picture
            found = _decoded(data, lambda: make(data, self.size))
        if isinstance(found, str):
            return found
        if self.views is None:
            return [found] * len(rows)
        places = [request.places[row] for row in rows]
        return [
            self.views.view(found, self.size, request.step, place, keep)
            for place, keep in zip(places, sided, strict=True)
        ]


def _decoded(data: bytes, decode: Callable[[], Pixels]) -> Pixels | str:
    """The pixels, or why there are none."""
    if not data:
        return "no_image"
    try:
        return decode()
    except BadImage as error:
        return error.failure


def _as_it_is(made: _Made) -> _Made:
    return made


def _hash(text: str) -> int:
    """63 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
