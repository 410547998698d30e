"""Layouts of examples that are no lists of records: DAQUAR's text, easy-VQA's lists, NLVR's orders of boxes, SugarCrepe's
numbered pairs of captions.

What is read here is described, not judged, as in `example_formats`, which comes here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.tables.example_row import ExampleRow, counted
from capfilt.tables.formats import split_named, text_of, texts_in

ORDERS = 6
"""NLVR draws every picture with its three boxes in each of their orders."""


def is_nlvr(record: Any) -> bool:
    """Whether it is a record of NLVR's own files, which has all of a picture's orders at once."""
    return (
        isinstance(record, dict) and "structured_rep" in record and isinstance(record.get("identifier"), str)
    )


def nlvr_rows(row: ExampleRow, name: str) -> list[ExampleRow]:
    """A row per order of the boxes of a record of NLVR's own file, which is called `name`.json.

    Sentence 72-0 of dev.json is about dev-72-0-0.png to dev-72-0-5.png (NLVR, its README).
    """
    keys = [f"{name}-{row.key}-{order}" for order in range(ORDERS)]
    split = row.split or split_named(name)
    return [replace(row, key=key, images=(f"{key}.png",), split=split) for key in keys]


def daquar_rows(path: Path) -> list[ExampleRow]:
    """Rows of DAQUAR's text file (Malinowski and Fritz, arXiv 1410.0210): a line with a question, a line with its answer.

    The picture is the last one that the question names ("... in the image3 ?"); names are left out of the text. A question
    that names none is a row without a picture, as the file has slips. An answer of several parts ("cup, book") is one
    answer, its parts in the alphabet's order: their set is what is right. Raises UserError where no question names a picture.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    lines = [line for line in lines if line]
    split = next((name for name in ("train", "test") if name in path.stem), None)
    rows = []
    for number, (question, answer) in enumerate(zip(lines[::2], lines[1::2], strict=False)):
        named = _DAQUAR.findall(question)[-1:]
        text = f"{' '.join(_DAQUAR.sub(' ', question).split()).strip(' ,?')} ?"
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
    return rows


_DAQUAR = re.compile(r"(?:\b(?:in|on|of)\s+)?(?:\b(?:this|th\s*e)\s*)?(image\d+)")
"""A picture's name with what leads to it; one of the file's slips is "in th eimage999"."""


def in_parts(answer: str) -> str:
    """An answer that is a set, as one text: its parts in the alphabet's order."""
    return ", ".join(sorted(part.strip() for part in answer.split(",") if part.strip()))


def easy_rows(data: list[Any], path: Path) -> list[ExampleRow]:
    """Rows of easy-VQA's list (github.com/vzhou842/easy-VQA): [question, answer, picture's number]."""
    rows = []
    for number, each in enumerate(data):
        if not (isinstance(each, list) and len(each) == 3 and isinstance(each[2], int)):
            raise UserError(f"{path}: entry {number} is not [question, answer, picture's number] (easy-VQA)")
        rows.append(ExampleRow(f"#{number}", (each[2],), text_of(each[0]), counted([each[1]])))
    return rows


def is_sugarcrepe(data: Any) -> bool:
    """Whether it is what SugarCrepe's own files hold: records by their numbers."""
    first = next(iter(data.values()), None) if isinstance(data, dict) else None
    return isinstance(first, dict) and "negative_caption" in first


def sugarcrepe_rows(data: Mapping[str, Any], path: Path) -> list[ExampleRow]:
    """Rows of one of SugarCrepe's files (github.com/RAIVNLab/sugar-crepe): its name is the category of all of them."""
    rows = []
    for number, record in data.items():
        fields = record if isinstance(record, dict) else {}
        image, text = fields.get("filename"), fields.get("caption")
        rows.append(
            ExampleRow(
                f"{path.stem}:{number}",
                (image,) if isinstance(image, str) else (),
                None if text is None else text_of(text),
                wrong_texts=tuple(texts_in(fields.get("negative_caption"))),
                category=path.stem,
            )
        )
    return rows
