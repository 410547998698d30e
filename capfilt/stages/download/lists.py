"""Lists of URLs: txt, csv, tsv, json, jsonl and Parquet, one file or a folder of them, read a slice at a time.

What a list says comes through as it is; whether a URL makes sense is found out when it is fetched (`opener.py`). Where
the files lie is `places.py`, what columns well-known lists have is `presets.py`.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
import warnings
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.stages.download.places import Place, places
from capfilt.stages.download.presets import Layout, fitting
from capfilt.tables.formats import ColumnTypes, arrow_column, storable, text_of, texts_in
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
_WINDOW = 1 << 16
"""Characters of a JSON array that are read at once; twice as many for a value that is longer."""

_SPACE = re.compile(r"[ \t\n\r]*")


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


class EmptyList(UserError):
    """A text file without anything in it."""


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
        """Raise UserError when the file is not of this format or a column asked for is not in it, EmptyList when it has
        nothing.
        """

    @abstractmethod
    def extra_types(self) -> Mapping[str, pa.DataType]:
        """The types of the further columns, of all slices alike."""

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
    found, files, empty = places(path, suffixes), [], []
    for place in found:
        format = _SUFFIXES.get(place.suffix, "") if input_format == "auto" else input_format
        if not format:
            raise UserError(f"{path}: its name does not tell the format; give --input-format")
        try:
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


@dataclass(frozen=True)
class _Unreadable:
    """A record that is not what its format says."""

    words: str


_Record = dict[str, Any] | _Unreadable


class _IndexedList(UrlList):
    """A text file: one pass finds where each slice begins, then slices are read by themselves."""

    def extra_types(self) -> Mapping[str, pa.DataType]:
        return dict.fromkeys(self.extra, pa.string())

    def read(self, number: int) -> Slice:
        records = self._records(number)
        rows = [{} if isinstance(record, _Unreadable) else record for record in records]
        columns = [
            arrow_column((row.get(name) for row in rows), type_) for name, type_ in self.extra_types().items()
        ]
        return Slice(
            [_url(row.get(self.url_col)) for row in rows],
            [texts_in(row.get(self.caption_col)) if self.caption_col else [] for row in rows],
            [record.words if isinstance(record, _Unreadable) else None for record in records],
            pa.Table.from_arrays(columns, names=list(self.extra)),
        )

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
        if not self._head():
            raise EmptyList(f"{self.path}: is empty; a txt list has one URL per line")

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
            raise EmptyList(f"{self.path}: is empty; its first line must name the columns")
        names = {self.url_col, self.caption_col} - {""}
        if self.layout.header and not names <= set(fields):
            self.header, self.named = list(self.layout.header), False
        else:
            self.header = fields
        self.check_columns(self.header)

    def _fields(self, file: BinaryIO) -> Iterator[tuple[int, list[str] | _Unreadable]]:
        source = _lines(file)
        back: deque[tuple[int, _Line]] = deque()
        taken: list[tuple[int, _Line]] = []

        def lines() -> Iterator[str]:
            while (item := back.popleft() if back else next(source, None)) is not None:
                taken.append(item)
                yield item[1]

        reader = self._reader(lines())
        if csv.field_size_limit() < _LONGEST_FIELD:
            csv.field_size_limit(_LONGEST_FIELD)
        while True:
            taken.clear()
            fields: list[str] | _Unreadable | None
            try:
                fields = next(reader, None)
                broken = len(taken) > 1 and self._swallows([line for _, line in taken])
            except csv.Error:
                fields, broken = None, True
            if not taken:
                return
            offset, line = taken[0]
            if broken:
                # No line goes with another's quote: the others are read by themselves.
                back.extendleft(reversed(taken[1:]))
                reader = self._reader(lines())
                fields = _alone(line, offset)
            if fields:
                yield offset, fields

    def _swallows(self, lines: Sequence[str]) -> bool:
        """Whether a record of several lines is one that left a quote open, and those that came after it."""
        return any(self._is_record(line) for line in lines[1:] if "://" in line)

    def _is_record(self, line: str) -> bool:
        fields = _alone(line, 0)
        if isinstance(fields, _Unreadable) or len(fields) != len(self.header):
            return False
        where = self.header.index(self.url_col) if self.url_col in self.header else 0
        return fields[where].lstrip().startswith(("http://", "https://"))

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
        # Strict, so that a quote closed in the midst of another line's text is found out.
        return csv.reader(lines, strict=True)


def _alone(line: str, offset: int) -> list[str] | _Unreadable:
    """The fields of a line of CSV by itself, its quotes taken as they come."""
    reader = csv.reader([line, ""])
    try:
        fields = next(reader)
    except csv.Error as error:
        return _Unreadable(f"the line at byte {offset} is no CSV ({error})")
    if reader.line_num > 1:
        return _Unreadable(f"the line at byte {offset} opens a quote and does not close it")
    return fields


class _TsvList(_DelimitedList):
    def _reader(self, lines: Iterator[str]) -> Iterator[list[str]]:
        for line in lines:
            text = line.rstrip("\r\n")
            yield text.split("\t") if text else []


class _ObjectList(_IndexedList):
    """JSON objects. Columns have the type of their values, found in the pass over the file."""

    form = ""
    """What such a list is like, in words."""

    def __init__(self, path: Place, layout: Layout, extra: Sequence[str], slice_rows: int) -> None:
        super().__init__(path, layout, extra, slice_rows)
        self._types = ColumnTypes(self.extra)

    def check(self) -> None:
        head = self._head()
        good = [record for record in head if isinstance(record, dict)]
        if head and not good:
            assert isinstance(head[0], _Unreadable)
            raise UserError(f"{self.path}: {head[0].words}; {self.form}")
        if not head:
            raise EmptyList(f"{self.path}: is empty; {self.form}")
        if good:
            self.check_columns(list(dict.fromkeys(name for record in good for name in record)))

    def _notice(self, record: _Record) -> None:
        if isinstance(record, dict):
            self._types.notice(record)

    def extra_types(self) -> Mapping[str, pa.DataType]:
        _ = self._index
        types = self._types.types()
        # In a folder fewer columns may be carried than this file has.
        return {name: types[name] for name in self.extra}


class _JsonlList(_ObjectList):
    """One JSON object per line."""

    form = "a jsonl list has one JSON object per line"

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


class _JsonList(_ObjectList):
    """One JSON array of objects, read a piece at a time."""

    form = "a json list is an array of objects; for one object per line give --input-format jsonl"

    def _scan(self, file: BinaryIO) -> Iterator[tuple[int, _Record]]:
        text = _Sliding(file)
        if text.offset == 0:
            text.skip("\ufeff")
            if text.peek() != "[":
                if text.peek() in ("{", '"'):
                    raise UserError(f"{self.path}: is JSON, but not an array of objects; {self.form}")
                raise self._broken(text, "it does not begin with [")
            text.skip("[")
            if text.peek() == "]":
                text.skip("]")
                self._check_end(text)
                return
        while True:
            text.peek()
            offset = text.offset
            try:
                value = text.value()
            except (ValueError, RecursionError) as error:
                raise self._broken(text, str(error)) from None
            yield offset, value if isinstance(value, dict) else _Unreadable("is not a JSON object")
            after = text.peek()
            if after not in (",", "]"):
                raise self._broken(text, "a value is followed by neither , nor ]")
            text.skip(after)
            if after == "]":
                self._check_end(text)
                return

    def _check_end(self, text: _Sliding) -> None:
        if text.peek():
            raise self._broken(text, "more follows its end")

    def _broken(self, text: _Sliding, words: str) -> UserError:
        return UserError(f"{self.path}: is not JSON (at byte {text.offset}: {words}); {self.form}")


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


class _Sliding:
    """The JSON text of a file from where it stands, of which a window is in memory. `offset` is where it is read, in bytes.

    UTF-8, as RFC 8259 asks for; other bytes are lone surrogates, which `storable` makes U+FFFD as in other lists.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.offset = file.tell()
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._ended = "", 0, False

    def _more(self) -> None:
        data = self._file.read(max(_WINDOW, len(self._text) - self._place))
        self._text = self._text[self._place :] + self._decode(data, not data)
        self._place, self._ended = 0, not data

    def _advance(self, place: int) -> None:
        self.offset += len(self._text[self._place : place].encode("utf-8", "surrogateescape"))
        self._place = place

    def peek(self) -> str:
        """The next character that is no white space, where the text is read from now on; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None
            self._advance(space.end())
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def skip(self, character: str) -> None:
        """Past the character, if it is the next one."""
        if self.peek() == character:
            self._advance(self._place + 1)

    def value(self) -> Any:
        """The value that begins here. Raises ValueError or RecursionError."""
        while True:
            try:
                value, end = self._parse(self._text, self._place)
                # A number may go on beyond the window.
                if end < len(self._text) or self._ended:
                    self._advance(end)
                    return value
            except ValueError as error:
                held = len(self._text) - self._place
                if self._ended or held > _LONGEST_FIELD:
                    raise ValueError(
                        error.msg if isinstance(error, json.JSONDecodeError) else error
                    ) from None
            self._more()


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
