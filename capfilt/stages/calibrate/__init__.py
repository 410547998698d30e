"""`calibrate`: its options and its record; the stages are in judge.py and stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, Checked, option
from capfilt.stages.command import StageCommand
from capfilt.stages.engine_options import EngineOptions

SIGNALS = (
    "itc_score", "hub_score", "itm_score", "image_neighbours", "text_neighbours", "caption_agreement", "words",
    "unknown_words",
)  # fmt: skip
"""The columns that a text may be judged by (`judging.py`)."""


@dataclass(frozen=True)
class CalibrateOptions(EngineOptions, Checked):
    """Give every text a probability of belonging to its picture, and the corpus a share of true pairs. No labels.

    Filters judge the texts, and human pairs that they never saw. A fit on those pairs turns all signals into one probability,
    which the corpus's own share of true pairs moves (docs/calibration.md).
    """

    panel = ROWS

    images: str = option(REQUIRED, "images part whose texts to judge", kind="images")
    captions: tuple[str, ...] = option((), "captions part of the same images; repeatable", kind="captions")
    filter: tuple[str, ...] = option(
        ("filter",),
        "checkpoint that judges, or a set of one per fold, as NAME-{fold}; repeatable",
        kind="model",
    )
    calibration: str = option(
        REQUIRED, "images part of human pairs that no training of the filter saw", kind="images"
    )
    neighbours: tuple[str, ...] = option(
        (), "images part of human pairs that nothing else here has; repeatable", kind="images"
    )
    calibration_captions: tuple[str, ...] = option(
        (),
        "captions part of the calibration images, by the captioner of --captions; repeatable",
        kind="captions",
        later=True,
    )
    out: str = option("calibrated", "name of the scores part")
    judged: str = option(
        "", "name of the judged parts, NAME-judged and NAME-pairs; default: that of --out", rare=True
    )
    method: str = option("platt", "fit: a logistic curve, or any rising one", choices=("platt", "isotonic"))
    previous: str = option("", "scores part of the round before, to be compared with", kind="scores")
    signals: tuple[str, ...] = option(
        (), "signals to fuse; repeatable; default: all but those of words", choices=SIGNALS
    )
    folds: int = option(4, "folds by image, which the part names for a second round", least=2, rare=True)
    bank: int = option(2048, "random pairs that correct hubs", least=2, rare=True)
    negatives: int = option(10, "foreign texts per calibration picture", least=1, rare=True)
    resamples: int = option(200, "bootstrap draws of the share's interval", least=20, rare=True)
    seed: int = option(0, "seed of bank, foreign texts and bootstrap")

    @property
    def judged_as(self) -> str:
        """The name of the judged parts, without what follows it."""
        return self.judged or self.out


COMMAND = StageCommand(
    ("calibrate",),
    CalibrateOptions,
    (
        "capfilt.stages.calibrate.judge:JudgePairs",
        "capfilt.stages.calibrate.judge:Judge",
        "capfilt.stages.calibrate.stage:Calibrate",
    ),
    (
        "capfilt calibrate --images web --filter judge --calibration held-out --neighbours human",
        "capfilt select --images web --scores calibrated --by match_probability --threshold 0.5",
    ),
)
