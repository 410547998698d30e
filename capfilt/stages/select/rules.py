"""The rules of `select`: which of a picture's texts are kept, and why, once each text has its score.

Not here: the reasons that need no score, the thresholds (`stage.py`), and what is wrong with a caption (`captions.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

EACH, FALLBACK, BEST = "each", "fallback", "best"
RULES = (EACH, FALLBACK, BEST)
"""Every text by itself (BLIP, section 3.3); a synthetic text where no found text is kept (Nguyen et al., NeurIPS 2023, section
4); the best of a picture's found and synthetic texts together (BLIP-2, section 3.4)."""

FOUND_KEPT, BETTER_KEPT = "found_text_kept", "better_text_kept"
IN_PLACE, AMONG_BEST = "in_place_of_found", "among_best"

Bools = npt.NDArray[np.bool_]


def decided(
    rule: str,
    best: int,
    images: Sequence[str],
    text_ids: Sequence[str],
    synthetic: Bools,
    scores: npt.NDArray[np.float64],
    able: Bools,
) -> list[str | None]:
    """By `rule`, one of RULES, a reason for each of T texts, or None where its score alone decides.

    Args:
        best: texts that a picture keeps, at most; with FALLBACK, of its synthetic texts.
        images, text_ids, synthetic, scores: of each text. Equal scores are in the order of text_ids.
        able: [T], whether nothing drops the text and its score is at its threshold.

    The texts that are `able` are kept, but for those with the reason FOUND_KEPT or BETTER_KEPT.
    """
    reasons: list[str | None] = [None] * len(images)
    if rule == EACH:
        return reasons
    found = {images[row] for row in np.flatnonzero(able & ~synthetic).tolist()} if rule == FALLBACK else set()
    places: dict[str, int] = {}
    for row in ranked(np.flatnonzero(able), scores, text_ids):
        image = images[row]
        if rule == FALLBACK and not synthetic[row]:
            continue
        if image in found:
            reasons[row] = FOUND_KEPT
            continue
        place = places[image] = places.get(image, 0) + 1
        reasons[row] = BETTER_KEPT if place > best else AMONG_BEST if rule == BEST else IN_PLACE
    return reasons


def ranked(
    rows: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], text_ids: Sequence[str]
) -> list[int]:
    """`rows`, the highest score first, equal scores in the order of text_ids."""
    return sorted(rows.tolist(), key=lambda row: (-scores[row], text_ids[row]))
