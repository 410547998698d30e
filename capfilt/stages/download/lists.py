"""Lists of URLs: txt, csv, tsv, json, jsonl and Parquet, one file or a folder of them, read a slice at a time.

What a list says comes through as it is; whether a URL makes sense is found out when it is fetched (`opener.py`). Where
the files lie is `places.py`, what columns well-known lists have is `presets.py`.
"""

from __future__ import annotations

import csv
import json
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.stages.download.places import Place, places
from capfilt.stages.download.presets import Layout, fitting
from capfilt.tables.formats import ColumnTypes, arrow_column, storable, texts_in
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

_LONGEST_FIELD = 10_000_000
_HEAD = 100


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


class UrlList(ABC):
    """A list of URLs cut into slices of `slice_rows` rows. Picklable; what it reads is remembered in each process.

    `extra` are the further columns that its slices have: those asked for, then those of the layout that are there.
    """

    def __init__(self, path: Place, layout: Layout, extra: Sequence[str], slice_rows: int) -> None:
        self.path = path
        self.layout = layout
        self.url_col = layout.url_col
        self.caption_col = layout.caption_col
        self.extra = tuple(extra)
        self.slice_rows = slice_rows
        self.check()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the file, hex."""
        return self.path.sha256()

    @property
    def slices(self) -> int:
        """How many slices there are."""
        return math.ceil(self.rows / self.slice_rows)

    @property
    @abstractmethod
    def rows(self) -> int:
        """How many rows the list has."""

    @abstractmethod
    def read(self, number: int) -> Slice:
        """Slice `number`, from 0; the last one may be shorter."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError when the file is not of this format or a column asked for is not in it."""

    def bounds(self, number: int) -> tuple[int, int]:
        """First row of slice `number`, and the row after its last."""
        start = number * self.slice_rows
        return start, min(self.rows, start + self.slice_rows)

    def check_columns(self, names: Sequence[str]) -> None:
        wanted: dict[str, tuple[str, ...]] = {
            "--url-col": (self.url_col,),
            "--caption-col": (self.caption_col,) if self.caption_col else (),
            "--save-additional-columns": self.extra,
        }
        for option, columns in wanted.items():
            for column in columns:
                if column not in names:
                    hint = ", or --caption-col '' for none" if option == "--caption-col" else ""
                    if preset := fitting(list(names)):
                        hint += f", or give --preset {preset}"
                    known = ", ".join(names) if names else "none"
                    raise UserError(
                        f"{self.path}: has no column {column!r}; its columns are {known}: name one with {option}{hint}"
                    )
        further = (*self.layout.carried, *self.layout.license_cols)
        self.extra = tuple(dict.fromkeys((*self.extra, *(name for name in further if name in names))))


def open_list(path: str, input_format: str, layout: Layout, extra: Sequence[str], slice_rows: int) -> UrlList:
    """The list at `path`: a file, a folder, or an fsspec URL of one.

    Raises UserError where there is none, or it is not what the options say.
    """
    if input_format not in ("auto", *_READERS):
        raise UserError(f"--input-format {input_format!r}: choose auto, {', '.join(INPUT_FORMATS)}")
    suffixes = frozenset(
        suffix for suffix, format in _SUFFIXES.items() if input_format in ("auto", format)
    )  # of a folder; a file that is named may be called anything
    files = []
    for place in places(path, suffixes):
        format = _SUFFIXES.get(place.suffix, "") if input_format == "auto" else input_format
        if not format:
            raise UserError(f"--url-list {path}: its name does not tell the format; give --input-format")
        files.append(_READERS[format](place, layout, extra, slice_rows))
    return files[0] if len(files) == 1 else _Folder(Place(path), files)


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

    def read(self, number: int) -> Slice:
        file, inner = self._where(number)
        return file.read(inner)


@dataclass(frozen=True)
class _Unreadable:
    """A record that is not what its format says."""

    words: str


_Record = dict[str, Any] | _Unreadable


class _RecordList(UrlList):
    """A list whose rows are read one by one in Python."""

    @abstractmethod
    def _records(self, number: int) -> list[_Record]:
        """The records of one slice."""

    def _extra_types(self) -> dict[str, pa.DataType]:
        return dict.fromkeys(self.extra, pa.string())

    def read(self, number: int) -> Slice:
        records = self._records(number)
        rows = [{} if isinstance(record, _Unreadable) else record for record in records]
        columns = [
            arrow_column((row.get(name) for row in rows), type_)
            for name, type_ in self._extra_types().items()
        ]
        return Slice(
            [_url(row.get(self.url_col)) for row in rows],
            [texts_in(row.get(self.caption_col)) if self.caption_col else [] for row in rows],
            [record.words if isinstance(record, _Unreadable) else None for record in records],
            pa.Table.from_arrays(columns, names=list(self.extra)),
        )


class _IndexedList(_RecordList):
    """A text file: one pass finds where each slice begins, then slices are read by themselves."""

    @abstractmethod
    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, _Record]]:
        """Records from where `file` stands, each with the offset it begins at."""

    @cached_property
    def _index(self) -> tuple[int, list[int]]:
        offsets, rows = [], 0
        with self.path.open() as file:
            for offset, record in self._scan(file):
                if rows % self.slice_rows == 0:
                    offsets.append(offset)
                rows += 1
                self._notice(record)
        return rows, offsets

    def _notice(self, record: _Record) -> None:
        """Called with every record of the file, once."""

    @property
    def rows(self) -> int:
        return self._index[0]

    def _records(self, number: int) -> list[_Record]:
        start, stop = self.bounds(number)
        with self.path.open() as file:
            file.seek(self._index[1][number])
            records = self._scan(file)
            return [next(records)[1] for _ in range(stop - start)]

    def _head(self) -> list[_Record]:
        with self.path.open() as file:
            return [record for (_, record), _ in zip(self._scan(file), range(_HEAD), strict=False)]


class _TxtList(_IndexedList):
    """One URL per line; lines without any are no rows."""

    def check(self) -> None:
        if self.extra:
            raise UserError(f"{self.path}: a txt list has no columns; leave out --save-additional-columns")

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, _Record]]:
        for offset, line in _lines(file):
            if text := line.strip():
                yield offset, {self.url_col: text}


class _DelimitedList(_IndexedList):
    """A header, then records. csv quotes (RFC 4180); tsv does not: IANA's text/tab-separated-values has no quoting."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.header: list[str] = []
        self.named = True  # whether the first line has the names
        super().__init__(*arguments, **options)

    @abstractmethod
    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]: ...

    def check(self) -> None:
        with self.path.open() as file:
            _, fields = next(self._fields(file), (0, []))
        if isinstance(fields, _Unreadable):
            raise UserError(f"{self.path}: its first line must name the columns; {fields.words}")
        if not fields:
            raise UserError(f"{self.path}: is empty; its first line must name the columns")
        names = {self.url_col, self.caption_col} - {""}
        if self.layout.header and not names <= set(fields):
            self.header, self.named = list(self.layout.header), False
        else:
            self.header = fields
        self.check_columns(self.header)

    def _fields(self, file: BinaryIO) -> Iterator[tuple[int, list[str] | _Unreadable]]:
        position = file.tell()
        offset = position

        def lines() -> Iterator[str]:
            nonlocal position
            for begin, line in _lines(file):
                position = begin + line.size
                yield line

        reader = self._reader(lines())
        if csv.field_size_limit() < _LONGEST_FIELD:
            csv.field_size_limit(_LONGEST_FIELD)
        while True:
            fields: list[str] | _Unreadable | None
            try:
                fields = next(reader, None)
            except csv.Error as error:
                # The reader begins anew with the next line.
                fields = _Unreadable(f"the line at byte {offset} is no CSV ({error})")
            if fields is None:
                return
            if fields:
                yield offset, fields
            offset = position

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, _Record]]:
        skip = self.named and file.tell() == 0
        for offset, fields in self._fields(file):
            if skip:
                skip = False
            elif isinstance(fields, _Unreadable):
                yield offset, fields
            elif len(fields) > len(self.header):
                # Which of them is the text with a stray separator in it cannot be known.
                yield offset, _Unreadable(f"the line has {len(fields)} fields, the header {len(self.header)}")
            else:
                yield offset, dict(zip(self.header, fields, strict=False))


class _CsvList(_DelimitedList):
    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        return csv.reader(lines)


class _TsvList(_DelimitedList):
    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        for line in lines:
            text = line.rstrip("\r\n")
            yield text.split("\t") if text else []


class _JsonlList(_IndexedList):
    """One JSON object per line."""

    def __init__(self, path: Place, layout: Layout, extra: Sequence[str], slice_rows: int) -> None:
        super().__init__(path, layout, extra, slice_rows)
        self._types = ColumnTypes(self.extra)

    def check(self) -> None:
        head = self._head()
        good = [record for record in head if isinstance(record, dict)]
        if head and not good:
            assert isinstance(head[0], _Unreadable)
            raise UserError(f"{self.path}: {head[0].words}; a jsonl list has one JSON object per line")
        if good:
            self.check_columns(list(dict.fromkeys(name for record in good for name in record)))

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, _Record]]:
        for offset, line in _lines(file):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield offset, _Unreadable(f"the line at byte {offset} is not JSON ({error})")
                continue
            if isinstance(record, dict):
                yield offset, record
            else:
                yield offset, _Unreadable(f"the line at byte {offset} is not a JSON object")

    def _notice(self, record: _Record) -> None:
        if isinstance(record, dict):
            self._types.notice(record)

    def _extra_types(self) -> dict[str, pa.DataType]:
        _ = self._index
        types = self._types.types()
        # In a folder fewer columns may be carried than this file has.
        return {name: types[name] for name in self.extra}


class _JsonList(_RecordList):
    """One JSON array of objects; the one format that is read whole."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_all"}

    @cached_property
    def _all(self) -> list[_Record]:
        try:
            with self.path.open() as file:
                values = json.loads(file.read())
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: is not JSON ({error}); for one object per line give --input-format jsonl"
            ) from None
        if not isinstance(values, list):
            raise UserError(f"{self.path}: is JSON, but not an array of objects")
        return [value if isinstance(value, dict) else _Unreadable("is not a JSON object") for value in values]

    def check(self) -> None:
        good = [record for record in self._all[:_HEAD] if isinstance(record, dict)]
        if self._all:
            self.check_columns(list(dict.fromkeys(name for record in good for name in record)))

    @property
    def rows(self) -> int:
        return len(self._all)

    def _records(self, number: int) -> list[_Record]:
        start, stop = self.bounds(number)
        return self._all[start:stop]

    @cached_property
    def _column_types(self) -> dict[str, pa.DataType]:
        types = ColumnTypes(self.extra)
        for record in self._all:
            if isinstance(record, dict):
                types.notice(record)
        return types.types()

    def _extra_types(self) -> dict[str, pa.DataType]:
        return self._column_types


class _ParquetList(UrlList):
    """A Parquet file; its row groups are read one at a time, and the last one is kept for the next slice."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_file", "_group")}

    @cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            return pq.ParquetFile(self.path.open() if self.path.remote else self.path.name)
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(f"{self.path}: is not a Parquet file ({_first_line(error)})") from None

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
            [_url(value) for value in table[self.url_col].to_pylist()],
            [texts_in(value) for value in captions],
            [None] * table.num_rows,
            table.select(list(self.extra)),
        )


_READERS: dict[str, Callable[..., UrlList]] = {
    "txt": _TxtList,
    "csv": _CsvList,
    "tsv": _TsvList,
    "json": _JsonList,
    "jsonl": _JsonlList,
    "parquet": _ParquetList,
}


class _Line(str):
    """A line of text that knows how many bytes it took."""

    __slots__ = ("size",)
    size: int


def _lines(file: BinaryIO) -> Iterator[tuple[int, _Line]]:
    """The lines of `file`, ends included, each with its offset. Bytes that are not UTF-8 become U+FFFD."""
    offset = file.tell()
    for data in file:
        text = data.removeprefix(b"\xef\xbb\xbf") if offset == 0 else data
        line = _Line(text.decode("utf-8", "replace"))
        line.size = len(data)
        yield offset, line
        offset += len(data)


def _url(value: Any) -> str | None:
    return storable(value) if isinstance(value, str) else None if value is None else str(value)


def _is_text(type_: pa.DataType) -> bool:
    if pa.types.is_dictionary(type_):
        type_ = type_.value_type
    return bool(
        pa.types.is_string(type_) or pa.types.is_large_string(type_) or pa.types.is_string_view(type_)
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
