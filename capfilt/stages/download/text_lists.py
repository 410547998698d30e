"""Lists of URLs that are text: txt, csv, tsv, json and jsonl. One pass over a file finds where its slices begin.

A record that cannot be read is a row that says so, and takes no other along.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.formats.places import Place
from capfilt.formats.values import ColumnTypes, arrow_column, texts_in
from capfilt.stages.download.presets import Layout
from capfilt.stages.download.url_list import EmptyList, Slice, UrlList, url_of

_LONGEST_FIELD = 10_000_000
_HEAD = 100
_WINDOW = 1 << 16
"""Characters of a JSON array that are read at once; twice as many for a value that is longer."""

_SPACE = re.compile(r"[ \t\n\r]*")


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
            [url_of(row.get(self.url_col)) for row in rows],
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


class TxtList(_IndexedList):
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


class CsvList(_DelimitedList):
    """Fields between commas, in quotes where they hold some."""

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


class TsvList(_DelimitedList):
    """Fields between tabs, without quotes."""

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


class JsonlList(_ObjectList):
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


class JsonList(_ObjectList):
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
