"""easy-VQA's list (github.com/vzhou842/easy-VQA): [question, answer, picture's number]."""

from __future__ import annotations

from capfilt.errors import UserError
from capfilt.formats.examples.row import Examples, example
from capfilt.formats.source import Given
from capfilt.formats.values import text_of


def detect(given: Given) -> bool:
    """Whether it is a list of lists."""
    return given.opening == "[["


def read(given: Given) -> Examples:
    """An example per list."""
    rows = []
    for number, each in enumerate(given.json):
        if not (isinstance(each, list) and len(each) == 3 and isinstance(each[2], int)):
            raise UserError(
                f"{given.path}: entry {number} is not [question, answer, picture's number] (easy-VQA)"
            )
        fields = {"question": text_of(each[0]), "answers": [each[1]], "image": each[2]}
        rows.append(example(fields, number))
    return "vqa", rows
