"""Pictures in folders named by their classes, as torchvision's ImageFolder has them, perhaps in folders of splits."""

from __future__ import annotations

from capfilt.errors import UserError
from capfilt.formats.examples.row import ExampleRow, Examples
from capfilt.formats.files import walk
from capfilt.formats.source import Given
from capfilt.formats.values import split_named, storable


def detect(given: Given) -> bool:
    """Whether it is a folder."""
    return not given.is_file


def read(given: Given) -> Examples:
    """A classification of every picture that is in a folder."""
    rows = []
    for name in map(storable, walk(given.path).pictures):
        *folders, _ = name.split("/")
        split = split_named(folders[0]) if len(folders) > 1 else None
        if folders:
            rows.append(ExampleRow(name, (name,), label=folders[1] if split else folders[0], split=split))
    if not rows:
        raise UserError(f"{given.path}: has no pictures in folders; a class is a folder of its pictures")
    return "classification", rows
