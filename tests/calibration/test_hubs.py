"""Would catch: a bank that a pair is compared with itself in, a mean over texts in place of their exponentials."""

from __future__ import annotations

import math

import numpy as np
import pytest

from capfilt.calibration.hubs import Bank


def unit(rng, *shape):
    found = rng.normal(size=shape).astype(np.float32)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_it_is_a_plain_loop():
    rng = np.random.default_rng(0)
    bank = Bank(["a", "b", "c", "d"], unit(rng, 4, 8), unit(rng, 4, 8))
    images, texts, ids = unit(rng, 3, 8), unit(rng, 3, 8), ["x", "c", "y"]
    found = bank.corrected(ids, images, texts)
    for row, image in enumerate(ids):
        others = [n for n, name in enumerate(bank.image_ids) if name != image]
        near = 0.0
        for one, many in ((images[row], bank.texts), (texts[row], bank.images)):
            near += 0.07 * math.log(sum(math.exp(float(one @ many[n]) / 0.07) for n in others) / len(others))
        assert found[row] == pytest.approx(float(images[row] @ texts[row]) - 0.5 * near, abs=1e-6)


def test_a_generic_text_loses_to_one_that_fits():
    """A text near every picture has a high cosine with each, and says nothing of any."""
    rng = np.random.default_rng(1)
    images = unit(rng, 200, 16)
    generic = images.mean(axis=0, keepdims=True)
    generic /= np.linalg.norm(generic)
    images = images + 2 * generic
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    bank = Bank([str(n) for n in range(200)], images, images)
    fits = images[:1] - 0.7 * generic
    fits /= np.linalg.norm(fits)
    cosines = [float(images[0] @ fits[0]), float(images[0] @ generic[0])]
    corrected = [float(bank.corrected(["0"], images[:1], text)[0]) for text in (fits, generic)]
    assert cosines[0] < cosines[1]
    assert corrected[0] > corrected[1]
