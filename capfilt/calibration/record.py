"""Where a scores part keeps its calibration, and how it is read."""

from __future__ import annotations

from typing import Any

from capfilt.errors import UserError
from capfilt.tables.sealed import unseal
from capfilt.tables.shards import Part

FILE = "calibration.json"


def read(part: Part) -> dict[str, Any] | None:
    """The calibration of a scores part; None where it has none. UserError where its bytes have changed.

    Keys: filter, calibration, images, texts, fit (of `fit.Calibration`), share, share_interval, share_bound, cuts (of
    `share.Cut`), warnings.
    """
    path = part.record / FILE
    if not path.is_file():
        return None
    try:
        return unseal(path.read_bytes())
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and run calibrate again") from error
