"""`prove`: its options and its record; the stage is stage.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, Checked, option
from capfilt.stages.command import StageCommand

NOISES = ("uniform", "near", "word")


@dataclass(frozen=True)
class ProveOptions(Checked):
    """Hold a calibration against noise planted in human pairs of your own that nothing of it saw.

    Each kind of noise takes a share of the pictures. They get another picture's text, a text of one of the nearest pictures, or
    their own with one word changed. These are human texts; the web's own noise is harder.
    """

    panel = ROWS

    images: str = option(REQUIRED, "images part of human pairs that nothing was trained on", kind="images")
    scores: str = option("calibrated", "scores part that calibrate wrote", kind="scores")
    captions: tuple[str, ...] = option(
        (),
        "captions part of those images, where the calibration has captions; repeatable",
        kind="captions",
        later=True,
    )
    wrong: float = option(0.6, "share of pictures that get a wrong text", above=0, below=1)
    noises: tuple[str, ...] = option(NOISES, "kinds of noise; repeatable", choices=NOISES)
    nearest: int = option(10, "pictures that a near text is taken from", least=1, rare=True)
    threshold: float = option(0.5, "keep texts of at least this match_probability", least=-math.inf)
    seed: int = option(0, "seed of the planted noise")
    out: str = option("proof", "name of the result in runs/")


COMMAND = StageCommand(
    ("prove",),
    ProveOptions,
    ("capfilt.stages.prove.stage:Prove",),
    ("capfilt prove --images kept-back --scores calibrated",),
)
