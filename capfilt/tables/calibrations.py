"""Where a scores part keeps its calibration, and how it is read."""

from __future__ import annotations

from typing import Any

from capfilt.errors import UserError
from capfilt.tables.sealed import unseal
from capfilt.tables.shards import Part

FILE = "calibration.json"


def read(part: Part) -> dict[str, Any] | None:
    """The calibration of a scores part; None where it has none that this capfilt reads. UserError where its bytes changed.

    Keys: filter, calibration, images, texts, those of `capfilt.calibration.judgement.Judgement` and of its figures, warnings.
    """
    path = part.record / FILE
    if not path.is_file():
        return None
    try:
        made = unseal(path.read_bytes())
        # Before version 3 of `calibrate`, which no release had, there was one signal.
        return made if "fusion" in made else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run calibrate again") from error
