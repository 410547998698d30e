"""easy-VQA's list (github.com/vzhou842/easy-VQA): [question, answer, picture's number]."""

from __future__ import annotations

from pathlib import Path

from capfilt.errors import UserError
from capfilt.formats.examples.row import ExampleRow, Examples, counted, no_annotations
from capfilt.formats.source import Given
from capfilt.formats.values import text_of


def detect(given: Given) -> bool:
    """Whether it is a list of lists."""
    return given.opening == "[["


def read(given: Given, annotations: Path | None) -> Examples:
    """An example per list."""
    no_annotations(given, annotations)
    rows = []
    for number, each in enumerate(given.json):
        if not (isinstance(each, list) and len(each) == 3 and isinstance(each[2], int)):
            raise UserError(
                f"{given.path}: entry {number} is not [question, answer, picture's number] (easy-VQA)"
            )
        rows.append(ExampleRow(f"#{number}", (each[2],), text_of(each[0]), counted([each[1]])))
    return "vqa", rows
