"""`duplicates`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class DuplicatesOptions(Checked):
    """Find exact and near duplicates in an images part. No pixels are read, no model is needed."""

    panel = ROWS

    images: str = option(REQUIRED, "images part", kind="images")
    out: str = option("duplicates", "name of the signals part to write")
    # Equal pictures saved at other sizes and qualities differ in 0 to 4 bits; unrelated ones in 32 on average.
    distance: int = option(4, "two pictures are near if at most N of 64 hash bits differ", most=10)


COMMAND = StageCommand(
    ("duplicates",),
    DuplicatesOptions,
    ("capfilt.stages.duplicates.stage:Duplicates",),
    ("capfilt duplicates --images cc12m", "capfilt duplicates --images cc12m --distance 0 --out exact"),
)
