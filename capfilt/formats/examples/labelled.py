"""Lists of records that are examples: anybody's own, and those of NLVR, NLVR2, SNLI-VE and ALBEF.

A record has a text (question, sentence or hypothesis), the pictures (`image`, or `images` in order; in NLVR's and NLVR2's own
files they follow from the identifier), `answers` or `label`, `split`, and a key. With a `caption` it is a rating where it has
`ratings`, a choice where it has a `negative_caption`, else a match; with a label and no text it is a classification. Of
ratings a `caption_id` tells whether the caption is the picture's own. How records are read is `formats/records.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.formats.examples.row import CAPTIONS, TEXTS, ExampleRow, Examples, example, own_captions
from capfilt.formats.places import Place
from capfilt.formats.records import SUFFIXES, EmptyFile, open_records
from capfilt.formats.source import Given
from capfilt.formats.values import split_named
from capfilt.tables.contracts import LABELS, OWN_CAPTION

ORDERS = 6
"""NLVR draws every picture with its three boxes in each of their orders."""


def detect(given: Given) -> bool:
    """Whether it is a file of records; a JSON object is none, unless it is one."""
    return given.suffix in SUFFIXES and not any(
        isinstance(value, dict | list) for value in given.object.values()
    )


def read(given: Given) -> Examples:
    """An example per record; a record that cannot be read is a row that says so."""
    try:
        records = list(open_records(Place(str(given.path))))
    except EmptyFile:
        raise UserError(f"{given.path}: has no examples") from None
    fields = [record.fields for record in records]
    task = _task(fields, given.path)
    own = own_captions(fields) if task == "rating" else [False] * len(records)
    rows = [
        replace(row, fault=record.fault or "", category=OWN_CAPTION if owned else row.category)
        for number, (record, owned) in enumerate(zip(records, own, strict=True))
        for row in _rows(record.fields, number, given.path)
    ]
    return task, rows


def _task(records: list[dict[str, Any]], path: Path) -> str:
    for record in records:
        for name, task in TEXTS.items():
            if record.get(name) is not None:
                # ALBEF's lists for SNLI-VE call a hypothesis a sentence too; their labels tell.
                entails = task == "nlvr" and str(record.get("label")).lower() in LABELS["entailment"]
                return "entailment" if entails else task
    for record in records:
        captioned = any(record.get(name) is not None for name in CAPTIONS)
        if captioned and record.get("ratings") is not None:
            return "rating"
        if captioned and (record.get("negative_caption") or record.get("wrong_texts")):
            return "choice"
        if record.get("label") is not None:
            return "match" if captioned else "classification"
    raise UserError(
        f"{path}: no record has {', '.join(TEXTS)}, a caption with ratings or a negative_caption, or a label: it holds no "
        "examples"
    )


def _rows(fields: Mapping[str, Any], number: int, path: Path) -> list[ExampleRow]:
    """The record's example; where it is NLVR's own, an example per order of the boxes."""
    if "structured_rep" not in fields or not isinstance(fields.get("identifier"), str):
        return [example(fields, number)]
    # Sentence 72-0 of dev.json is about dev-72-0-0.png to dev-72-0-5.png (NLVR, its README).
    name = path.name.partition(".")[0]
    row = example({**fields, "image": ""}, number)
    keys = [f"{name}-{row.key}-{order}" for order in range(ORDERS)]
    return [
        replace(row, key=key, images=(f"{key}.png",), split=row.split or split_named(name)) for key in keys
    ]
