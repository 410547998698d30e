"""DAQUAR's text file (Malinowski and Fritz, arXiv 1410.0210): a line with a question, a line with its answer."""

from __future__ import annotations

import re

from capfilt.errors import UserError
from capfilt.formats.examples.row import ExampleRow, Examples
from capfilt.formats.source import Given
from capfilt.formats.values import decoded

_NAME = re.compile(r"(?:\b(?:in|on|of)\s+)?(?:\b(?:this|th\s*e)\s*)?(image\d+)")
"""A picture's name with what leads to it; one of the file's slips is "in th eimage999"."""


def detect(given: Given) -> bool:
    """Whether it is a text file."""
    return given.suffix == ".txt"


def read(given: Given) -> Examples:
    """An example per question.

    The picture is the last one that the question names ("... in the image3 ?"); names are left out of the text. A question
    that names none is a row without a picture, as the file has slips. An answer of several parts ("cup, book") is one
    answer, its parts in the alphabet's order: their set is what is right. Raises UserError where no question names a picture.
    """
    path = given.path
    lines = [line.strip() for line in decoded(path.read_bytes()).splitlines()]
    lines = [line for line in lines if line]
    split = next((name for name in ("train", "test") if name in path.stem), None)
    rows = []
    for number, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=False)):
        named = _NAME.findall(question)[-1:]
        text = f"{' '.join(_NAME.sub(' ', question).split()).strip(' ,?')} ?"
        rows.append(
            ExampleRow(f"{split}-{number}", tuple(named), text, ((in_parts(answer), 1),), split=split)
        )
    if rows and not any(row.images for row in rows):
        raise UserError(
            f"{path}: names no picture (... in the image3 ?): {rows[0].text!r}; DAQUAR's file has a line with a question, "
            "then one with its answer"
        )
    if not rows or len(lines) % 2:
        raise UserError(f"{path}: has {len(lines)} lines, not pairs of a question and its answer (DAQUAR)")
    return "vqa", rows


def in_parts(answer: str) -> str:
    """An answer that is a set, as one text: its parts in the alphabet's order."""
    return ", ".join(sorted(part.strip() for part in answer.split(",") if part.strip()))
