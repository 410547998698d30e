"""What human pairs near a picture and a text say of the two (LEMoN, ICML 2025: arXiv 2407.18941, there of one noisy corpus).

A picture like this one has human texts: is the text like those? A text like this one has a human picture: is the picture like
that? Neither needs a model that was trained on pairs. Not here: where vectors come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

PICTURES, TEXTS = 10, 30
"""Neighbours of a picture, and of a text."""
DECAY = 5.0
"""How fast a text's neighbours lose their say: e^(-DECAY * (1 - cosine))."""


@dataclass(frozen=True)
class Neighbours:
    """Human pairs.

    Attributes:
        image_ids: of the pictures.
        pictures: unit vectors [N, D].
        owners: int [M], each text's picture, in order.
        words: the texts, folded (`capfilt.tables.texts.folded`).
        texts: unit vectors [M, E].
    """

    image_ids: Sequence[str]
    pictures: Vectors
    owners: NDArray[np.int64]
    words: Sequence[str]
    texts: Vectors

    @cached_property
    def _places(self) -> dict[str, int]:
        return {image: place for place, image in enumerate(self.image_ids)}

    @cached_property
    def _said(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for place, words in enumerate(self.words):
            found.setdefault(words, []).append(place)
        return found

    def agreement(
        self, image_ids: Sequence[str], words: Sequence[str], pictures: Vectors, texts: Vectors
    ) -> NDArray[np.float64]:
        """float64 [T, 2] of T texts, folded, with unit vectors of their pictures [T, D] and of themselves [T, E].

        First, over the PICTURES nearest human pictures, the mean of the text's best cosine with a text of each. Second, over
        the TEXTS nearest human texts, the mean cosine of the picture with their pictures, where nearer texts weigh more.
        The picture itself and texts of the same words are no neighbours. 0 without a neighbour.
        """
        alike, said = pictures @ self.pictures.T, texts @ self.texts.T
        for row, image in enumerate(image_ids):
            if image in self._places:
                place = self._places[image]
                alike[row, place] = -np.inf
                said[row, self.owners == place] = -np.inf
            said[row, self._said.get(words[row], [])] = -np.inf
        return np.stack([self._of_pictures(alike, said), self._of_texts(alike, said)], axis=1)

    def _of_pictures(self, alike: Vectors, said: Vectors) -> NDArray[np.float64]:
        first = np.flatnonzero(np.append(True, np.diff(self.owners) > 0))
        best = np.full(alike.shape, -np.inf, np.float32)
        best[:, self.owners[first]] = np.maximum.reduceat(said, first, axis=1)
        alike = np.where(np.isfinite(best), alike, -np.inf)
        near = _largest(alike, PICTURES)
        return _mean(np.take_along_axis(best, near, 1), np.isfinite(np.take_along_axis(alike, near, 1)))

    def _of_texts(self, alike: Vectors, said: Vectors) -> NDArray[np.float64]:
        near = _largest(said, TEXTS)
        cosine = np.take_along_axis(said, near, 1)
        weight = np.where(np.isfinite(cosine), np.exp(DECAY * (cosine - 1.0)), 0.0)
        return _mean(np.take_along_axis(alike, self.owners[near], 1), weight)


def _largest(values: Vectors, count: int) -> NDArray[np.int64]:
    """The columns of the largest values of each row, equal ones by their place."""
    found: NDArray[np.int64] = np.argsort(-values, axis=1, kind="stable")[:, :count]
    return found


def _mean(values: NDArray[np.float32], weights: NDArray[np.generic]) -> NDArray[np.float64]:
    weight = np.where(np.isfinite(values), weights, 0.0).astype(np.float64)
    total = weight.sum(axis=1)
    summed = np.where(weight > 0, values.astype(np.float64), 0.0)
    out: NDArray[np.float64] = (summed * weight).sum(axis=1) / np.where(total > 0, total, 1.0)
    return out
