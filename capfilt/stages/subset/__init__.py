"""`subset`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import REQUIRED, ROWS, SPLITS, TEXTS, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class SubsetOptions(Checked):
    """Take a share of an images part, and plant known noise in it.

    A filter is measured where truth is known. The column `planted` of the new part says what was done to each text: true,
    other_image, truncated, file_name or changed_word. Only `grade` reads it.

    Wrong texts come from the share that is kept, or from images set aside with --donors-from and --donors-to.
    """

    panel = ROWS

    images: str = option(REQUIRED, "images part to take from", kind="images")
    dataset: str = option(REQUIRED, "name of the images part to write")
    role: str = option("human", "source of the new part's texts", choices=("human", "web"))
    splits: tuple[str, ...] = option((), "keep only this split; repeatable; default: all", choices=SPLITS)
    share_from: float = option(0.0, "keep images whose hash, as a number in [0, 1), is at least this", most=1)
    share_to: float = option(1.0, "keep images whose hash, as a number in [0, 1), is below this", most=1)
    texts: int = option(0, "keep at most N texts per image; 0: all")
    wrong: float = option(0.0, "share of images that get another image's texts", most=1, panel=TEXTS)
    truncated: float = option(0.0, "share of images whose texts are cut short", most=1, panel=TEXTS)
    file_name: float = option(0.0, "share of images whose texts become a file name", most=1, panel=TEXTS)
    changed_word: float = option(
        0.0, "share of images whose texts get one word swapped for another of its kind", most=1, panel=TEXTS
    )
    donors_from: float = option(
        0.0, "take wrong texts from images whose hash is at least this", most=1, panel=TEXTS
    )
    donors_to: float = option(
        0.0, "take wrong texts from images whose hash is below this; default: those kept", most=1, panel=TEXTS
    )
    seed: int = option(0, "seed of the planted noise", panel=TEXTS)


COMMAND = StageCommand(
    ("subset",),
    SubsetOptions,
    ("capfilt.stages.subset.stage:Subset",),
    (
        "capfilt subset flickr --dataset human --share-to 0.15 --splits train",
        "capfilt subset flickr --dataset web --share-from 0.15 --wrong 0.5 --role web",
        "capfilt subset flickr --dataset web --share-from 0.15 --share-to 0.8 --wrong 0.5 --donors-from 0.8 --donors-to 1",
    ),
    positional="images",
    out=True,
)
