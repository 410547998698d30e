"""Karpathy's splits (dataset_coco.json and the like): a JSON object of `images`, each with its `sentences`."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from capfilt.errors import UserError
from capfilt.formats import Reading
from capfilt.formats.files import safe_join
from capfilt.formats.source import Found, Given, ListedSource, described, pictures_of, placed
from capfilt.formats.values import text_of


def detect(given: Given) -> bool:
    """Whether one of the first images has sentences."""
    images = given.object.get("images")
    return isinstance(images, list) and any(
        isinstance(image, dict) and "sentences" in image for image in images[:100]
    )


def read(given: Given, reading: Reading) -> ListedSource:
    """A row per image; `restval` is train.

    A picture is at `filepath`/`filename`, or at `filename` where the folder has no such `filepath`. Raises UserError
    when the file is in another layout.
    """
    if not detect(given):
        raise UserError(
            f"{given.path}: has no list `images` with `sentences`: not Karpathy's layout; leave out --format"
        )
    root = pictures_of(given.path, reading)
    folders: dict[str, bool] = {}
    rows = []
    for number, image in enumerate(given.object["images"]):
        entry: dict[str, Any] = image if isinstance(image, dict) else {}
        name, folder = entry.get("filename"), entry.get("filepath")
        described_ = described(f"#{number}", entry, extra=reading.save_additional_columns)
        row = placed(described_, name, root)
        if isinstance(name, str) and isinstance(folder, str) and folder:
            full = placed(described_, f"{folder}/{name}", root)
            if folder not in folders:
                folders[folder] = safe_join(root, folder) is not None and os.path.isdir(root / folder)  # noqa: PTH112
            row = full if folders[folder] or full.file is None else replace(row, key=full.key)
        listed = entry.get("sentences")
        sentences = [each for each in (listed if isinstance(listed, list) else ()) if isinstance(each, dict)]
        texts = tuple(text_of(each["raw"]) for each in sentences if each.get("raw") is not None)
        rows.append(replace(row, captions=texts))
    return ListedSource(given.path, reading, Found(rows))
