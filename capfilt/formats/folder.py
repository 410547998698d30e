"""A folder of pictures, with texts beside them or in metadata, as Hugging Face's `imagefolder` has them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath

from capfilt.errors import UserError
from capfilt.formats import Reading, annotation_list
from capfilt.formats.files import MAX_TEXT_BYTES, kind_in_words, read_file, same_name, walk
from capfilt.formats.source import Found, Given, ListedSource, SourceRow, placed
from capfilt.formats.values import decoded, folder_split
from capfilt.tables.workspace import expanded

_METADATA = re.compile(r"metadata\.(csv|tsv|jsonl|parquet)(\.\w+)?")


def detect(given: Given) -> bool:
    """Whether it is a folder."""
    return not given.is_file


def read(given: Given, reading: Reading) -> ListedSource:
    """A row per picture below the folder. A file of records given in its place is read as an annotation list.

    Each folder may have a `metadata.csv` (or tsv, jsonl, Parquet) that names its pictures; those it does not name are rows
    too. Their texts, and all where there is no metadata, are the lines of `a/b.txt` for `a/b.jpg`. A folder called train, val
    or test (or the like) is the split, unless a column `split` says otherwise.
    """
    if given.is_file:
        return annotation_list.read(given, reading)
    root = expanded(reading.images) if reading.images else given.path
    listing = walk(root)
    files = listing.others if root == given.path else walk(given.path).others
    tables = [name for name in files if _METADATA.fullmatch(PurePosixPath(name).name)]
    rows: list[SourceRow] = []
    folders: dict[str, str] = {}
    for table in tables:
        folder, _, name = table.rpartition("/")
        other = folders.setdefault(folder, name)
        if other != name:
            raise UserError(f"{given.path / folder}: has {other} and {name}; keep one of them")
        for row in annotation_list.table_rows(given.path / table, root / folder, reading):
            key = f"{folder}/{row.key}" if folder else row.key
            rows.append(replace(row, key=key, split=row.split or folder_split(key)))
    named = {row.file for row in rows}
    nothing = dict.fromkeys(reading.save_additional_columns)
    texts = {same_name(name[:-4]): name for name in listing.others if name.lower().endswith(".txt")}
    used = {*tables}
    for name in listing.pictures:
        file = root / name
        if file not in named:
            without = name[: -len(file.suffix)] if file.suffix else name
            text = texts.get(same_name(without)) or texts.get(same_name(name))
            used.add(text or "")
            lines = () if text is None else _lines(root / text)
            row = SourceRow(name, lines, folder_split(name), extra=nothing)
            rows.append(placed(row, name, root))
    listing.left_out.update(kind_in_words(name) for name in listing.others if name not in used)
    return ListedSource(given.path, reading, Found(rows, listing.left_out))


def _lines(path: Path) -> tuple[str, ...]:
    data = read_file(path, MAX_TEXT_BYTES)
    if not isinstance(data, bytes):
        return ()
    return tuple(line for line in decoded(data).splitlines() if line.strip())
