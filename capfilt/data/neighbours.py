"""The neighbours of pictures whose texts were dropped: the trusted pictures that look most alike, and their texts.

Not here: the loss that these texts are for (`capfilt.models.common.objectives`), how pictures' features are made (`pairs.py`).
Source: IN2R (2026), mean pooling; its constants are those below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from capfilt.data.store import ArrayStore
from capfilt.errors import UserError

NEIGHBOURS = 5
TRUSTED = 0.9
"""A text is a neighbour's where the probability that it fits is above this; a human text's is 1."""
DOUBTED = 0.5
"""A soft target weighs this much of the probability that the dropped text does not fit."""
SOFT_FROM = 0.3
"""The share of the steps before the first soft target: the model that makes targets has learned something by then."""
_BLOCK = 256

T = TypeVar("T")


class Neighbours(Generic[T]):
    """Of every dropped picture the NEIGHBOURS nearest trusted pictures, by the cosine of their features.

    Features are the means of a frozen trunk's over a picture's tokens, less the trusted pictures' mean.

    Args:
        dropped: the dropped pictures: number in `features` to image_id.
        trusted: (number, image_id, text) of every trusted text. A picture of the same image_id is no neighbour.
        features: float16 [P, N, C] of all pictures.

    Raises UserError where there are no more than NEIGHBOURS trusted pictures.
    """

    def __init__(
        self, dropped: Mapping[int, str], trusted: Iterable[tuple[int, str, T]], features: ArrayStore
    ) -> None:
        names: dict[int, str] = {}
        self._texts: dict[int, list[T]] = {}
        for picture, image_id, text in trusted:
            names[picture] = image_id
            self._texts.setdefault(picture, []).append(text)
        if len({*names.values()}) <= NEIGHBOURS:
            raise UserError(
                f"--dropped soft: {len({*names.values()})} pictures have a trusted text, human or of a probability above "
                f"{TRUSTED}, and {NEIGHBOURS + 1} are needed; train with --dropped negatives"
            )
        bank = np.array(list(names))
        known = _vectors(features, bank)
        mean = known.mean(axis=0)
        known = _unit(known - mean)
        self._near: dict[int, list[int]] = {}
        asked = np.array(list(dropped))
        for start in range(0, len(asked), _BLOCK):
            some = asked[start : start + _BLOCK]
            cosines = _unit(_vectors(features, some) - mean) @ known.T
            for picture, row in zip(some.tolist(), cosines, strict=True):
                # Ties go by number, so that every process finds the same.
                order = bank[np.argsort(-row, kind="stable")].tolist()
                others = (each for each in order if names[each] != dropped[picture])
                self._near[picture] = [each for each, _ in zip(others, range(NEIGHBOURS), strict=False)]

    def texts(self, picture: int, seed: Sequence[int]) -> list[T]:
        """A text of each neighbour of a dropped picture, drawn by the seed."""
        draw = np.random.default_rng(seed)
        own = [self._texts[near] for near in self._near[picture]]
        return [some[int(draw.integers(len(some)))] for some in own]


def _vectors(features: ArrayStore, pictures: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """fp32 [n, C], read some pictures at a time: a trunk's maps are large."""
    blocks = [pictures[start : start + _BLOCK] for start in range(0, len(pictures), _BLOCK)]
    return np.concatenate([features.read(some).astype(np.float32).mean(axis=1) for some in blocks])


def _unit(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float32] = (rows / np.maximum(lengths, 1e-12)).astype(np.float32)
    return unit
