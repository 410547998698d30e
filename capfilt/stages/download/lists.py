"""Lists of URLs: one file or a folder of them, cut into slices.

What a list says comes through as it is; whether a URL makes sense is found out when it is fetched (`opener.py`). How files
are read is `capfilt/formats/records.py`, what columns well-known lists have is `presets.py`.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, islice
from typing import Any

import pyarrow as pa

from capfilt.errors import UserError, naming
from capfilt.formats.places import Place, places
from capfilt.formats.records import SUFFIXES, URL, EmptyFile, ParquetRecords, Record, open_records, plain
from capfilt.formats.values import CAPTION_COLUMNS, ColumnTypes, arrow_column, storable, text_of, texts_in
from capfilt.stages.download.presets import Layout, fitting
from capfilt.stages.download.urls import short
from capfilt.tables.sealed import fingerprint


@dataclass(frozen=True)
class Slice:
    """Consecutive rows of a list.

    Attributes:
        urls: as the list has them; None where it has none.
        captions: the texts of each row, untouched; a null is no text, an empty string is one.
        faults: why a row cannot be read, in words; None where it can.
        extra: the further columns asked for.
    """

    urls: list[str | None]
    captions: list[list[str]]
    faults: list[str | None]
    extra: pa.Table


def open_list(path: str, input_format: str, layout: Layout, extra: Sequence[str], slice_rows: int) -> UrlList:
    """The list at `path`: a file, a folder, or an fsspec URL of one.

    Raises UserError where there is none, or it is not what the options say.
    """
    suffixes = frozenset(
        suffix for suffix, format in SUFFIXES.items() if input_format in ("auto", format)
    )  # of a folder; a file that is named may be called anything
    found, files, empty = places(path, suffixes), [], []
    for place in found:
        if input_format == "auto" and place.suffix not in SUFFIXES:
            raise UserError(f"{path}: its name does not tell the format; give --input-format")
        try:
            format = SUFFIXES[place.suffix] if input_format == "auto" else input_format
            with naming(place.name):
                files.append(_File(place, format, layout, extra, slice_rows))
        except EmptyFile:
            if len(found) == 1:
                raise
            empty.append(place)
    if not files:
        raise EmptyFile(f"{path}: none of its {len(found)} lists has URLs")
    if empty:
        names = ", ".join(str(place) for place in empty[:5]) + (", ..." if len(empty) > 5 else "")
        warnings.warn(
            f"{path}: left out {len(empty)} of {len(found)} lists, for they are empty: {names}",
            RuntimeWarning,
            stacklevel=2,
        )
    told = {SUFFIXES.get(place.suffix, "") for place in found}
    same = len(told) == 1 and input_format in ("auto", *told)
    return UrlList(path, files, len(found) == 1, frozenset({"auto", *told} if same else {input_format}))


class UrlList:
    """Files of URLs, one after the other, cut into slices; no slice has rows of two files. Picklable.

    Attributes:
        formats: the values of --input-format with which this is the same list.
        extra: the further columns of all slices: those asked for, then those of the layout that are there.
    """

    def __init__(self, path: str, files: Sequence[_File], alone: bool, formats: frozenset[str]) -> None:
        self.path = path
        self.formats = formats
        self._files = list(files)
        self._alone = alone
        self._reading = 0
        # A column that only some of the files have cannot be carried: shards of one part have the same columns.
        self.extra = tuple(name for name in files[0].extra if all(name in each.extra for each in files))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, or of the files' together; hex."""
        digests = [file.records.place.sha256() for file in self._files]
        return digests[0] if self._alone else fingerprint({"files": digests})

    @property
    def rows(self) -> int:
        """How many rows the list has."""
        return self._rows[-1]

    @cached_property
    def _rows(self) -> list[int]:
        """The number of each file's first row, and how many there are."""
        return [0, *accumulate(file.rows for file in self._files)]

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return self._firsts[-1]

    @cached_property
    def _firsts(self) -> list[int]:
        """The number of each file's first slice, and how many there are."""
        return [0, *accumulate(math.ceil(file.rows / file.slice_rows) for file in self._files)]

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of slice `number`, from 0, and the row after its last."""
        place = bisect_right(self._firsts, number) - 1
        before = self._rows[place]
        start, stop = self._files[place].bounds(number - self._firsts[place])
        return before + start, before + stop

    @cached_property
    def _types(self) -> dict[str, pa.DataType]:
        found = [file.types for file in self._files]
        return {name: _common_type([types[name] for types in found]) for name in self.extra}

    def read(self, number: int) -> Slice:
        """Slice `number`, from 0; the last one of a file may be shorter."""
        place = bisect_right(self._firsts, number) - 1
        if place != self._reading:
            self._files[self._reading].close()
        self._reading = place
        return self._files[place].read(number - self._firsts[place], self._types)


class _File:
    """One file of URLs. Reading goes on from slice to slice, until `close`."""

    def __init__(
        self, place: Place, format: str, layout: Layout, asked: Sequence[str], slice_rows: int
    ) -> None:
        self.slice_rows = slice_rows
        self._going: tuple[int, Iterator[list[Record] | pa.Table]] | None = None
        plain_ = format == "txt"
        if plain_ and asked:
            raise UserError(f"{place}: a txt list has no columns; leave out --save-additional-columns")
        self.records = open_records(place, format, (layout.url_col,) if plain_ else ())
        wanted = {"--url-col": layout.url_col, "--caption-col": "" if plain_ else layout.caption_col}
        if (
            format in ("csv", "tsv")
            and layout.header
            and not all(map(self._column, filter(None, wanted.values())))
        ):
            self.records = open_records(place, format, layout.header)
        names = self.records.names
        for option, column in (*wanted.items(), *(("--save-additional-columns", name) for name in asked)):
            if column and not (self._column(column) if option in wanted else column in names):
                raise UserError(self._missing(option, column))
        self.url_col, self.caption_col = map(self._column, wanted.values())
        further = (*layout.carried, *layout.license_cols)
        self.extra = tuple(dict.fromkeys((*asked, *(name for name in further if name in names))))
        self.records.key = (self.url_col, URL)
        if isinstance(self.records, ParquetRecords):
            type_ = self.records.schema.field(self.url_col).type
            if not _is_text(type_):
                raise UserError(
                    f"{place}: column {self.url_col!r} is {type_}, not text; name another with --url-col"
                )

    def _column(self, wanted: str) -> str:
        """The column that is meant: by its very name, or the only one that differs in case alone; "" for none.

        What the texts are called where nothing else is said is any of CAPTION_COLUMNS.
        """
        for name in CAPTION_COLUMNS if wanted == Layout.caption_col else (wanted,):
            alike = [each for each in self.records.names if each.casefold() == name.strip().casefold()]
            if name in alike or len(alike) == 1:
                return name if name in alike else alike[0]
        return ""

    def _missing(self, option: str, column: str) -> str:
        names = self.records.names
        known = ", ".join(short(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")
        hint = ", or --caption-col '' for none" if option == "--caption-col" else ""
        if preset := fitting(names):
            hint += f", or give --preset {preset}"
        words = f"has no column {column!r}; its columns are {known or 'none'}: name one with {option}{hint}"
        return f"{self.records.place}: {words}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_going": None}

    def close(self) -> None:
        """Let go of what is open; reading opens it again."""
        self._going = None
        self.records.close()

    @cached_property
    def _index(self) -> tuple[int, list[Record], Mapping[str, pa.DataType]]:
        """How many records there are, the first of each slice (not of Parquet), and the types of the further columns."""
        if isinstance(self.records, ParquetRecords):
            schema = self.records.schema
            return self.records.rows, [], {name: schema.field(name).type for name in self.extra}
        rows, firsts, types = 0, [], ColumnTypes(self.extra)
        for record in self.records:
            if rows % self.slice_rows == 0:
                firsts.append(record._replace(fields={}))
            rows += 1
            types.notice(record.fields)
        return rows, firsts, types.types()

    @property
    def rows(self) -> int:
        return self._index[0]

    @property
    def types(self) -> Mapping[str, pa.DataType]:
        return self._index[2]

    def bounds(self, number: int) -> tuple[int, int]:
        start = number * self.slice_rows
        return start, min(self.rows, start + self.slice_rows)

    def read(self, number: int, types: Mapping[str, pa.DataType]) -> Slice:
        """Slice `number` of the file, with further columns of these types."""
        named = [name for name in dict.fromkeys((self.url_col, self.caption_col)) if name]
        found = self._next(number, list(dict.fromkeys((*named, *types))))
        if isinstance(found, pa.Table):
            rows = plain(found.select(named))
            extra = [found[name] for name in types]
        else:
            rows = [(record.fields, record.fault) for record in found]
            columns = (arrow_column((row.get(name) for row, _ in rows), self.types[name]) for name in types)
            extra = [pa.chunked_array([column]) for column in columns]
        further = [_as_type(column, type_) for column, type_ in zip(extra, types.values(), strict=True)]
        return Slice(
            [url_of(row.get(self.url_col)) for row, _ in rows],
            [texts_in(row.get(self.caption_col)) for row, _ in rows],
            [fault for _, fault in rows],
            pa.Table.from_arrays(further, names=list(types)),
        )

    def _next(self, number: int, columns: Sequence[str]) -> list[Record] | pa.Table:
        """Slice `number` as it is read, from where the last one ended if that is near."""
        at, slices = self._going or (number + 1, iter(()))
        skipped = number - at
        # A compressed file is read from its beginning, unless what is left out now is far less than that.
        if skipped < 0 or (skipped and (self.records.seekable or 8 * skipped > number)):
            slices = self._slices(number, columns)
        else:
            deque(islice(slices, skipped), maxlen=0)
        self._going = (number + 1, slices)
        return next(slices)

    def _slices(self, number: int, columns: Sequence[str]) -> Iterator[list[Record] | pa.Table]:
        if isinstance(self.records, ParquetRecords):
            return self.records.tables(number * self.slice_rows, self.slice_rows, columns)
        records = self.records.iterate(self._index[1][number])
        return iter(lambda: list(islice(records, self.slice_rows)), [])


def url_of(value: Any) -> str | None:
    """A URL as it is stored, whatever the list has in its place; None for none."""
    return storable(value) if isinstance(value, str) else None if value is None else str(value)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """The column as text, whatever it holds."""
    try:
        return column.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        texts = [None if value is None else text_of(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])


def _as_type(column: pa.ChunkedArray, type_: pa.DataType) -> pa.ChunkedArray:
    if column.type == type_:
        return column
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
