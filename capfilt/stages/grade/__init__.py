"""`grade`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class GradeOptions(Checked):
    """Grade scores and verdicts against known truth. Planted noise, expert ratings."""

    panel = ROWS

    images: str = option(REQUIRED, "images part with a `planted` column", kind="images")
    verdicts: str = option("capfilt", "verdicts part over the same images", kind="verdicts")
    filter: str = option("", "checkpoint of the filter that scores the expert ratings", kind="model")
    expert: str = option("", "JSON Lines of image, caption, ratings (Flickr8k-Expert)", kind="path")
    expert_root: str = option("", "folder of the images that `expert` names", kind="path")
    out: str = option("grade", "name of the result in runs/")
    seed: int = option(0, "seed of the bootstrap intervals")


COMMAND = StageCommand(
    ("grade",),
    GradeOptions,
    ("capfilt.stages.grade.stage:Grade",),
    ("capfilt grade --images web --verdicts capfilt --expert itm_expert/data.jsonl --filter filter",),
)
