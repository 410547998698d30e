"""Where a scores part keeps its calibration, and how it is read."""

from __future__ import annotations

from typing import Any

from capfilt.errors import UserError
from capfilt.tables.sealed import unseal
from capfilt.tables.shards import Part

FILE = "calibration.json"


def read(part: Part) -> dict[str, Any] | None:
    """The calibration of a scores part; None where it has none that this capfilt reads. UserError where its bytes changed.

    Keys: filter, calibration, images, texts, fit (of `capfilt.calibration.fit.Calibration`), share, share_interval,
    share_bound, curve (of its `Bin`, at that share) and its error, cuts (of `capfilt.calibration.share.Cut`), warnings.
    """
    path = part.record / FILE
    if not path.is_file():
        return None
    try:
        made = unseal(path.read_bytes())
        # Version 1 of `calibrate`, which no release had, told its error on the pairs that it was fitted to.
        return made if "error" in made else None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run calibrate again") from error
