"""Batches straight from shards: row groups are read as they are needed, so memory does not grow with the corpus.

Which texts count is `examples.py`'s, what a batch is `loader.py`'s; a corpus whose pictures fit is faster held
(`corpus.py`).

Design: one pass over the texts, without pictures, counts the examples of every row group. With the counts the order is a
pure function of (counts, options, seed, rank, position), as a held corpus's is: every epoch draws a new order of row
groups, gives each rank every so-manieth of them, and shuffles within windows of neighbours in that order. A run
therefore resumes at any step by reading from the window it stopped in, and however many processes decode, the batches
are the same. What stays in memory is a window of encoded pictures, the next one, and some numbers per row group.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, Dataset

from capfilt.data.cleaning import MAX_WORDS, clean
from capfilt.data.examples import (
    IMAGES_NEEDED,
    PAIRS_NEEDED,
    TRAINING_SPLITS,
    Entry,
    Text,
    image_entries,
    pair_entries,
    slices,
    unweighted,
    usable,
)
from capfilt.data.images import MAX_PIXELS, BadImage, decode
from capfilt.data.loader import Batch, Mix, Transform, ahead
from capfilt.data.store import cpu_workers
from capfilt.data.tokenizer import MAX_TOKENS, Encodes
from capfilt.data.transforms import Crops, mentions_sides, training_uint8
from capfilt.errors import RunError, UserError
from capfilt.tables.shards import Part

Index = npt.NDArray[np.int64]
K = TypeVar("K")
V = TypeVar("V")

WINDOW = 4096
"""Texts shuffled together; their pictures are held encoded, about 50 kB each for 512-pixel JPEGs."""
_OPEN_FILES = 64


@dataclass(frozen=True)
class StreamInput:
    """A part to read pairs from: of images (their found texts), of pairs, or of images joined with verdicts."""

    part: Part
    verdicts: Part | None = None


class _Unit(NamedTuple):
    """One row group of one shard of one input."""

    source: int
    shard: int
    group: int


class _Example(NamedTuple):
    number: int
    image_id: str
    data: bytes
    text: Text


@dataclass(frozen=True)
class _Request:
    """What a decoding process needs to make one batch."""

    step: int
    epoch: int
    examples: list[_Example]


@dataclass(frozen=True)
class _Made:
    batch: Batch | None
    lost: dict[str, int]
    reason: str = ""


class _Reader:
    """Reads the row groups of inputs; some files and verdicts are kept for the next look."""

    def __init__(self, inputs: Sequence[StreamInput], splits: Sequence[str | None] | None) -> None:
        self._inputs = list(inputs)
        self._splits = splits
        self._files: OrderedDict[tuple[int, int], pq.ParquetFile] = OrderedDict()
        self._kept: OrderedDict[tuple[int, int], dict[str, list[Text]]] = OrderedDict()

    def units(self, number: int) -> Iterator[_Unit]:
        """The row groups of one input."""
        for shard in self._inputs[number].part.shards():
            for group in range(self.file(number, shard).num_row_groups):
                yield _Unit(number, shard, group)

    def file(self, number: int, shard: int) -> pq.ParquetFile:
        return _cached(
            self._files, (number, shard), lambda: self._inputs[number].part.open(shard), _OPEN_FILES
        )

    def entries(
        self, unit: _Unit, pictures: bool, skipped: Counter[str], deselected: Counter[str]
    ) -> list[Entry]:
        """The usable rows of a row group with their texts; pixels only where asked for."""
        given = self._inputs[unit.source]
        file = self.file(unit.source, unit.shard)
        name = given.part.info["table"]
        needed = {"images": IMAGES_NEEDED, "pairs": PAIRS_NEEDED}[name]
        if given.verdicts is not None:
            needed = ("image_id", "image")
        wanted = [column for column in needed if pictures or column != "image"]
        names = set(file.schema_arrow.names)
        optional = [column for column in ("split", "status", "failure") if column not in wanted]
        table = pa.table(
            file.read_row_group(unit.group, columns=[c for c in (*wanted, *optional) if c in names])
        )
        if name == "pairs" and not pictures:
            unweighted(table, f"{given.part.path}, shard {unit.shard:05d}")
        rows = [row for some in slices([table], name, wanted, optional) for row in some]
        if given.verdicts is not None:
            kept = self._verdicts(unit, given.verdicts)
            entries = [Entry(row, kept.get(row["image_id"], [])) for row in rows]
        elif name == "images":
            entries = image_entries(rows, None, deselected)
        else:
            entries = pair_entries(rows, None, deselected)
        return list(usable(entries, self._splits, skipped, deselected))

    def _verdicts(self, unit: _Unit, verdicts: Part) -> dict[str, list[Text]]:
        def read() -> dict[str, list[Text]]:
            kept: dict[str, list[Text]] = {}
            if unit.shard not in verdicts.shards():
                return kept
            table = verdicts.read(unit.shard, ("text_id", "image_id", "source", "text", "keep"))
            for row in table.filter(pc.field("keep")).to_pylist():
                text = Text(row["text"], row["source"], row["text_id"])
                kept.setdefault(row["image_id"], []).append(text)
            return kept

        return _cached(self._kept, (unit.source, unit.shard), read, 16)


def refuse_barren(inputs: Sequence[StreamInput], images: Container[str]) -> None:
    """Raise UserError naming the first input that has no pair of a text to train on and a picture in `images`.

    Each input is read up to its first pair, without pictures.
    """
    reader = _Reader(inputs, TRAINING_SPLITS)
    for number, given in enumerate(inputs):
        left_out = Counter[str]()
        for unit in reader.units(number):
            entries = reader.entries(unit, False, left_out, left_out)
            if any(entry.row["image_id"] in images for entry in entries):
                break
            left_out["no_picture"] += len(entries)
        else:
            raise _barren(given, left_out)


def _barren(given: StreamInput, left_out: Mapping[str, int]) -> UserError:
    joined = f" with {given.verdicts.path}" if given.verdicts is not None else ""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items()) if count)
    return UserError(
        f"{given.part.path}{joined}: gives no training pair (left out: {reasons or 'nothing, it is empty'}); name another "
        "part, or leave it out"
    )


class PairStream:
    """The training pairs of some parts, in batches, read from their shards.

    Attributes:
        images: how many pictures have a usable text (a picture of two parts counts twice).
        skipped, deselected: what is left out, by reason, as a held corpus counts it. Pictures that turn out not to
            decode join `skipped` when they are met.

    `len()` is the number of texts. Raises UserError for a part without such a column, or that gives no pair.
    """

    def __init__(
        self,
        inputs: Sequence[StreamInput],
        *,
        splits: Sequence[str | None] | None = TRAINING_SPLITS,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._reader = _Reader(inputs, splits)
        self.skipped: Counter[str] = Counter()
        self.deselected: Counter[str] = Counter()
        self._units: list[_Unit] = []
        texts: list[dict[str, int]] = []
        pictures: list[dict[str, int]] = []
        for number, given in enumerate(inputs):
            skipped, deselected, found = Counter[str](), Counter[str](), 0
            for unit in self._reader.units(number):
                entries = self._reader.entries(unit, False, skipped, deselected)
                self._units.append(unit)
                texts.append(Counter(text.source for entry in entries for text in entry.texts))
                pictures.append(
                    Counter(source for entry in entries for source in {t.source for t in entry.texts})
                    | {"": len(entries)}
                )
                found += len(entries)
                if progress is not None:
                    progress(len(entries))
            if not found:
                raise _barren(given, skipped + deselected)
            self.skipped += skipped
            self.deselected += deselected
        self._sources = sorted({source for found in texts for source in found})
        self._texts = _columns(texts, self._sources)
        self._pictures = _columns(pictures, ["", *self._sources])
        self._texts[""] = sum(self._texts.values(), np.zeros(len(self._units), np.int64))
        self._first = np.concatenate([[0], np.cumsum(self._texts[""])])
        self.images = int(self._pictures[""].sum())

    def __len__(self) -> int:
        return int(self._first[-1])

    def texts_by_source(self) -> dict[str, int]:
        """How many texts each source has, sources in alphabetical order."""
        return {source: int(self._texts[source].sum()) for source in self._sources}

    def rows(self) -> Iterator[tuple[str, Text]]:
        """(image_id, text) of every example, in the order of `Batch.example`; reads the texts once more, no pictures."""
        for unit in self._units:
            for entry in self._reader.entries(unit, False, Counter(), Counter()):
                for text in entry.texts:
                    yield entry.row["image_id"], text

    def batches(
        self,
        tokenizer: Encodes,
        batch_size: int,
        *,
        size: int,
        steps: int,
        seed: int = 0,
        start_step: int = 0,
        mixing: Mapping[str, float] | None = None,
        one_text_per_image: bool = False,
        rank: int = 0,
        world: int = 1,
        window: int = WINDOW,
        workers: int = 0,
        prefetch: int = 2,
        pin_memory: bool = False,
        max_text_tokens: int = MAX_TOKENS,
        max_words: int | None = MAX_WORDS,
        prompt: str = "",
        pad_to: int | None = None,
        max_pixels: int = MAX_PIXELS,
        transform: Transform | None = None,
        crops: Crops | None = None,
    ) -> Iterator[Batch]:
        """Batches `start_step` to `steps - 1` of this rank, the same for the same arguments and any `workers`.

        Args:
            batch_size: examples per batch and rank. A picture that does not decode leaves its batch smaller.
            size: side of the pictures in pixels.
            mixing, one_text_per_image: as in `loader.Plan`; transform: as in `loader.batches`.
            crops: what each text sees of its picture before `transform`; all of it, as a square, where None.
            rank, world: this rank's number, and how many there are. In an epoch every row group goes to one rank, so
                that ranks share no example and lose none. Epochs follow one another without a seam, and ranks enter
                them when they are through with theirs: none waits for another, all give `steps` batches.
            window: texts shuffled together.
            workers: processes that decode; 0 decodes in threads of this one.
            prefetch: batches made ahead, per process.
            pin_memory: give batches in page-locked memory.

        `image_index` and `text_index` are hashes, so that they compare across ranks. Raises UserError for mixing that
        does not fit or fewer row groups than ranks, RunError for a batch with fewer than two pictures that decode.
        """
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world}")
        mix = Mix(set(self._sources), mixing, seed)
        counts = self._pictures if one_text_per_image else self._texts
        orders = [
            _Order(counts[source], [seed, number], rank, world, window)
            for number, source in enumerate(mix.sources)
        ]
        requests = self._requests(mix, orders, batch_size, start_step, steps, one_text_per_image)
        work = _Assemble(
            tokenizer, size, max_pixels, max_text_tokens, max_words, prompt, pad_to, transform, crops
        )
        return self._deliver(work, requests, workers, prefetch, pin_memory)

    # ------------------------------------------------------------------ reading

    def _read(self, number: int, source: str, epoch: int, one_text: bool) -> list[_Example]:
        """The examples of a unit that a stream of `source` (all sources where "") takes in this epoch."""
        found = []
        place = int(self._first[number])
        for entry in self._reader.entries(self._units[number], True, Counter(), Counter()):
            image_id, data = entry.row["image_id"], (entry.row["image"] or {}).get("bytes") or b""
            mine = []
            for text in entry.texts:
                if not source or text.source == source:
                    mine.append(_Example(place, image_id, data, text))
                place += 1
            if one_text and mine:
                mine = [mine[(_hash(image_id) + epoch) % len(mine)]]
            found += mine
        return found

    # ------------------------------------------------------------------ order

    def _stream(
        self, order: _Order, source: str, start: int, one_text: bool
    ) -> Iterator[tuple[int, _Example]]:
        """(epoch, example) without end, from position `start`; the next window is read while one is used."""

        def read(window: _Window) -> list[_Example]:
            examples = [
                one for unit in window.units for one in self._read(unit, source, window.epoch, one_text)
            ]
            return [examples[place] for place in window.places.tolist()]

        windows = order.windows(start)
        with ThreadPoolExecutor(1, thread_name_prefix="capfilt-read") as pool:
            window = next(windows)
            waiting = pool.submit(read, window)
            while True:
                following = next(windows)
                examples = waiting.result()
                waiting = pool.submit(read, following)
                for example in examples:
                    yield window.epoch, example
                window = following

    def _requests(
        self, mix: Mix, orders: list[_Order], batch_size: int, start: int, stop: int, one_text: bool
    ) -> Iterator[_Request]:
        before = mix.counts(start * batch_size)
        streams = [
            self._stream(order, source, first, one_text)
            for order, source, first in zip(orders, mix.sources, before, strict=True)
        ]
        try:
            for step in range(start, stop):
                positions = np.arange(step * batch_size, (step + 1) * batch_size, dtype=np.int64)
                taken = [next(streams[number]) for number in mix.which(positions).tolist()]
                yield _Request(step, taken[0][0], [example for _, example in taken])
        finally:
            for stream in streams:
                stream.close()  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ batches

    def _deliver(
        self, work: _Assemble, requests: Iterator[_Request], workers: int, prefetch: int, pin: bool
    ) -> Iterator[Batch]:
        made: Iterator[_Made]
        if workers:
            # A "sample index" of the loader is a whole request: what to decode travels to the process, and batches come
            # back in order through shared memory.
            made = iter(
                DataLoader(
                    work,
                    batch_size=None,
                    sampler=requests,
                    num_workers=workers,
                    prefetch_factor=max(1, prefetch),
                    multiprocessing_context="spawn",
                    collate_fn=_as_it_is,  # type: ignore[arg-type]  # without batching it gets one item, not a list
                )
            )
        else:
            made = ahead(work.__getitem__, requests, prefetch)
        for each in made:
            self.skipped.update(each.lost)
            if each.batch is None:
                raise RunError(each.reason)
            yield each.batch.pin_memory() if pin else each.batch


@dataclass(frozen=True)
class _Window:
    """Some units of one epoch, and the places of their examples, in the order in which they are given."""

    epoch: int
    units: list[int]
    places: Index


class _Order:
    """The endless order of one stream: positions to windows of units, by the units' counts alone."""

    def __init__(self, counts: Index, seed: Sequence[int], rank: int, world: int, window: int) -> None:
        self._units = np.flatnonzero(counts)
        self._counts = counts[self._units]
        self._seed, self._rank, self._world, self._window = list(seed), rank, world, max(1, window)
        if len(self._units) < world:
            raise UserError(
                f"{len(self._units)} row groups with texts for {world} ranks: train on fewer ranks, or write smaller shards"
            )

    def windows(self, start: int) -> Iterator[_Window]:
        """The windows from position `start` on; the first may be what is left of one."""
        epoch = 0
        while True:
            rng = np.random.default_rng([*self._seed, epoch, 0])
            order = rng.permutation(len(self._units))[self._rank :: self._world]
            ends = np.cumsum(self._counts[order])
            total = int(ends[-1])
            if start >= total:
                start -= total
                epoch += 1
                continue
            cuts = np.flatnonzero(np.diff((ends - 1) // self._window)) + 1
            for number, inside in enumerate(np.split(order, cuts)):
                size = int(self._counts[inside].sum())
                if start >= size:
                    start -= size
                    continue
                rng = np.random.default_rng([*self._seed, epoch, 1 + number])
                places = rng.permutation(size)[start:]
                start = 0
                yield _Window(epoch, self._units[inside].tolist(), places.astype(np.int64))
            epoch += 1


@dataclass
class _Assemble(Dataset[_Made]):
    """Makes a batch of a request, in whichever process it is asked."""

    tokenizer: Encodes
    size: int
    max_pixels: int
    max_text_tokens: int
    max_words: int | None
    prompt: str
    pad_to: int | None
    transform: Transform | None
    crops: Crops | None
    _pool: ThreadPoolExecutor | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pool": None}

    def __getitem__(self, request: _Request) -> _Made:
        if self._pool is None:
            here = torch.utils.data.get_worker_info() is None
            self._pool = ThreadPoolExecutor(cpu_workers() if here else 1, thread_name_prefix="capfilt-decode")
        places: dict[str, list[int]] = {}
        for place, example in enumerate(request.examples):
            places.setdefault(example.image_id, []).append(place)
        # A picture is let go with its views: whole ones of a batch would be too many.
        seen = self._pool.map(lambda rows: self._views(request, rows), places.values())
        pixels = dict(zip(places, seen, strict=True))
        lost = Counter(value for value in pixels.values() if isinstance(value, str))
        views_of = {
            place: view
            for rows, found in zip(places.values(), pixels.values(), strict=True)
            if not isinstance(found, str)
            for place, view in zip(rows, found, strict=True)
        }
        examples = [request.examples[place] for place in sorted(views_of)]
        if len(examples) < min(2, len(request.examples)):
            first = request.examples[0].image_id
            return _Made(
                None,
                dict(lost),
                f"step {request.step + 1}: {len(pixels)} pictures in a row do not decode ({dict(lost)}; the first is "
                f"{first}); look at the part with `capfilt doctor --verify`",
            )
        texts = [each.text.text or "" for each in examples]
        rows = self.tokenizer.encode_ragged(texts, self.max_text_tokens, self.prompt, self.max_words)
        ids, mask = self.tokenizer.pad(rows, self.pad_to)
        sided = torch.tensor([mentions_sides(text) for text in texts], dtype=torch.bool)
        views = torch.from_numpy(np.stack([views_of[place] for place in sorted(views_of)]))
        if self.transform is not None:
            views = self.transform(views, sided, request.step)
        batch = Batch(
            ids=ids,
            mask=mask,
            image_index=torch.tensor([_hash(each.image_id) for each in examples]),
            text_index=torch.tensor([_hash(clean(text)) for text in texts]),
            example=torch.tensor([each.number for each in examples]),
            weight=torch.tensor([each.text.weight for each in examples], dtype=torch.float32),
            sided=sided,
            texts=texts,
            step=request.step,
            epoch=request.epoch,
            pixels=views,
        )
        return _Made(batch, dict(lost))

    def _views(self, request: _Request, rows: list[int]) -> list[npt.NDArray[np.uint8]] | str:
        """What the examples `rows` of one picture see of it, or why it cannot be seen."""
        first = request.examples[rows[0]]
        if not first.data:
            return "no_image"
        try:
            if self.crops is None:
                return [training_uint8(first.data, self.size, max_pixels=self.max_pixels)] * len(rows)
            image = decode(first.data, max_pixels=self.max_pixels, draft_size=2 * self.size)
        except BadImage as error:
            return error.failure
        sided = [mentions_sides(request.examples[row].text.text or "") for row in rows]
        return [
            self.crops.view(image, self.size, request.step, row, keep)
            for row, keep in zip(rows, sided, strict=True)
        ]


def _as_it_is(made: _Made) -> _Made:
    return made


def _hash(text: str) -> int:
    """63 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _columns(found: list[dict[str, int]], names: Sequence[str]) -> dict[str, Index]:
    return {name: np.array([each.get(name, 0) for each in found], dtype=np.int64) for name in names}


def _cached(kept: OrderedDict[K, V], key: K, make: Callable[[], V], most: int) -> V:
    """`kept[key]`, made where it is missing; the least recently asked for go first."""
    if key in kept:
        kept.move_to_end(key)
        return kept[key]
    kept[key] = make()
    while len(kept) > most:
        kept.popitem(last=False)
    return kept[key]
