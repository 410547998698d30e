"""Formats of other tools' files: one file per format, in and out; how rows are stored here is `capfilt/tables`.

A format is a module with `detect` and `read`, as `source.Format` and `examples.Format` have them, and a name in a list below.
"""

from __future__ import annotations

FORMATS = ("karpathy", "coco", "img2dataset", "webdataset", "parquet", "annotation_list", "folder")
"""Pictures with their texts, in the order in which `--format auto` asks whether a source is theirs."""

EXAMPLE_FORMATS = ("class_folders", "daquar", "vqa_v2", "sugarcrepe", "easy_vqa", "labelled")
"""Questions, statements and labels of pictures, in the same manner."""
