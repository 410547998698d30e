"""Lists of records that are examples: anybody's own, and those of NLVR, NLVR2, SNLI-VE and ALBEF.

A record has a text (question, sentence or hypothesis), the pictures (`image`, or `images` in order; in NLVR's and NLVR2's own
files they follow from the identifier), `answers` or `label`, `split`, and a key. With a `caption` it is a rating where it has
`ratings`, a choice where it has a `negative_caption`, else a match; with a label and no text it is a classification. How
records are read is `formats/records.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from capfilt.errors import UserError
from capfilt.formats.examples.row import ExampleRow, Examples, counted, no_annotations
from capfilt.formats.places import Place
from capfilt.formats.records import SUFFIXES, EmptyFile, open_records
from capfilt.formats.source import Given
from capfilt.formats.values import optional_text, split_named, text_of, texts_in
from capfilt.tables.contracts import LABELS

KEYS = ("question_id", "identifier", "pair_id", "pairID", "example_id", "item_id", "id")
TEXTS = {"question": "vqa", "hypothesis": "entailment", "sentence2": "entailment", "sentence": "nlvr"}
"""Where a record's text is looked for, and which task that tells (SNLI-VE's own files call the hypothesis sentence2)."""

PICTURE_NAMES = ("Flickr30K_ID", "Flikr30kID")
"""Where SNLI-VE's own files have the name of the picture, with and without its ending, by their version."""

CAPTIONS = ("caption", "text")
"""Where a record's text is looked for else: a caption that is rated, or told from a wrong one, or labelled a match."""

ORDERS = 6
"""NLVR draws every picture with its three boxes in each of their orders."""


def detect(given: Given) -> bool:
    """Whether it is a file of records; a JSON object is none, unless it is one."""
    return given.suffix in SUFFIXES and not any(
        isinstance(value, dict | list) for value in given.object.values()
    )


def read(given: Given, annotations: Path | None) -> Examples:
    """An example per record; a record that cannot be read is a row that says so."""
    no_annotations(given, annotations)
    try:
        records = list(open_records(Place(str(given.path))))
    except EmptyFile:
        raise UserError(f"{given.path}: has no examples") from None
    rows = [
        replace(row, fault=record.fault or "")
        for number, record in enumerate(records)
        for row in _rows(record.fields, number, given.path)
    ]
    return _task([record.fields for record in records], given.path), rows


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
        return [_row(fields, number)]
    # Sentence 72-0 of dev.json is about dev-72-0-0.png to dev-72-0-5.png (NLVR, its README).
    name = path.name.partition(".")[0]
    row = _row({**fields, "image": ""}, number)
    keys = [f"{name}-{row.key}-{order}" for order in range(ORDERS)]
    return [
        replace(row, key=key, images=(f"{key}.png",), split=row.split or split_named(name)) for key in keys
    ]


def _row(fields: Mapping[str, Any], number: int) -> ExampleRow:
    key = next((fields[name] for name in KEYS if fields.get(name) is not None), None)
    images = fields.get("images", fields.get("image"))
    if images is None:
        images = next((str(fields[name]) for name in PICTURE_NAMES if fields.get(name) is not None), None)
    named = images if isinstance(images, list) else [images]
    names = tuple(each for each in named if isinstance(each, str | int) and not isinstance(each, bool))
    split = fields.get("split")
    if images is None and isinstance(key, str) and key.count("-") >= 3:
        # NLVR2 (its README): sentence train-10171-0-0 is about train-10171-0-img0.png and -img1.png.
        stem = key.rpartition("-")[0]
        names = (f"{stem}-img0.png", f"{stem}-img1.png")
        split = split or key.partition("-")[0]
    given = fields.get("answers", fields.get("answer", fields.get("ratings")))
    label = fields.get("label", fields.get("gold_label"))
    wrong = fields.get("negative_caption", fields.get("wrong_texts"))
    return ExampleRow(
        f"#{number}" if key is None else text_of(key),
        names,
        optional_text(
            next((fields[name] for name in (*TEXTS, *CAPTIONS) if fields.get(name) is not None), None)
        ),
        None if given is None else counted(given if isinstance(given, list) else [given]),
        optional_text(label),
        split_named(split),
        wrong_texts=tuple(texts_in(wrong)),
        category=optional_text(fields.get("category", fields.get("answer_type"))),
    )
