"""What a training stage trains on: pairs whose pictures are held, or read from their shards as they are needed.

Both give the same texts; which rows those are is decided in `capfilt/data/`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from capfilt.data.corpus import Batch, Corpus, batches
from capfilt.data.stream import PairStream
from capfilt.data.tokenizer import Encodes
from capfilt.errors import UserError


class Pairs(Protocol):
    """T texts with their pictures."""

    def __len__(self) -> int: ...

    @property
    def skipped(self) -> Mapping[str, int]:
        """What is left out for a fault, by reason."""

    @property
    def deselected(self) -> Mapping[str, int]:
        """What is left out without a fault, by reason."""

    @property
    def pictures(self) -> int:
        """How many pictures have a text."""

    def texts(self) -> Iterator[str]:
        """The texts as found."""

    def texts_by_source(self) -> dict[str, int]:
        """How many texts each source has."""

    def identities(self) -> Iterator[tuple[str, str, str]]:
        """(text_id, image_id, source) of each text, in the order of `Batch.example`."""

    def batches(
        self, tokenizer: Encodes, batch_size: int, rank: int, world: int, parts: int, **options: Any
    ) -> Iterator[Batch]:
        """This rank's share of batches of `batch_size`; `options` as `seed` to `mixing` in `loader.batches`."""


@dataclass
class Held:
    """Pairs of a corpus in memory."""

    corpus: Corpus

    @property
    def skipped(self) -> Mapping[str, int]:
        return self.corpus.skipped

    @property
    def deselected(self) -> Mapping[str, int]:
        return self.corpus.deselected

    @property
    def pictures(self) -> int:
        return len(self.corpus.image_ids)

    def __len__(self) -> int:
        return len(self.corpus)

    def texts(self) -> Iterator[str]:
        return iter(self.corpus.texts)

    def texts_by_source(self) -> dict[str, int]:
        return self.corpus.texts_by_source()

    def identities(self) -> Iterator[tuple[str, str, str]]:
        images = (self.corpus.image_ids[row] for row in self.corpus.image_of_text.tolist())
        return zip(self.corpus.text_ids, images, self.corpus.sources, strict=True)

    def batches(
        self, tokenizer: Encodes, batch_size: int, rank: int, world: int, parts: int, **options: Any
    ) -> Iterator[Batch]:
        return batches(self.corpus, tokenizer, batch_size, rank=rank, world=world, parts=parts, **options)


@dataclass
class Streamed:
    """Pairs read from their shards, at `size` pixels, decoded by `workers` processes (0: threads of this one)."""

    crops: ClassVar[bool] = True  # of whole pictures, by whoever decodes them

    stream: PairStream
    size: int
    workers: int

    @property
    def skipped(self) -> Mapping[str, int]:
        return self.stream.skipped

    @property
    def deselected(self) -> Mapping[str, int]:
        return self.stream.deselected

    @property
    def pictures(self) -> int:
        return self.stream.images

    def __len__(self) -> int:
        return len(self.stream)

    def texts(self) -> Iterator[str]:
        return (text.text or "" for _, text in self.stream.rows())

    def texts_by_source(self) -> dict[str, int]:
        return self.stream.texts_by_source()

    def identities(self) -> Iterator[tuple[str, str, str]]:
        return ((text.key, image_id, text.source) for image_id, text in self.stream.rows())

    def batches(
        self, tokenizer: Encodes, batch_size: int, rank: int, world: int, parts: int, **options: Any
    ) -> Iterator[Batch]:
        # Each rank has row groups of its own, so its share of a step is a batch of its own, however it is split.
        return self.stream.batches(
            tokenizer,
            batch_size // world,
            size=self.size,
            workers=self.workers,
            # Copies from ordinary memory make a GPU wait for them.
            pin_memory=torch.cuda.is_available(),
            rank=rank,
            world=world,
            **options,
        )


def shares(mix: Sequence[str]) -> dict[str, float] | None:
    """`--mix SOURCE=WEIGHT ...` as the loader takes it; None where nothing is given. Raises UserError."""
    found: dict[str, float] = {}
    for item in mix:
        source, equals, weight = item.partition("=")
        try:
            found[source] = float(weight)
        except ValueError:
            equals = ""
        if not equals or not source or not 0 <= found[source] < math.inf:
            raise UserError(
                f"--mix {item}: write SOURCE=WEIGHT, as in human=1, the weight a finite number of 0 or more"
            )
    return found or None
