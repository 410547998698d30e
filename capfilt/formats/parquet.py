"""Parquet files with pictures in a column, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from capfilt.data.images import SUFFIXES
from capfilt.errors import UserError
from capfilt.formats import Reading
from capfilt.formats.columns import mixed_types, read_columns, values
from capfilt.formats.keys import shared_key
from capfilt.formats.parquet_file import open_parquet, whole
from capfilt.formats.source import FileSource, Found, Given, SourceRow, described
from capfilt.formats.values import Keyed, caption_columns, require, text_of, unique

ENDINGS = (".parquet", ".pq")


_FIELDS = (
    "key", "status", "error_message", "split", "url", "license", "licence", "original_width", "original_height", "sha256",
)  # fmt: skip
"""The columns that a row is made of, beside its picture and its texts."""


def detect(given: Given) -> bool:
    """Whether the first of the files has a column of pictures."""
    files = given.shards(*ENDINGS)
    return bool(files) and picture_column(schema_of(files[0])) is not None


def read(given: Given, reading: Reading) -> ParquetSource:
    """A shard per file, a row per row."""
    return ParquetSource(given, reading)


def schema_of(path: Path) -> pa.Schema:
    """The columns of a Parquet file. Raises UserError when it is broken."""
    with open_parquet(path, path, ()) as file:
        schema: pa.Schema = file.schema_arrow
        return schema


def picture_column(schema: pa.Schema) -> str | None:
    """The column of pictures: one called so, else the first of bytes or of `datasets`' structs; None where there is none."""
    holding = [field.name for field in schema if _holds_bytes(field.type)]
    usual = (*SUFFIXES, "image", "image_bytes")
    return next((name for name in usual if name in holding), holding[0] if holding else None)


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in type_)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


class ParquetSource(FileSource):
    """Rows have the file's `key`, where it has one and keys do not begin anew in each file; else the file's name too."""

    endings = ENDINGS

    def __init__(self, given: Given, reading: Reading) -> None:
        super().__init__(given, reading)
        schema = schema_of(self.files[0])
        caption_columns(schema.names, reading.caption_col, self.files[0])
        require(schema.names, reading.save_additional_columns, self.files[0], "--save-additional-columns")
        self._shared = self._find_shared()

    def mixed_types(self) -> dict[str, str]:
        return mixed_types(self.files, self.reading.save_additional_columns)

    def remarks(self) -> Sequence[str]:
        if self._shared is None:
            return ()
        key, one, other = self._shared
        return [
            f"files number their pictures anew ({key} is in {one} and in {other}), so keys have their file's name in front"
        ]

    def _count(self, file: Path) -> int:
        with open_parquet(file, file, ()) as source:
            return int(source.metadata.num_rows)

    def _find_shared(self) -> tuple[str, str, str] | None:
        """A key that two files have, with their names; None where the files' own keys are all different."""
        own = [(name, file) for file, name in self.names.items()]
        if all(self.keys.tells_file(name, key) for name, file in own for key in self._own_keys(file)):
            return None
        return shared_key((name, self._own_keys(file)) for name, file in own)

    def _own_keys(self, file: Path) -> list[str]:
        own = "key" in schema_of(file).names
        with open_parquet(file, file, ["key"]) as source, whole(file):
            found = source.read(columns=["key"]).column(0).to_pylist() if own else []
        keys = found if own else [None] * self._count(file)
        return [row.key for row in unique(self._keyed(file, keys, alone=True))]

    def _keyed(self, file: Path, keys: Sequence[Any], *, alone: bool) -> Iterator[Keyed]:
        name = self.names[file]
        for number, key in enumerate(keys):
            if key is None:
                yield Keyed(self.keys.prefixed(name, f"{number:06d}"))
            else:
                yield Keyed(text_of(key) if alone else self.keys.of(name, text_of(key)))

    def _read(self, file: Path) -> Found:
        schema = schema_of(file)
        columns = caption_columns(schema.names, self.reading.caption_col, file)
        picture = picture_column(schema)
        onto = self._pictures(file, picture)
        # Of the others some may be beyond Python: an infinite date, a list that Arrow cannot read.
        known = {*columns, picture, *(name for name in schema.names if name.strip().lower() in _FIELDS)}
        wanted = [name for name in schema.names if name in known]
        with open_parquet(file, file, wanted) as source, whole(file):
            records = source.read(columns=wanted).to_pylist()
        further = read_columns(file, self.files, self.reading.save_additional_columns)
        held = {name: values(further.column(name)) for name in self.reading.save_additional_columns}
        keys = self._keyed(file, [record.get("key") for record in records], alone=self._shared is None)
        rows = []
        for number, (row, record) in enumerate(zip(keys, records, strict=True)):
            extra = {name: each[number] for name, each in held.items()}
            rows.append(replace(onto(described(row.key, record, columns), record), extra=extra))
        return Found(rows, further=further)

    def _pictures(self, file: Path, column: str | None) -> Callable[[SourceRow, dict[str, Any]], SourceRow]:
        """The function that puts a record's picture onto its row."""
        if column is None:
            raise UserError(f"{file}: has no column of pictures")

        def onto(row: SourceRow, record: dict[str, Any]) -> SourceRow:
            value = record[column]
            value = value.get("bytes") if isinstance(value, dict) else value
            return replace(row, picture=value) if value is not None else row.missing("its row has no picture")

        return onto
