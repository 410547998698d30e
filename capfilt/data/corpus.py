"""Rows of tables to a training corpus: which texts, which pictures, and what was left out and why.

Not here: how parts are stored (`tables/`: any iterable of Arrow tables will do), where pixels are kept (`store.py`), or
the order of batches (`loader.py`, whose `Batch` and `batches` are also importable from here).

A picture that does not decode and a text that is empty are left out and counted, never raised.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar, Unpack

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

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
    usable,
)
from capfilt.data.loader import Batch, Plan, TokenTable, batches
from capfilt.data.pictures import BuildOptions, Pictures
from capfilt.data.store import MEMORY_LIMIT, ArrayStore, ImageStore, Index, JoinedRows, NoRows, Rows
from capfilt.data.tokenizer import MAX_TOKENS, Encodes
from capfilt.errors import UserError

__all__ = [
    "Batch", "Corpus", "ImageStore", "Plan", "batches", "concat", "from_images", "from_pairs", "from_verdicts",
]  # fmt: skip

T = TypeVar("T")


@dataclass
class Corpus:
    """Pictures with their texts, by column. T texts, N pictures; one picture may have many texts.

    Attributes:
        images: pixels of the pictures, uint8 [3, S, S] each.
        image_of_text: int64 [T], the picture of each text.
        texts, sources, text_ids: T strings each; texts as found.
        image_ids, image_split: N strings each (a split may be None).
        weights: float32 [T].
        skipped: how many were left out for a fault: pictures by their failure (once per picture), texts by
            `empty_text`, `too_long`, `not_finite` (its weight) or `no_image` (once per text).
        deselected: how many were left out without a fault: pictures as `split` or `no_text`, texts as `verdict`, and
            as `source` whichever of the two the builder chooses by source.
        features: float16 [N, C] each, in the pictures' order, where `with_features` made them.
    """

    images: Rows
    image_of_text: Index
    texts: list[str]
    sources: list[str]
    text_ids: list[str]
    image_ids: list[str]
    weights: npt.NDArray[np.float32]
    image_split: list[str | None]
    skipped: dict[str, int] = field(default_factory=dict)
    deselected: dict[str, int] = field(default_factory=dict)
    features: Rows | None = None

    def __post_init__(self) -> None:
        self.image_of_text = np.asarray(self.image_of_text, dtype=np.int64)
        self.weights = np.asarray(self.weights, dtype=np.float32)
        count = len(self.texts)
        for name in ("image_of_text", "sources", "text_ids", "weights"):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {count} texts")
        pictures = len(self.image_ids)
        if len(self.images) != pictures or len(self.image_split) != pictures:
            raise ValueError(f"{len(self.images)} pictures, {pictures} ids, {len(self.image_split)} splits")
        if self.features is not None and len(self.features) != pictures:
            raise ValueError(f"{len(self.features)} rows of features for {pictures} pictures")
        if count and not 0 <= int(self.image_of_text.min()) <= int(self.image_of_text.max()) < pictures:
            raise ValueError("image_of_text names a picture that is not there")
        self._tokens: dict[tuple[object, ...], TokenTable] = {}

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def image_index(self) -> Index:
        """int64 [N]: a number per picture, the same for the same `image_id` and for no other."""
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(key, len(numbers)) for key in self.image_ids], dtype=np.int64)

    @cached_property
    def text_index(self) -> Index:
        """int64 [T]: a number per text, the same where the cleaned texts are the same and nowhere else."""
        # By 64-bit hashes, because the texts of a large corpus do not fit in memory twice.
        keys = np.fromiter(
            (
                int.from_bytes(hashlib.blake2b(clean(text).encode(), digest_size=8).digest(), "little")
                for text in self.texts
            ),
            dtype=np.uint64,
            count=len(self.texts),
        )
        return np.unique(keys, return_inverse=True)[1].astype(np.int64).reshape(-1)

    def tokens(
        self,
        tokenizer: Encodes,
        max_length: int = MAX_TOKENS,
        prompt: str = "",
        max_words: int | None = MAX_WORDS,
    ) -> TokenTable:
        """Every text as ids, in order; kept for the last two combinations of arguments."""
        key = (tokenizer.fingerprint, tokenizer.cleaning, max_length, prompt, max_words)
        if key not in self._tokens:
            while len(self._tokens) > 1:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[key] = TokenTable.build(self.texts, tokenizer, max_length, prompt, max_words)
        return self._tokens[key]

    def take(self, rows: Sequence[int] | Index) -> Corpus:
        """The corpus of these texts, in this order, with only their pictures; nothing is copied but columns."""
        rows = np.asarray(rows, dtype=np.int64)
        used, image_of_text = np.unique(self.image_of_text[rows], return_inverse=True)
        listed, pictures = rows.tolist(), used.tolist()
        whole = np.zeros(len(used), dtype=np.int64)
        return Corpus(
            images=JoinedRows([self.images], whole, used),
            image_of_text=image_of_text.reshape(-1),
            texts=[self.texts[row] for row in listed],
            sources=[self.sources[row] for row in listed],
            text_ids=[self.text_ids[row] for row in listed],
            image_ids=[self.image_ids[row] for row in pictures],
            weights=self.weights[rows],
            image_split=[self.image_split[row] for row in pictures],
            features=None if self.features is None else JoinedRows([self.features], whole, used),
        )

    def texts_by_source(self) -> dict[str, int]:
        """How many texts each source has, sources in alphabetical order."""
        return dict(sorted(Counter(self.sources).items()))

    @torch.no_grad()
    def with_features(
        self,
        compute: Callable[[Tensor], Tensor],
        *,
        batch_size: int = 64,
        memory_limit: int = MEMORY_LIMIT,
        spill_dir: str | os.PathLike[str] | None = None,
        keep_pixels: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Corpus:
        """The same corpus with the features of a frozen trunk, computed once per picture.

        Args:
            compute: uint8 [B, 3, S, S] on the CPU to a float tensor [B, tokens, channels] on any device.
            batch_size: pictures per call.
            memory_limit, spill_dir: as in `ImageStore`, for the features.
            keep_pixels: whether the pixels stay readable; memory is freed with the old corpus where they do not.
            progress: called with the number of pictures of every call.

        Raises ValueError where features are not finite in float16.
        """
        store: ArrayStore | None = None
        for start in range(0, len(self.image_ids), batch_size):
            rows = np.arange(start, min(start + batch_size, len(self.image_ids)), dtype=np.int64)
            made = compute(torch.from_numpy(self.images.read(rows))).detach().to("cpu", torch.float16)
            if not torch.isfinite(made).all():
                raise ValueError("features are not finite in float16: scale them down, or use the pixels")
            if store is None:
                store = ArrayStore(
                    len(self.image_ids),
                    tuple(made.shape[1:]),
                    np.float16,
                    memory_limit=memory_limit,
                    spill_dir=spill_dir,
                )
            store.array[rows[0] : rows[-1] + 1] = made.numpy()
            if progress is not None:
                progress(len(rows))
        kept = self.images if keep_pixels else NoRows(len(self.image_ids), self.images.shape)
        made_rows = store if store is not None else NoRows(0, (0, 0))
        made_corpus = replace(self, images=kept, features=made_rows)
        made_corpus._tokens = self._tokens
        return made_corpus


def from_images(
    tables: Iterable[pa.Table],
    source: str | None = None,
    splits: Sequence[str | None] | None = TRAINING_SPLITS,
    *,
    size: int,
    limit: int = 0,
    **options: Unpack[BuildOptions],
) -> Corpus:
    """Found texts: one example per caption of every successful row of `images` tables.

    Args:
        tables: Arrow tables with the columns of the images contract; read one at a time.
        source: only rows of this source (`web`, `human`); all where None.
        splits: only rows of these splits, None meaning rows without one; all where the argument is None.
        size: side of the pictures in pixels.
        limit: only the first so many pictures; no table after the one that holds the last of them is read. 0 for all.
            Pictures read beyond it are deselected as `limit`.
        **options: `memory_limit`, `spill_dir`, `workers`, `max_pixels`, `training` of `ImageStore`; `progress`, called with the
            number of rows looked at.

    Raises UserError for a missing or wrong column, RunError for a full disk.
    """
    building = _Builder(size, options)
    for rows in slices(tables, "images", IMAGES_NEEDED, ("split", "failure")):
        building.feed(image_entries(rows, source, building.deselected), splits)
        if limit and building.pictures >= limit:
            break
    corpus = building.corpus()
    if not limit or len(corpus.image_ids) <= limit:
        return corpus
    cut = corpus.take(np.flatnonzero(corpus.image_of_text < limit))
    left_out = {**corpus.deselected, "limit": len(corpus.image_ids) - limit}
    return replace(cut, skipped=corpus.skipped, deselected=left_out)


def from_pairs(
    tables: Iterable[pa.Table],
    sources: Sequence[str] | None = None,
    splits: Sequence[str | None] | None = TRAINING_SPLITS,
    *,
    size: int,
    **options: Unpack[BuildOptions],
) -> Corpus:
    """A selected corpus: one example per entry of `texts` of every row of `pairs` tables, with its weight.

    Arguments and errors as in `from_images`; `sources` keeps only texts of these sources. The table has no text ids, so
    they are made from the image, the source, the text and its place.
    """
    building = _Builder(size, options)
    for rows in slices(tables, "pairs", PAIRS_NEEDED, ("split",)):
        building.feed(pair_entries(rows, sources, building.deselected), splits)
    return building.corpus()


def from_verdicts(
    image_tables: Iterable[pa.Table],
    verdict_tables: Iterable[pa.Table],
    sources: Sequence[str] | None = None,
    splits: Sequence[str | None] | None = TRAINING_SPLITS,
    *,
    size: int,
    **options: Unpack[BuildOptions],
) -> Corpus:
    """Images joined with verdicts: one example per verdict that keeps its text, whatever wrote it.

    Verdicts (no pixels) are read first and held; image tables stream through. A kept text whose image is in no image
    table is skipped as `no_image`. Arguments and errors as in `from_images`.
    """
    building = _Builder(size, options)
    kept: dict[str, list[Text]] = {}
    for rows in slices(verdict_tables, "verdicts", ("text_id", "image_id", "source", "text", "keep"), ()):
        for row in rows:
            if not row["keep"]:
                building.deselected["verdict"] += 1
            elif sources is not None and row["source"] not in sources:
                building.deselected["source"] += 1
            else:
                kept.setdefault(row["image_id"], []).append(Text(row["text"], row["source"], row["text_id"]))
    wanted = pa.array(sorted(kept), pa.string())
    for rows in slices(image_tables, "images", ("image_id", "image"), ("split", "status", "failure"), wanted):
        # An image that two tables have is joined once: its verdicts are used up.
        building.feed([Entry(row, kept.pop(row["image_id"], [])) for row in rows], splits)
    building.skipped["no_image"] += sum(map(len, kept.values()))
    return building.corpus()


def concat(corpora: Sequence[Corpus]) -> Corpus:
    """One corpus of all examples, in order; a picture that several have (by `image_id`) is one picture.

    Pixels are not copied: the first corpus that has a picture gives it. Features are kept where every corpus has them.
    Raises UserError when picture sizes differ, or features do.
    """
    if not corpora:
        raise ValueError("nothing to join")
    featured = [corpus.features is not None for corpus in corpora]
    if any(featured) and not all(featured):
        raise UserError("some of the corpora have features and some have not: compute them after joining")
    numbers: dict[str, int] = {}
    store_of: list[int] = []
    row_of: list[int] = []
    image_split: list[str | None] = []
    image_of_text: list[Index] = []
    skipped: Counter[str] = Counter()
    deselected: Counter[str] = Counter()
    for which, corpus in enumerate(corpora):
        place = np.empty(len(corpus.image_ids), dtype=np.int64)
        for row, (key, split) in enumerate(zip(corpus.image_ids, corpus.image_split, strict=True)):
            number = place[row] = numbers.setdefault(key, len(numbers))
            if number == len(store_of):
                store_of.append(which)
                row_of.append(row)
                image_split.append(split)
        image_of_text.append(place[corpus.image_of_text])
        skipped.update(corpus.skipped)
        deselected.update(corpus.deselected)
    picks = np.array(store_of, dtype=np.int64), np.array(row_of, dtype=np.int64)
    try:
        images = JoinedRows([corpus.images for corpus in corpora], *picks)
        features = [corpus.features for corpus in corpora if corpus.features is not None]
        joined_features = JoinedRows(features, *picks) if features else None
    except ValueError as error:
        raise UserError(f"corpora cannot be joined ({error}): build them at one size") from None
    return Corpus(
        images=images,
        image_of_text=np.concatenate(image_of_text),
        texts=_chained(corpus.texts for corpus in corpora),
        sources=_chained(corpus.sources for corpus in corpora),
        text_ids=_chained(corpus.text_ids for corpus in corpora),
        image_ids=list(numbers),
        weights=np.concatenate([corpus.weights for corpus in corpora]),
        image_split=image_split,
        skipped=dict(skipped),
        deselected=dict(deselected),
        features=joined_features,
    )


class _Builder:
    """Columns of a corpus under construction."""

    def __init__(self, size: int, options: BuildOptions) -> None:
        self._progress = options.get("progress")
        self.skipped: Counter[str] = Counter()
        self.deselected: Counter[str] = Counter()
        self._pictures = Pictures(size, options, self.skipped)
        self._image_of_text: list[int] = []
        self._texts: list[Text] = []

    @property
    def pictures(self) -> int:
        """How many pictures there are so far."""
        return len(self._pictures.image_ids)

    def feed(self, entries: list[Entry], splits: Sequence[str | None] | None) -> None:
        """Take rows with their texts: what is unusable is counted, pictures that no text needs are not decoded."""
        chosen = list(usable(entries, splits, self.skipped, self.deselected))
        self._pictures.add(entry.row for entry in chosen)
        for row, texts in chosen:
            number = self._pictures.row_of[row["image_id"]]
            if number is not None:
                for text in texts:
                    self._image_of_text.append(number)
                    # One string per source, not one per row.
                    self._texts.append(text._replace(source=sys.intern(text.source)))
        if self._progress is not None:
            self._progress(len(entries))

    def corpus(self) -> Corpus:
        return Corpus(
            images=self._pictures.store,
            image_of_text=np.array(self._image_of_text, dtype=np.int64),
            texts=[text.text or "" for text in self._texts],
            sources=[text.source for text in self._texts],
            text_ids=[text.key for text in self._texts],
            image_ids=self._pictures.image_ids,
            weights=np.array([text.weight for text in self._texts], dtype=np.float32),
            image_split=self._pictures.splits,
            skipped={reason: count for reason, count in sorted(self.skipped.items()) if count},
            deselected={reason: count for reason, count in sorted(self.deselected.items()) if count},
        )


def _chained(lists: Iterable[list[T]]) -> list[T]:
    return [value for values in lists for value in values]
