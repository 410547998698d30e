"""Lists of records in other tools' files: txt, csv, tsv, json, jsonl and Parquet, plain or compressed, in UTF-8 or UTF-16.

A record that cannot be read is a record that says why, and takes no other along. The formats beside this file say what the
fields mean; `places.py` says where the bytes lie.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.formats.parquet_file import open_parquet
from capfilt.formats.places import Place, first_line

SUFFIXES = {
    ".txt": "txt", ".csv": "csv", ".psv": "csv", ".tsv": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".pq": "parquet",
}  # fmt: skip
"""The format that a file's name tells, without an ending like .gz."""

URL = re.compile(r"\s*https?://")
FILE = re.compile(r".*\.(jpe?g|png|webp|gif|bmp|tiff?)\s*$", re.IGNORECASE)
"""How a value of the column that names a record's picture looks."""

LONGEST = 10_000_000
"""A line, a field or a JSON value above this many bytes is a fault."""

_MOST_BYTES = 200_000_000
"""Of a line that is passed over, and of a Parquet file that has to be decompressed in memory."""

_MOST_LINES = 100_000
"""Of one record of csv, and of empty ones in a row."""

_MOST_COLUMNS = 10_000

_HEAD = 100
_ROWS = 8192
_WINDOW = 1 << 16
"""Characters of a JSON array that are read at once; twice as many for a value that is longer."""

_NO_SPACE = re.compile(r"[^ \t\n\r]")
_FOREIGN = re.compile("[\udc80-\udcff]")
_TOO_LONG = f"is longer than {LONGEST} bytes"


class EmptyFile(UserError):
    """A text file without anything in it."""


class Record(NamedTuple):
    """One record of a list.

    Attributes:
        number: from 1; of text, the line it begins at, else its place in the file.
        offset: of lines, the byte of the decompressed text, as UTF-8, that it begins at; of Parquet, the row from 0.
        fields: the values by column, as the file has them; empty where it cannot be read.
        fault: why it cannot be read; None where it can.
    """

    number: int
    offset: int
    fields: dict[str, Any]
    fault: str | None = None


class Records(ABC):
    """The records of one file, each time they are iterated. Picklable.

    Attributes:
        names: the columns; of JSON, those of the first 100 records.
        key: the column that names a record's picture, and how its values look, where both are known. A record of several
            lines of csv, one of which is a record with such a value by itself, has left a quote open.
        seekable: whether a record is found without reading those before it.
    """

    form: ClassVar[str]
    """A description of such a list."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.names: list[str] = []
        self.key: tuple[str, re.Pattern[str]] | None = None
        self.seekable = True
        self._foreign = (0, 0)

    def __iter__(self) -> Iterator[Record]:
        """All records; a warning at their end where some have bytes that are not UTF-8, which become U+FFFD."""
        self._foreign = (0, 0)
        yield from self.iterate()
        count, first = self._foreign
        if count:
            words = f"{count} records have bytes that are not UTF-8, which became U+FFFD, the first is record {first}"
            hint = "convert a list in Latin-1 with: iconv -f latin1 -t utf-8"
            warnings.warn(f"{self.place}: {words}; {hint}", RuntimeWarning, stacklevel=2)

    def _note_foreign(self, number: int) -> None:
        count, first = self._foreign
        self._foreign = (count + 1, first or number)

    @abstractmethod
    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        """The records from `first` on, which was once read here. Raises UserError where the file breaks off."""

    def close(self) -> None:  # noqa: B027 - only Parquet holds a file open
        """Let go of what is open; reading opens it again."""

    def _name(self, names: Sequence[str]) -> None:
        if len(names) > _MOST_COLUMNS:
            raise UserError(f"{self.place}: has {len(names)} columns, more than {_MOST_COLUMNS}; {self.form}")
        self.names = list(names)


def open_records(place: Place, format: str = "auto", header: Sequence[str] = ()) -> Records:
    """The records of a file; `format` is one of those of SUFFIXES, or "auto" for what the name tells.

    `header` names the columns of a csv or tsv whose first line does not, and the one column of a txt (else `value`).
    Fields of a line stand between commas or tabs, or between `|` or `;` where its first line has only those. A csv has
    quotes (RFC 4180), a tsv has none (IANA's text/tab-separated-values). A `.json` of one object per line is jsonl.

    Raises UserError naming the file when it is no such list, EmptyFile when it has nothing.
    """
    if format == "auto":
        format = SUFFIXES.get(place.suffix, "")
        if not format:
            words = f"its name does not tell the format; name it like one of: {', '.join(SUFFIXES)}"
            raise UserError(f"{place}: {words}")
    if format == "json":
        with _text(place) as file:
            if _Sliding(file).peek() == "{":
                format = "jsonl"
    if format == "txt":
        return _Values(place, header[:1] or ["value"])
    if format in ("csv", "tsv"):
        return _Delimited(place, header, "," if format == "csv" else "\t")
    readers: dict[str, type[Records]] = {"json": _Array, "jsonl": _Objects, "parquet": ParquetRecords}
    return readers[format](place)


# -- text -----------------------------------------------------------------------------------------------------------


class _AsUtf8(io.RawIOBase):
    """Text in another encoding as UTF-8. Lone surrogates are what no UTF-8 has, and are found by who reads it."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text, self._rest = text, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or self._text.read(_WINDOW).encode("utf-8", "surrogatepass")
        size = min(len(buffer), len(data))
        buffer[:size], self._rest = data[:size], data[size:]
        return size


@contextmanager
def _text(place: Place, offset: int = 0) -> Iterator[io.BufferedReader]:
    """A file's text as UTF-8, decompressed, from a byte of it on. Raises UserError when it is no text or breaks off."""
    try:
        with place.stream() as raw:
            file, head = raw, raw.peek(1024)[:1024]
            if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                encoding = "utf-32" if head.startswith(codecs.BOM_UTF32_LE) else "utf-16"
                text = io.TextIOWrapper(raw, encoding, "surrogatepass", newline="")
                file = io.BufferedReader(_AsUtf8(text), _WINDOW)
            elif 10 * head.count(0) > len(head):
                words = "many of its bytes are zero: a binary file, or UTF-16 without a byte order mark"
                raise UserError(f"{place}: is no text ({words}); give a list as UTF-8")
            if offset and file.seekable():
                # A file on a server that knows no ranges says that it can.
                with suppress(ValueError):
                    file.seek(offset)
                    offset = 0
            while skipped := file.read(min(offset, 1 << 20)):
                offset -= len(skipped)
            yield file
    except (OSError, UnicodeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = error.filename or str(place)
            raise
        words = f"cannot be read to its end ({first_line(error)}); get the file again"
        raise UserError(f"{place}: {words}") from None


class _Line(NamedTuple):
    number: int
    offset: int
    text: str | None
    """None of a line that is too long."""

    def record(self, found: dict[str, Any] | str) -> Record:
        """The record of its fields, or of what is wrong with it."""
        if isinstance(found, str):
            return Record(self.number, self.offset, {}, f"the line at byte {self.offset} {found}")
        return Record(self.number, self.offset, found)


class _Text(Records):
    """Records of a text file."""

    def __init__(self, place: Place, names: Sequence[str] = ()) -> None:
        super().__init__(place)
        self._name(names)
        head = list(islice(self.iterate(), _HEAD))
        if not head:
            raise EmptyFile(f"{place}: is empty; {self.form}")
        if all(record.fault for record in head):
            raise UserError(f"{place}: {head[0].fault}; {self.form}")
        self._name(names or list(dict.fromkeys(name for record in head for name in record.fields)))

    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        number, offset = first[:2] if first else (1, 0)
        with _text(self.place, offset) as file:
            self.seekable = file.seekable()
            yield from self._scan(file, offset, number)

    @abstractmethod
    def _scan(self, file: io.BufferedReader, offset: int, number: int) -> Iterator[Record]:
        """Records from where `file` stands."""

    def _lines(self, file: io.BufferedReader, offset: int, number: int) -> Iterator[_Line]:
        """The lines, ends included."""
        blank = 0
        while data := file.readline(LONGEST):
            size, text = len(data), None
            blank = blank + 1 if data.isspace() else 0
            if blank > _MOST_LINES:
                raise UserError(f"{self.place}: has {blank} empty lines at line {number}; {self.form}")
            if size < LONGEST or data.endswith(b"\n"):
                data = data.removeprefix(codecs.BOM_UTF8) if offset == 0 else data
                try:
                    text = data.decode()
                except UnicodeDecodeError:
                    self._note_foreign(number)
                    text = data.decode("utf-8", "replace")
            yield _Line(number, offset, text)
            while text is None and data and not data.endswith(b"\n"):
                data = file.readline(1 << 20)
                size += len(data)
                if size > _MOST_BYTES:
                    raise UserError(
                        f"{self.place}: line {number} is longer than {_MOST_BYTES} bytes; {self.form}"
                    )
            offset += size
            number += 1


class _Lines(_Text):
    """A record per line."""

    def _scan(self, file: io.BufferedReader, offset: int, number: int) -> Iterator[Record]:
        for line in self._lines(file, offset, number):
            found = _TOO_LONG if line.text is None else self._parse(line.text)
            if found is not None:
                yield line.record(found)

    @abstractmethod
    def _parse(self, line: str) -> dict[str, Any] | str | None:
        """The fields of a line, or what is wrong with it; None of an empty line."""


class _Values(_Lines):
    """One value per line; lines without any are no records."""

    form = "a txt list has one value per line"

    def _parse(self, line: str) -> dict[str, Any] | str | None:
        return {self.names[0]: text} if (text := line.strip()) else None


class _Objects(_Lines):
    """One JSON object per line."""

    form = "a jsonl list has one JSON object per line"

    def _parse(self, line: str) -> dict[str, Any] | str | None:
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"is not JSON ({error})"
        return record if isinstance(record, dict) else "is not a JSON object"


class _Delimited(_Text):
    """A line of names, then lines of fields."""

    form = "its first line must name the columns, each other line is a record"

    def __init__(self, place: Place, header: Sequence[str], separator: str) -> None:
        Records.__init__(self, place)
        self._named = not header
        with _text(place) as file:
            lines = self._lines(file, 0, 1)
            first = list(islice(lines, 1))
            # Another separator than usual is only where the usual one is not.
            found = Counter(re.sub(r'"[^"]*"', "", "".join(line.text or "" for line in first)))
            usual = found[separator] > 0
            self._separator = separator if usual else max(separator, *",\t|;", key=lambda each: found[each])
            _, fields = next(self._rows(chain(first, lines)), (None, []))
        if isinstance(fields, str):
            raise UserError(f"{place}: its first line {fields}; {self.form}")
        if not fields:
            raise EmptyFile(f"{place}: is empty; {self.form}")
        self._name(header or [name.strip() for name in fields])

    def _scan(self, file: io.BufferedReader, offset: int, number: int) -> Iterator[Record]:
        rows = self._rows(self._lines(file, offset, number))
        if self._named and not offset:
            next(rows, None)
        for line, fields in rows:
            if isinstance(fields, str):
                yield line.record(fields)
            elif len(fields) > len(self.names):
                # Which of them is the text with a stray separator in it cannot be known.
                words = f"the line has {len(fields)} fields, the header {len(self.names)}"
                yield Record(line.number, line.offset, {}, words)
            else:
                yield line.record(dict(zip(self.names, fields, strict=False)))

    def _rows(self, source: Iterator[_Line]) -> Iterator[tuple[_Line, list[str] | str]]:
        """The lines that are not empty with their fields, or what is wrong with them; of several, the first."""
        # Of each process; whoever reads what was pickled is in another.
        csv.field_size_limit(LONGEST)
        fields: list[str] | str | None
        if self._separator == "\t":
            for line in source:
                if fields := self._alone(line):
                    yield line, fields
            return
        back: deque[_Line] = deque()
        taken: list[_Line] = []

        def texts() -> Iterator[str]:
            while (line := back.popleft() if back else next(source, None)) is not None:
                taken.append(line)
                if line.text is None or len(taken) > _MOST_LINES or line.offset - taken[0].offset > LONGEST:
                    raise csv.Error(_TOO_LONG)
                yield line.text

        # Strict, so that a quote closed in the midst of another line's text is found out.
        reader = csv.reader(texts(), delimiter=self._separator, strict=True)
        while True:
            taken.clear()
            try:
                fields = next(reader, None)
                broken = len(taken) > 1 and any(self._is_record(line) for line in taken[1:])
            except csv.Error:
                fields, broken = None, True
            if not taken:
                return
            line = taken[0]
            if broken:
                # No line goes with another's quote: the others are read by themselves.
                back.extendleft(reversed(taken[1:]))
                reader = csv.reader(texts(), delimiter=self._separator, strict=True)
                fields = self._alone(line)
            if fields:
                yield line, fields

    def _is_record(self, line: _Line) -> bool:
        """Whether a line by itself is a record that names its picture."""
        fields = self._alone(line) if self.key else ""
        if self.key is None or isinstance(fields, str) or len(fields) != len(self.names):
            return False
        name, pattern = self.key
        return pattern.match(fields[self.names.index(name) if name in self.names else 0]) is not None

    def _alone(self, line: _Line) -> list[str] | str:
        """The fields of a line by itself, its quotes taken as they come."""
        if line.text is None:
            return _TOO_LONG
        if self._separator == "\t":
            text = line.text.rstrip("\r\n")
            return text.split("\t") if text else []
        reader = csv.reader([line.text, ""], delimiter=self._separator)
        try:
            fields = next(reader)
        except csv.Error as error:
            return f"is no CSV ({error})"
        return fields if reader.line_num == 1 else "opens a quote and does not close it"


class _Array(_Text):
    """One JSON array of objects, read a piece at a time."""

    form = "a json list is an array of objects, or one object per line"

    def _scan(self, file: io.BufferedReader, offset: int, number: int) -> Iterator[Record]:
        self.seekable = False
        text, count = _Sliding(file), 0
        if not text.peek():
            return
        if not text.skip("["):
            raise self._broken(count, "it does not begin with [")
        going = not text.skip("]")
        while going:
            count += 1
            try:
                value = text.value()
            except (ValueError, RecursionError) as error:
                raise self._broken(count, str(error)) from None
            if text.foreign:
                self._note_foreign(count)
            if count >= number:
                found = isinstance(value, dict)
                yield Record(count, 0, value if found else {}, None if found else "is not a JSON object")
            going = text.skip(",")
            if not going and not text.skip("]"):
                raise self._broken(count, "a value is followed by neither , nor ]")
        if text.peek():
            raise self._broken(count, "more follows its end")

    def _broken(self, count: int, words: str) -> UserError:
        return UserError(f"{self.place}: is not JSON (at value {count}: {words}); {self.form}")


class _Sliding:
    """The JSON text of a file, of which a window is in memory.

    UTF-8, as RFC 8259 asks for; other bytes are U+FFFD as in other lists, and `foreign` says that the last value has some.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        self.foreign = False
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._ended = "", 0, False
        self.skip("\ufeff")

    def _more(self) -> None:
        data = self._file.read(max(_WINDOW, len(self._text) - self._place))
        self._text = self._text[self._place :] + self._decode(data, not data)
        self._place, self._ended = 0, not data

    def peek(self) -> str:
        """The next character that is no white space, where the text is read from now on; empty at the end."""
        while True:
            found = _NO_SPACE.search(self._text, self._place)
            self._place = found.start() if found else len(self._text)
            if found or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def skip(self, character: str) -> bool:
        """Past the character, if it is the next one; whether it was."""
        found = self.peek() == character
        self._place += found
        return found

    def value(self) -> Any:
        """The next value. Raises ValueError or RecursionError."""
        self.peek()
        while True:
            try:
                value, end = self._parse(self._text, self._place)
            except ValueError as error:
                if self._ended or len(self._text) - self._place > LONGEST:
                    raise ValueError(getattr(error, "msg", error)) from None
            else:
                # A number may go on beyond the window.
                if end < len(self._text) or self._ended:
                    text = self._text[self._place : end]
                    self._place = end
                    self.foreign = not text.isascii() and _FOREIGN.search(text) is not None
                    return json.loads(_FOREIGN.sub("\ufffd", text)) if self.foreign else value
            self._more()


# -- Parquet --------------------------------------------------------------------------------------------------------


class ParquetRecords(Records):
    """The rows of a Parquet file, read some thousand at a time.

    Attributes:
        schema: of its columns.
        rows: how many there are.
    """

    form = "get a whole Parquet file, or make it again"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._measured: set[str] = set()
        self.schema: pa.Schema = self._file.schema_arrow
        self.rows = int(self._file.metadata.num_rows)
        self._name(self.schema.names)
        twice = [name for name, count in Counter(self.names).items() if count > 1]
        if twice:
            raise UserError(
                f"{self.place}: has {len(twice)} columns twice, as {twice[0]!r}; rename one of them"
            )
        self.close()

    def close(self) -> None:
        if "_file" in self.__dict__:
            self._file.close(force=True)
            del self._file

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return self._opened(())

    def _opened(self, columns: Sequence[str]) -> pq.ParquetFile:
        """The file, these columns of which are small enough to be read. Raises UserError."""
        source: Any = self.place.open() if self.place.remote else self.place.name
        with self.place.stream() as stream:
            if not stream.seekable():
                try:
                    data = stream.read(_MOST_BYTES)
                except OSError as error:
                    raise UserError(
                        f"{self.place}: cannot be read ({first_line(error)}); {self.form}"
                    ) from None
                if len(data) == _MOST_BYTES:
                    raise UserError(f"{self.place}: has {_MOST_BYTES} bytes or more; decompress it")
                source = pa.BufferReader(data)
        return open_parquet(source, str(self.place), columns)

    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        start = first.offset if first else 0
        found = (row for batch in self._batches(start, self.names) for row in plain(batch))
        for row, values in enumerate(found, start):
            yield Record(row + 1, row, *values)

    def tables(self, row: int, size: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """The rows from `row` on, `size` at a time."""
        held = self.schema.empty_table().select(columns)
        for batch in self._batches(row, columns):
            held = pa.concat_tables([held, pa.Table.from_batches([batch])])
            while held.num_rows >= size:
                yield held.slice(0, size)
                held = held.slice(size)
        if held.num_rows:
            yield held

    def _batches(self, row: int, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """The rows from `row` on, of whose row groups those before it are not read."""
        if not self._measured >= {*columns}:
            self._opened(columns).close(force=True)
            self._measured |= {*columns}
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            if row >= group.num_rows:
                row -= group.num_rows
                continue
            try:
                most = self._rows_at_once(group, columns)
                for batch in self._file.iter_batches(most, [number], list(columns)):
                    if row < batch.num_rows:
                        yield batch.slice(row)
                    row = max(0, row - batch.num_rows)
            except (pa.ArrowException, OSError) as error:
                words = f"row group {number} cannot be read ({first_line(error)})"
                raise UserError(f"{self.place}: {words}; {self.form}") from None

    def _rows_at_once(self, group: Any, columns: Sequence[str]) -> int:
        """How many rows fit into memory together, by what the file says of itself. Raises UserError for none."""
        size = 0
        for chunk in map(group.column, range(group.num_columns)):
            if chunk.path_in_schema.partition(".")[0] in columns:
                size += chunk.total_uncompressed_size
        if size > LONGEST * max(1, group.num_rows):
            raise UserError(f"{self.place}: {size} bytes in {group.num_rows} rows; make them shorter")
        return int(max(1, min(_ROWS, 8 * LONGEST * group.num_rows // max(1, size))))


def plain(rows: pa.Table | pa.RecordBatch) -> list[tuple[dict[str, Any], str | None]]:
    """The values of each row as Python has them, or why it has none: text that is no UTF-8, a time before the year 1."""
    try:
        return [(values, None) for values in rows.to_pylist()]
    except (ValueError, OverflowError) as error:
        if rows.num_rows == 1:
            return [({}, f"the row has a value that cannot be read ({first_line(error)})")]
    return [row for number in range(rows.num_rows) for row in plain(rows.slice(number, 1))]
