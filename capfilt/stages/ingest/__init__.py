"""`ingest`: its options and its record; the stage is stage.py."""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.formats import FORMATS
from capfilt.options import PICTURES, REQUIRED, ROWS, SPLITS, Checked, option
from capfilt.stages.command import StageCommand


@dataclass(frozen=True)
class IngestOptions(Checked):
    """Bring other tools' images and captions into an images part."""

    panel = ROWS

    source_path: str = option(
        REQUIRED, "captions JSON, folder of images, image list, img2dataset, tars or Parquet", kind="path"
    )
    dataset: str = option(REQUIRED, "name of the images part to write")
    images: str = option("", "folder of the pictures a file names; default: images/ beside it", kind="path")
    format: str = option("auto", "format of the source", choices=("auto", *FORMATS))
    source: str = option("human", "who wrote the texts", choices=("human", "web"))
    image_col: str = option("", "column of the pictures' paths in a list; default: file_name, else image")
    caption_col: tuple[str, ...] = option(
        (), "text columns; repeatable; default: caption, captions, text or texts; '' for none"
    )
    save_additional_columns: tuple[str, ...] = option((), "further metadata column to keep; repeatable")
    splits: tuple[str, ...] = option((), "keep only this split; repeatable; default: all", choices=SPLITS)
    split: str = option("", "split of every row, where the source names none", choices=("", *SPLITS))
    limit: int = option(0, "keep only the first N images; 0: all")
    shard_size: int = option(1000, "rows per shard, the unit of resume", least=1, rare=True)
    max_side: int = option(
        0, "shrink pictures to this longer side in pixels; 0: keep the bytes", panel=PICTURES
    )
    max_pixels: int = option(
        64_000_000, "a larger picture fails as too_many_pixels", least=1, panel=PICTURES, rare=True
    )


COMMAND = StageCommand(
    ("ingest",),
    IngestOptions,
    ("capfilt.stages.ingest.stage:Ingest",),
    (
        "capfilt ingest captions_train2017.json --images train2017 --dataset coco",
        "capfilt ingest img2dataset_output --dataset cc3m --source web",
    ),
    positional="source_path",
    out=True,
)
