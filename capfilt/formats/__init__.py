"""Formats of other tools' files: one file per format, in and out; how rows are stored here is `capfilt/tables`.

A format is a module with `detect` and `read`, as `source.Format` and `examples.Format` have them, and a name in a list below.
"""

from __future__ import annotations

from dataclasses import dataclass

from capfilt.options import ROWS, SPLITS, Checked, option

FORMATS = ("karpathy", "coco", "img2dataset", "webdataset", "parquet", "annotation_list", "folder")
"""Pictures with their texts, in the order in which `--format auto` asks whether a source is theirs."""

EXAMPLE_FORMATS = ("class_folders", "daquar", "vqa_v2", "sugarcrepe", "easy_vqa", "labelled")
"""Questions, statements and labels of pictures, in the same manner."""

ANSWERS_APART = ("vqa_v2",)
"""Those of them whose answers are in a file of their own: `read` takes it as well."""


@dataclass(frozen=True)
class Reading(Checked):
    """How to read a source of pictures: the options beside its path."""

    panel = ROWS

    images: str = option("", "folder of the pictures a file names; default: images/ beside it", kind="path")
    image_col: str = option("", "column of the pictures' paths in a list; default: file_name, else image")
    caption_col: tuple[str, ...] = option(
        (), "text columns; repeatable; default: caption, captions, text or texts; '' for none"
    )
    save_additional_columns: tuple[str, ...] = option((), "further metadata column to keep; repeatable")
    splits: tuple[str, ...] = option((), "keep only this split; repeatable; default: all", choices=SPLITS)
    split: str = option("", "split of every row, where the source names none", choices=("", *SPLITS))
    limit: int = option(0, "keep only the first N images; 0: all")
    shard_size: int = option(1000, "rows per shard, the unit of resume", least=1, rare=True)
