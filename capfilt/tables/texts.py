"""The texts of an images shard: those found with the pictures, and synthetic ones from captions parts; when two are equal.

What a text is worth is not known here; `score` and `select` ask the same function for the same rows.
"""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from capfilt.tables.ids import text_id

TEXT_SCHEMA = pa.schema(
    [
        pa.field("text_id", pa.string()),
        pa.field("image_id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("text", pa.string()),
        pa.field("failure", pa.string()),
    ]
)
"""Rows of `found_texts` and `texts_of`; `failure` is a synthetic text's own."""

FOUND_COLUMNS = ("image_id", "source", "captions")
"""What `found_texts` reads of an images shard."""


def folded(text: str) -> str:
    """A text without what no reader sees: in one case, its words one space apart."""
    return " ".join(text.casefold().split())


def found_texts(images: pa.Table) -> pa.Table:
    """The texts found with the pictures, one row each, in the order of `images` and of each picture's list.

    `images` needs the columns FOUND_COLUMNS; rows without pictures have texts too.
    """
    captions = images.column("captions").combine_chunks()
    if isinstance(captions, pa.ChunkedArray):
        captions = pa.concat_arrays(captions.chunks) if captions.num_chunks else pa.array([], captions.type)
    parents = pc.list_parent_indices(captions)
    texts = pc.list_flatten(captions).to_pylist()
    image_ids = images.column("image_id").take(parents).to_pylist()
    sources = images.column("source").take(parents).to_pylist()
    ids: list[str] = []
    place, previous = 0, None
    for image, source, text, parent in zip(image_ids, sources, texts, parents.to_pylist(), strict=True):
        place = place + 1 if parent == previous else 0
        previous = parent
        ids.append(text_id(image, source, text or "", "", place))
    return pa.table([ids, image_ids, sources, texts, pa.nulls(len(ids), pa.string())], schema=TEXT_SCHEMA)


def texts_of(images: pa.Table, captions: Iterable[pa.Table]) -> pa.Table:
    """Found texts of `images`, then the synthetic ones of each captions shard, as TEXT_SCHEMA."""
    tables = [found_texts(images)]
    for table in captions:
        columns = [
            table.column("text_id"),
            table.column("image_id"),
            pa.array(["synthetic"] * table.num_rows, pa.string()),
            table.column("text"),
            table.column("failure"),
        ]
        tables.append(pa.table(columns, schema=TEXT_SCHEMA))
    return pa.concat_tables(tables)
