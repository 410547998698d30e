"""Rows of tables to texts: which texts a row has, and which of them can be trained on.

One rule for training (`pair_shards.py`) and evaluation (`corpus.py`). No pixels here.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.data.cleaning import clean
from capfilt.data.rows import IMAGE_ROWS, PAIR_ROWS, TEXT_ROWS
from capfilt.errors import UserError
from capfilt.tables.contracts import CONTRACTS, MAX_TEXT_CHARACTERS
from capfilt.tables.ids import text_id

TRAINING_SPLITS: tuple[str | None, ...] = ("train", None)
IMAGES_NEEDED = ("image_id", "source", "captions", "status", "image")
PAIRS_NEEDED = ("image_id", "image", "texts")
CAPTIONS_NEEDED = ("text_id", "image_id", "text")
_SLICE = 128  # pictures decoded together: enough to keep the threads busy, few enough to hold at once


class Text(NamedTuple):
    """A text of a row; `key` is its `text_id`, None where the row is a picture alone and the text is none.

    `probability` is the one that it fits, 0 where nobody judged it. Where `kept` is False, it stands for the texts of a picture
    that a rule dropped, and is empty: the picture stays.
    """

    text: str | None
    source: str
    key: str | None
    weight: float = 1.0
    probability: float = 0.0
    kept: bool = True


class Entry(NamedTuple):
    """A row of a table with `image_id`, perhaps `image`, `split`, `status` and `failure`, and its texts."""

    row: dict[str, Any]
    texts: list[Text]


def image_entries(rows: Iterable[dict[str, Any]]) -> list[Entry]:
    """The found texts of rows of an images table."""
    entries = []
    for row in rows:
        texts = []
        for index, text in enumerate(row["captions"] or []):
            key = text_id(row["image_id"], row["source"], text or "", "", index)
            human = row["source"] == "human"
            texts.append(Text(text, row["source"], key, probability=float(human)))
        entries.append(Entry(row, texts))
    return entries


def pair_entries(rows: Iterable[dict[str, Any]]) -> list[Entry]:
    """The texts of rows of a pairs table."""
    entries = []
    for row in rows:
        texts = []
        for index, found in enumerate(row["texts"] or []):
            found = found or {}
            text, origin, weight = found.get("text"), found.get("source") or "", found.get("weight")
            key = text_id(row["image_id"], origin, text or "", "", index)
            weight = 1.0 if weight is None else weight
            texts.append(Text(text, origin, key, weight, weight))
        entries.append(Entry(row, texts))
    return entries


def picture_entries(rows: Iterable[dict[str, Any]]) -> list[Entry]:
    """The pictures of rows of an images or a pairs table, each with an empty text that stands for none."""
    return [Entry(row, [Text("", row.get("source") or "kept", None)]) for row in rows]


def caption_entries(rows: Iterable[dict[str, Any]]) -> list[Entry]:
    """The texts of rows of a captions table."""
    return [Entry(row, [Text(row["text"], "synthetic", row["text_id"])]) for row in rows]


def weighed(table: pa.Table, where: str) -> pa.Table:
    """A table of pairs as it is; UserError, naming the image and `where` it lies, where a text's weight is not from 0 to 1."""
    if "texts" not in table.column_names:
        return table  # for `slices` to say so
    # As `slices` reads it: a weight of another type is one too.
    texts = _as_promised(table.column("texts"), CONTRACTS["pairs"].schema.field("texts"), "pairs")
    weights = pc.struct_field(pc.list_flatten(texts), "weight")
    odd = pc.fill_null(
        pc.invert(pc.and_(pc.greater_equal(weights, 0), pc.less_equal(weights, 1))), fill_value=False
    )
    if pc.any(odd).as_py():
        place = pc.index(odd, value=True).as_py()
        row = pc.list_parent_indices(texts.combine_chunks())[place].as_py()
        raise UserError(
            f"{where}: a text of image {table.column('image_id')[row].as_py()} has weight "
            f"{weights[place].as_py():g}; the share of epochs that shows the text is 0 to 1, or null for 1"
        )
    return table


def usable(
    entries: Iterable[Entry],
    splits: Sequence[str | None] | None,
    skipped: Counter[str],
    deselected: Counter[str],
    rows: str = PAIR_ROWS,
) -> Iterator[Entry]:
    """The entries that can be trained on, with the texts that can; what is left out is counted by its reason.

    `rows` says as what: a text alone needs no picture, and a picture alone no text.
    """
    for row, texts in entries:
        if rows != TEXT_ROWS and row.get("status") not in (None, "success"):
            skipped[row.get("failure") or row["status"]] += 1
        elif splits is not None and row.get("split") not in splits:
            deselected["split"] += 1
        elif rows == IMAGE_ROWS or not all(text.kept for text in texts):
            yield Entry(row, texts)
        elif not texts:
            deselected["no_text"] += 1
        elif good := [text for text in texts if _is_usable(text, skipped)]:
            yield Entry(row, good)


def _is_usable(text: Text, skipped: Counter[str]) -> bool:
    if text.text is None or not clean(text.text[:MAX_TEXT_CHARACTERS]):
        skipped["empty_text"] += 1
    elif len(text.text) > MAX_TEXT_CHARACTERS:
        skipped["too_long"] += 1
    elif not (math.isfinite(text.weight) and text.weight >= 0):
        skipped["not_finite"] += 1
    else:
        return True
    return False


def slices(
    tables: Iterable[pa.Table],
    name: str,
    needed: Sequence[str],
    optional: Sequence[str],
    wanted: pa.Array | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Rows as dicts, some at a time; only of images in `wanted` where given.

    Raises UserError for a column that is missing, of another type, or null where the contract says it never is.
    """
    schema = CONTRACTS[name].schema
    for table in tables:
        columns = {}
        for column in (*needed, *optional):
            if column in table.column_names:
                columns[column] = _as_promised(table.column(column), schema.field(column), name)
            elif column in needed:
                raise UserError(
                    f"a table of {name} has no column {column!r}, only {', '.join(table.column_names)}"
                )
        chosen = pa.table(columns)
        if wanted is not None:
            chosen = chosen.filter(pc.is_in(chosen.column("image_id"), value_set=wanted))
        for start in range(0, chosen.num_rows, _SLICE):
            yield chosen.slice(start, _SLICE).to_pylist()


def _as_promised(column: pa.ChunkedArray, promised: pa.Field, name: str) -> pa.ChunkedArray:
    if column.type != promised.type:
        try:
            column = column.cast(promised.type)
        except pa.ArrowException:
            raise UserError(
                f"a table of {name} has {promised.name!r} as {column.type}: make it {promised.type}"
            ) from None
    if column.null_count and not promised.nullable:
        raise UserError(
            f"a table of {name} has {column.null_count} nulls in {promised.name!r}: it may have none"
        )
    return column
