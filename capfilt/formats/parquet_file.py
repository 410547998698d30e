"""Parquet files of others, measured before they are read: some kilobytes can say that they hold gigabytes.

Not here: parts, which are capfilt's own (`tables/shards.py`), and what a file's columns mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.formats.places import first_line

FEW, PER_BYTE = 1_000_000, 8
"""Values of a column that every file may have, and further ones per byte of the file: nulls alone take less than a bit."""
SMALL, GROWTH = 2**29, 1000
"""Bytes that a column may come to, in files of any size, and how much larger than the file in others: text does not shrink to
a thousandth."""


def open_parquet(source: Any, name: str | Path, columns: Sequence[str] | None = None) -> pq.ParquetFile:
    """The file at a path or in an open file, its `columns` (None: all) small enough to be read.

    Raises UserError with `name` where it is no whole Parquet file, or where reading a column would take memory out of
    proportion to the file: a list of a hundred million nulls, one long text that a million rows share.
    """
    with whole(name):
        file = pq.ParquetFile(source)
        groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
        leaves = [[group.column(number) for number in range(group.num_columns)] for group in groups]
        size = file.metadata.serialized_size + sum(
            leaf.total_compressed_size for row in leaves for leaf in row
        )
        for number, row in enumerate(leaves):
            for leaf in row:
                column = leaf.path_in_schema.partition(".")[0]
                if columns is not None and column not in columns:
                    continue
                what = f"{name}: row group {number} of column {column!r} has"
                if leaf.num_values > max(FEW, PER_BYTE * size):
                    raise UserError(
                        f"{what} {leaf.num_values:,} values in {size:,} bytes; write the file without them"
                    )
                most = max(SMALL, GROWTH * size)
                # No value is longer than its column as it is stored.
                shared = leaf.num_values * leaf.total_uncompressed_size > most and _dictionary(leaf)
                expanded = _expanded(source, file, number, leaf, most) if shared else 0
                if max(leaf.total_uncompressed_size, expanded) > most:
                    raise UserError(
                        f"{what} more than {most:,} bytes, of a file of {size:,}; write it in parts"
                    )
    return file


@contextmanager
def whole(name: str | Path) -> Iterator[None]:
    """Turn what Arrow raises of damaged pages, and of text that is no UTF-8, into a UserError with `name`."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        words = f"is not a whole Parquet file ({first_line(error)}); make it again, or take it away"
        raise UserError(f"{name}: {words}") from None


def _dictionary(leaf: Any) -> bool:
    return leaf.physical_type == "BYTE_ARRAY" and leaf.dictionary_page_offset is not None


def _expanded(source: Any, opened: pq.ParquetFile, group: int, leaf: Any, most: int) -> int:
    """Bytes of a column of texts that stand in a dictionary, once each value has its own; 0 where `most` is enough anyway."""
    file = pq.ParquetFile(source, metadata=opened.metadata, read_dictionary=[leaf.path_in_schema])

    def lengths(rows: int) -> Any:
        for batch in file.iter_batches(rows, row_groups=[group], columns=[leaf.path_in_schema]):
            values = batch.column(0)
            while not pa.types.is_dictionary(values.type) and values.type.num_fields:
                values = values.field(0) if pa.types.is_struct(values.type) else values.flatten()
            if pa.types.is_dictionary(values.type):
                yield values.indices, pc.binary_length(values.dictionary)

    # All of a dictionary comes with its first row.
    _, first = next(lengths(1), (None, pa.array([0])))
    if leaf.num_values * (pc.max(first).as_py() or 0) <= most:
        return 0
    return sum(pc.sum(table.take(indices)).as_py() or 0 for indices, table in lengths(65536))
