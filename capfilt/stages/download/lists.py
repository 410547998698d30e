"""Lists of URLs: one file or a folder of them, text or Parquet, read a slice at a time.

What a list says comes through as it is; whether a URL makes sense is found out when it is fetched (`opener.py`). What all
lists have in common is `url_list.py`'s, the text formats are `text_lists.py`'s; where the files lie is `places.py`, what
columns well-known lists have is `presets.py`.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError, naming
from capfilt.stages.download.places import Place, places
from capfilt.stages.download.presets import Layout
from capfilt.stages.download.text_lists import CsvList, JsonList, JsonlList, TsvList, TxtList
from capfilt.stages.download.url_list import EmptyList, Slice, UrlList, url_of
from capfilt.tables.formats import text_of, texts_in
from capfilt.tables.parquet import open_parquet
from capfilt.tables.shards import fingerprint

INPUT_FORMATS = ("txt", "csv", "tsv", "json", "jsonl", "parquet")

_SUFFIXES = {
    ".txt": "txt",
    ".csv": "csv",
    ".tsv": "tsv",
    ".json": "json",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_SUFFIXES |= {".parquet": "parquet", ".pq": "parquet"}


def open_list(path: str, input_format: str, layout: Layout, extra: Sequence[str], slice_rows: int) -> UrlList:
    """The list at `path`: a file, a folder, or an fsspec URL of one.

    Raises UserError where there is none, or it is not what the options say.
    """
    if input_format not in ("auto", *_READERS):
        raise UserError(f"--input-format {input_format!r}: choose auto, {', '.join(INPUT_FORMATS)}")
    suffixes = frozenset(
        suffix for suffix, format in _SUFFIXES.items() if input_format in ("auto", format)
    )  # of a folder; a file that is named may be called anything
    found, files, empty = places(path, suffixes), [], []
    for place in found:
        format = _SUFFIXES.get(place.suffix, "") if input_format == "auto" else input_format
        if not format:
            raise UserError(f"{path}: its name does not tell the format; give --input-format")
        try:
            with naming(place.name):
                files.append(_READERS[format](place, layout, extra, slice_rows))
        except EmptyList:
            if len(found) == 1:
                raise
            empty.append(place)
    if not files:
        raise EmptyList(f"{path}: none of its {len(found)} lists has URLs")
    if empty:
        names = ", ".join(str(place) for place in empty[:5]) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"{path}: left out {len(empty)} of {len(found)} lists, for they are empty: {names}",
            RuntimeWarning,
            stacklevel=2,
        )
    return files[0] if len(found) == 1 else _Folder(Place(path), files)


class _Folder(UrlList):
    """The lists of a folder, one after the other; no slice has rows of two."""

    def __init__(self, path: Place, files: Sequence[UrlList]) -> None:
        self.files = list(files)
        # A column that only some of the files have cannot be carried: shards of one part have the same columns.
        common = [name for name in files[0].extra if all(name in each.extra for each in files)]
        for each in files:
            each.extra = tuple(common)
        super().__init__(path, files[0].layout, common, files[0].slice_rows)

    def check(self) -> None:
        """Each file was, when it was opened."""

    @cached_property
    def digest(self) -> str:
        return fingerprint({"files": [each.digest for each in self.files]})

    @property
    def rows(self) -> int:
        return sum(each.rows for each in self.files)

    @property
    def slices(self) -> int:
        return self._firsts[-1]

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of each file's first slice, and how many there are."""
        return [0, *accumulate(each.slices for each in self.files)]

    def _where(self, number: int) -> tuple[UrlList, int]:
        place = bisect_right(self._firsts, number) - 1
        return self.files[place], number - self._firsts[place]

    def bounds(self, number: int) -> tuple[int, int]:
        file, inner = self._where(number)
        before = sum(each.rows for each in self.files[: self.files.index(file)])
        start, stop = file.bounds(inner)
        return before + start, before + stop

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        found = [file.extra_types() for file in self.files]
        return {name: _common_type([types[name] for types in found]) for name in self.extra}

    def extra_types(self) -> Mapping[str, pa.DataType]:
        return self._types

    def read(self, number: int) -> Slice:
        file, inner = self._where(number)
        found = file.read(inner)
        columns = [_as_type(found.extra[name], type_) for name, type_ in self._types.items()]
        return replace(found, extra=pa.Table.from_arrays(columns, names=list(self._types)))


class _ParquetList(UrlList):
    """A Parquet file; its row groups are read one at a time, and the last one is kept for the next slice."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_group")}

    @cached_property
    def _file(self) -> pq.ParquetFile:
        wanted = [
            self.url_col,
            self.caption_col,
            *self.extra,
            *self.layout.carried,
            *self.layout.license_cols,
        ]
        return open_parquet(self.path.open() if self.path.remote else self.path.name, str(self.path), wanted)

    @cached_property
    def _group(self) -> dict[int, pa.Table]:
        return {}

    def check(self) -> None:
        schema = self._file.schema_arrow
        self.check_columns(schema.names)
        type_ = schema.field(self.url_col).type
        if not _is_text(type_):
            raise UserError(
                f"{self.path}: column {self.url_col!r} is {type_}, not text; name another with --url-col"
            )

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def extra_types(self) -> Mapping[str, pa.DataType]:
        schema = self._file.schema_arrow
        return {name: schema.field(name).type for name in self.extra}

    def _read_group(self, number: int) -> pa.Table:
        if number not in self._group:
            self._group.clear()
            wanted = [self.url_col, self.caption_col, *self.extra]
            columns = [name for name in dict.fromkeys(wanted) if name]
            try:
                self._group[number] = self._file.read_row_group(number, columns=columns)
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(
                    f"{self.path}: row group {number} cannot be read ({_first_line(error)})"
                ) from None
        return self._group[number]

    def read(self, number: int) -> Slice:
        start, stop = self.bounds(number)
        tables, begin = [], 0
        for group in range(self._file.num_row_groups):
            end = begin + self._file.metadata.row_group(group).num_rows
            if begin < stop and end > start:
                low, high = max(start, begin), min(stop, end)
                tables.append(self._read_group(group).slice(low - begin, high - low))
            begin = end
        table = pa.concat_tables(tables)
        captions = table[self.caption_col].to_pylist() if self.caption_col else [None] * table.num_rows
        return Slice(
            [url_of(value) for value in table[self.url_col].to_pylist()],
            [texts_in(value) for value in captions],
            [None] * table.num_rows,
            table.select(list(self.extra)),
        )


_READERS: dict[str, Callable[..., UrlList]] = {
    "txt": TxtList,
    "csv": CsvList,
    "tsv": TsvList,
    "json": JsonList,
    "jsonl": JsonlList,
    "parquet": _ParquetList,
}


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as text, whatever it holds."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = [None if value is None else text_of(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])


def _as_type(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    return as_text(column) if type_ == pa.string() else column.cast(type_)


def _common_type(types: Sequence[pa.DataType]) -> pa.DataType:
    """The type that holds the values of columns of all these types: the wider of two of a kind, else text."""
    found = [type_.value_type if pa.types.is_dictionary(type_) else type_ for type_ in types]
    found = [type_ for type_ in found if not pa.types.is_null(type_)]
    if all(type_ == types[0] for type_ in types):
        return types[0]
    for kind in (pa.types.is_signed_integer, pa.types.is_floating):
        if found and all(kind(type_) for type_ in found):
            return max(found, key=lambda type_: type_.bit_width)
    return found[0] if found and all(type_ == found[0] for type_ in found) else pa.string()


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
