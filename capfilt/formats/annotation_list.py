"""Annotation lists: records that name a picture and have its texts.

BLIP's, ALBEF's and LAVIS's JSON lists of {"image", "caption", "image_id"} are such, and tables (csv, tsv, jsonl, Parquet) with
a column of file names. How records are read is `records.py`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from capfilt.formats import Reading
from capfilt.formats.places import Place
from capfilt.formats.records import FILE, SUFFIXES, open_records
from capfilt.formats.source import Found, Given, ListedSource, SourceRow, described, pictures_of, placed
from capfilt.formats.values import caption_columns, folder_split, require

IMAGE_COLUMNS = ("file_name", "image", "image_path", "filename")
"""Where a picture is named when nothing is said: the first of these that is there, in capitals or not."""


def detect(given: Given) -> bool:
    """Whether it is a file of records; a JSON object is none, unless it names a picture."""
    if given.suffix == ".txt" or given.suffix not in SUFFIXES:
        return False
    return not given.object or any(name in given.object for name in IMAGE_COLUMNS)


def read(given: Given, reading: Reading) -> ListedSource:
    """A row per picture, with the texts of all records that name it, from the folder `images` beside the file or its own.

    Raises UserError where no column names pictures, or none has texts.
    """
    rows = table_rows(given.path, pictures_of(given.path, reading), reading)
    return ListedSource(given.path, reading, Found(rows))


def table_rows(path: Path, root: Path, reading: Reading) -> list[SourceRow]:
    """The rows of a file of records about the pictures in `root`; a record that cannot be read is a row that says so."""
    found = open_records(Place(str(path)))
    spelled = {name.strip().lower(): name.strip() for name in reversed(found.names)}
    usual = (spelled[name] for name in IMAGE_COLUMNS if name in spelled)
    image_col = reading.image_col or next(usual, IMAGE_COLUMNS[0])
    found.key = (image_col, FILE)
    records = [(record, {name.strip(): value for name, value in record.fields.items()}) for record in found]
    further = (name for _, fields in records for name in fields)
    names = list(dict.fromkeys([*map(str.strip, found.names), *further]))
    require(names, (image_col,), path, "--image-col")
    columns = caption_columns(names, reading.caption_col, path)
    require(names, reading.save_additional_columns, path, "--save-additional-columns")
    rows: dict[Path | str, SourceRow] = {}
    for number, (record, fields) in enumerate(records):
        row = described(f"#{number}", fields, columns, reading.save_additional_columns)
        if record.fault is not None:
            row = row.failed("decode_error", f"record {record.number} of {path.name}: {record.fault}")
        else:
            row = placed(row, fields.get(image_col), root)
        first = rows.get(row.file or row.key)
        if first is not None:
            row = replace(first, captions=first.captions + row.captions)
        rows[row.file or row.key] = replace(row, split=row.split or folder_split(row.key))
    return list(rows.values())
