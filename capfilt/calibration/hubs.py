"""Hub correction: a cosine less what the picture and the text have with everything else.

A generic text is near many pictures, and a hub of the space is near many texts; neither says that two belong together
(negCLIPLoss, NeurIPS 2024: arXiv 2405.19547).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

TEMPERATURE = 0.07  # CLIP's first one, sec. 2.5; on photographs 0.05 to 0.1 did alike
STRENGTH = 0.5


@dataclass(frozen=True)
class Bank:
    """Random pairs of the corpus that is judged: their image_ids, and unit vectors [N, E] of pictures and texts."""

    image_ids: Sequence[str]
    images: Vectors
    texts: Vectors

    def corrected(self, image_ids: Sequence[str], images: Vectors, texts: Vectors) -> NDArray[np.float64]:
        """float64 [T]: the cosines of unit vectors [T, E] of pictures and texts, less half of the log-mean-exp of the text's
        and the picture's cosines to the bank. A pair of the same image is left out of its own bank.
        """
        places = {image: place for place, image in enumerate(self.image_ids)}
        own = np.array([places.get(image, -1) for image in image_ids])
        cosine = np.einsum("te,te->t", images, texts).astype(np.float64)
        near = _log_mean_exp(images @ self.texts.T, own) + _log_mean_exp(texts @ self.images.T, own)
        out: NDArray[np.float64] = cosine - STRENGTH * near
        return out


def _log_mean_exp(cosines: Vectors, own: NDArray[np.int64]) -> NDArray[np.float64]:
    """float64 [T]: T log mean e^(c/T) over the columns of [T, N] but `own` (-1: none)."""
    scaled = cosines.astype(np.float64) / TEMPERATURE
    rows = np.flatnonzero(own >= 0)
    scaled[rows, own[rows]] = -np.inf
    count = scaled.shape[1] - (own >= 0)
    highest = scaled.max(axis=1)
    total = np.exp(scaled - highest[:, None]).sum(axis=1)
    found: NDArray[np.float64] = TEMPERATURE * (highest + np.log(total) - np.log(count))
    return found
