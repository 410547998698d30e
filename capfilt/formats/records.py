"""Lists of records in other tools' files: txt, csv, tsv, json, jsonl and Parquet, plain or compressed, in UTF-8 or UTF-16.

A record that cannot be read is a record that says why, and takes no other along. What the fields mean is the business of
the formats beside this file; where the bytes lie is `places.py`.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.formats.places import Place

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

_LONGEST_SKIPPED = 2_000_000_000
_MOST_LINES = 100_000
_MOST_COLUMNS = 10_000
_HEAD = 100
_WINDOW = 1 << 16
"""Characters of a JSON array that are read at once; twice as many for a value that is longer."""

_PARQUET = (b"PAR1", b"PARE")
_ROWS = 8192
_MOST_VALUES = 1000
"""Values in a list of Parquet, on average of a row group: above it, the file is refused."""

_SPACE = re.compile(r"[ \t\n\r]*")
_ESCAPED = re.compile("[\udc80-\udcff]")


class EmptyFile(UserError):
    """A text file without anything in it."""


class Record(NamedTuple):
    """One record of a list.

    Attributes:
        number: from 1; of text, the line it begins at, else its place in the file.
        offset: where it begins: of text, the byte of the decompressed text as UTF-8; of Parquet, the row from 0.
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
    """

    form: ClassVar[str]
    """What such a list is like, in words."""

    names: list[str]

    def __init__(self, place: Place) -> None:
        self.place = place

    def __iter__(self) -> Iterator[Record]:
        return self.iterate()

    def _name(self, names: Sequence[str]) -> None:
        if len(names) > _MOST_COLUMNS:
            raise UserError(f"{self.place}: has {len(names)} columns, more than {_MOST_COLUMNS}; {self.form}")
        self.names = list(names)

    @abstractmethod
    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        """The records from `first` on, which was once read here. Raises UserError where the file breaks off."""


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
            raise UserError(
                f"{place}: its name does not tell the format; name it like one of: {', '.join(SUFFIXES)}"
            )
    if format == "parquet":
        return ParquetRecords(place)
    if format == "json":
        with _text(place) as file:
            if _Sliding(file).peek() == "{":
                format = "jsonl"
    if format in ("csv", "tsv"):
        return _Delimited(place, header, "," if format == "csv" else "\t")
    if format == "txt":
        return _Values(place, header)
    return _Lines(place) if format == "jsonl" else _Array(place)


# -- text -----------------------------------------------------------------------------------------------------------


class _AsUtf8(io.RawIOBase):
    """Text in another encoding as UTF-8; what cannot be decoded is U+FFFD."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._text = io.TextIOWrapper(file, encoding, errors="replace", newline="")
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or self._text.read(_WINDOW).encode("utf-8", "replace")
        size = min(len(buffer), len(data))
        buffer[:size], self._rest = data[:size], data[size:]
        return size

    def close(self) -> None:
        self._text.close()
        super().close()


def _text(place: Place, offset: int = 0) -> BinaryIO:
    """A file's text as UTF-8, decompressed, from a byte of it on. Raises UserError when it is no text."""
    file = place.stream()
    head = cast(io.BufferedReader, file).peek(1024)[:1024]
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-32" if head.startswith(codecs.BOM_UTF32_LE) else "utf-16"
        file = io.BufferedReader(_AsUtf8(file, encoding), _WINDOW)
    elif 10 * head.count(0) > len(head):
        file.close()
        raise UserError(
            f"{place}: is no text (many of its bytes are zero: a binary file, or UTF-16 without a byte order mark); "
            "give a list as UTF-8"
        )
    if offset and file.seekable():
        file.seek(offset)
        return file
    while skipped := file.read(min(offset, 1 << 20)):
        offset -= len(skipped)
    return file


class _Text(Records):
    """Records of a text file. Bytes that are not UTF-8 become U+FFFD, and a warning."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._foreign = Counter[str]()

    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        number, offset = first[:2] if first else (1, 0)
        try:
            with _text(self.place, offset) as file:
                self._foreign.clear()
                yield from self._scan(file, offset, number)
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{self.place}: cannot be read to its end ({_first_line(error)}); get the file again"
            ) from None
        if self._foreign and not offset:
            warnings.warn(
                f"{self.place}: {self._foreign['records']} records have bytes that are not UTF-8, the first at byte "
                f"{self._foreign['first']}; they became U+FFFD. Convert a list in Latin-1 with: iconv -f latin1 -t utf-8",
                RuntimeWarning,
                stacklevel=2,
            )

    @abstractmethod
    def _scan(self, file: BinaryIO, offset: int, number: int) -> Iterator[Record]:
        """Records from where `file` stands."""

    def _note(self, offset: int) -> None:
        self._foreign.setdefault("first", offset)
        self._foreign["records"] += 1

    def _lines(self, file: BinaryIO, offset: int, number: int) -> Iterator[_Line]:
        """The lines, ends included; of one that is too long, nothing."""
        while data := file.readline(LONGEST):
            size = len(data)
            if size == LONGEST and not data.endswith(b"\n"):
                yield _Line(number, offset, None)
                while data and not data.endswith(b"\n"):
                    data = file.readline(1 << 20)
                    size += len(data)
                    if size > _LONGEST_SKIPPED:
                        raise UserError(
                            f"{self.place}: line {number} is longer than {_LONGEST_SKIPPED} bytes; {self.form}"
                        )
            else:
                text = data.removeprefix(codecs.BOM_UTF8) if offset == 0 else data
                try:
                    yield _Line(number, offset, text.decode())
                except UnicodeDecodeError:
                    self._note(offset)
                    yield _Line(number, offset, text.decode("utf-8", "replace"))
            offset += size
            number += 1


class _Line(NamedTuple):
    number: int
    offset: int
    text: str | None

    def broken(self, words: str) -> Record:
        return Record(self.number, self.offset, {}, f"the line at byte {self.offset} {words}")


_TOO_LONG = f"is longer than {LONGEST} bytes"


class _Values(_Text):
    """One value per line; lines without any are no records."""

    form = "a txt list has one value per line"

    def __init__(self, place: Place, header: Sequence[str]) -> None:
        super().__init__(place)
        self._name(header[:1] or ["value"])
        first = next(self.iterate(), None)
        if first is None:
            raise EmptyFile(f"{place}: is empty; {self.form}")
        if first.fault:
            raise UserError(f"{place}: {first.fault}; {self.form}")

    def _scan(self, file: BinaryIO, offset: int, number: int) -> Iterator[Record]:
        for line in self._lines(file, offset, number):
            if line.text is None:
                yield line.broken(_TOO_LONG)
            elif text := line.text.strip():
                yield Record(line.number, line.offset, {self.names[0]: text})


class _Delimited(_Text):
    """A line of names, then lines of fields.

    Attributes:
        key: the column that names a record's picture, and how its values look, where both are known. A record of several
            lines, one of which is a record with such a value by itself, has left a quote open.
    """

    form = "its first line must name the columns"

    def __init__(self, place: Place, header: Sequence[str], separator: str) -> None:
        super().__init__(place)
        csv.field_size_limit(LONGEST)
        self.key: tuple[str, re.Pattern[str]] | None = None
        self._name(())
        with _text(place) as file:
            first = next(self._lines(file, 0, 1), None)
            self._separator = _separator(first.text or "" if first else "", separator)
        self._named = not header
        if header:
            self._name(header)
            return
        with _text(place) as file:
            fields = next(self._rows(file, 0, 1), (None, []))[1]
        if isinstance(fields, str):
            raise UserError(f"{place}: {self.form}; the line {fields}")
        if not fields:
            raise EmptyFile(f"{place}: is empty; {self.form}")
        self._name([name.strip() for name in fields])

    def _scan(self, file: BinaryIO, offset: int, number: int) -> Iterator[Record]:
        rows = self._rows(file, offset, number)
        if self._named and not offset:
            next(rows, None)
        for line, fields in rows:
            if isinstance(fields, str):
                yield line.broken(fields)
            elif len(fields) > len(self.names):
                # Which of them is the text with a stray separator in it cannot be known.
                words = f"the line has {len(fields)} fields, the header {len(self.names)}"
                yield Record(line.number, line.offset, {}, words)
            else:
                yield Record(line.number, line.offset, dict(zip(self.names, fields, strict=False)))

    def _rows(self, file: BinaryIO, offset: int, number: int) -> Iterator[tuple[_Line, list[str] | str]]:
        """Lines with their fields, or with what is wrong with them; the first line of a record that has several."""
        source = self._lines(file, offset, number)
        if self._separator == "\t":
            for line in source:
                if line.text is None:
                    yield line, _TOO_LONG
                elif text := line.text.rstrip("\r\n"):
                    yield line, text.split("\t")
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
            fields: list[str] | str | None
            try:
                fields = next(reader, None)
                broken = any(self._is_record(line) for line in taken[1:])
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
        fields = self._alone(line) if self.key else ""
        if self.key is None or isinstance(fields, str) or len(fields) != len(self.names):
            return False
        where = self.names.index(self.key[0]) if self.key[0] in self.names else 0
        return self.key[1].match(fields[where]) is not None

    def _alone(self, line: _Line) -> list[str] | str:
        """The fields of a line by itself, its quotes taken as they come."""
        if line.text is None:
            return _TOO_LONG
        reader = csv.reader([line.text, ""], delimiter=self._separator)
        try:
            fields = next(reader)
        except csv.Error as error:
            return f"is no CSV ({error})"
        return fields if reader.line_num == 1 else "opens a quote and does not close it"


def _separator(line: str, usual: str) -> str:
    """What stands between the fields of a first line: another than usual only where the usual is not there."""
    found = Counter(re.sub(r'"[^"]*"', "", line))
    return usual if found[usual] else max(usual, ",", "\t", "|", ";", key=lambda each: found[each])


class _Objects(_Text):
    """JSON objects."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        head = list(islice(self.iterate(), _HEAD))
        if not head:
            raise EmptyFile(f"{place}: is empty; {self.form}")
        if all(record.fault for record in head):
            raise UserError(f"{place}: {head[0].fault}; {self.form}")
        self._name(list(dict.fromkeys(name for record in head for name in record.fields)))


class _Lines(_Objects):
    """One JSON object per line."""

    form = "a jsonl list has one JSON object per line"

    def _scan(self, file: BinaryIO, offset: int, number: int) -> Iterator[Record]:
        for line in self._lines(file, offset, number):
            if line.text is None:
                yield line.broken(_TOO_LONG)
            elif line.text.strip():
                try:
                    record = json.loads(line.text)
                except (ValueError, RecursionError) as error:
                    yield line.broken(f"is not JSON ({error})")
                    continue
                if isinstance(record, dict):
                    yield Record(line.number, line.offset, record)
                else:
                    yield line.broken("is not a JSON object")


class _Array(_Objects):
    """One JSON array of objects, read a piece at a time."""

    form = "a json list is an array of objects, or one object per line"

    def _scan(self, file: BinaryIO, offset: int, number: int) -> Iterator[Record]:
        text = _Sliding(file, offset)
        if not offset:
            text.skip("\ufeff")
            if not text.peek():
                return
            if not text.skip("["):
                raise self._broken(text, "it does not begin with [")
        going = offset > 0 or not text.skip("]")
        while going:
            text.peek()
            start = text.offset
            try:
                value = text.value()
            except (ValueError, RecursionError) as error:
                raise self._broken(text, str(error)) from None
            if text.foreign:
                self._note(start)
            found = isinstance(value, dict)
            yield Record(number, start, value if found else {}, None if found else "is not a JSON object")
            number += 1
            going = text.skip(",")
            if not going and not text.skip("]"):
                raise self._broken(text, "a value is followed by neither , nor ]")
        if text.peek():
            raise self._broken(text, "more follows its end")

    def _broken(self, text: _Sliding, words: str) -> UserError:
        return UserError(f"{self.place}: is not JSON (at byte {text.offset}: {words}); {self.form}")


class _Sliding:
    """The JSON text of a file from where it stands, of which a window is in memory. `offset` is where it is read, in bytes.

    UTF-8, as RFC 8259 asks for; other bytes are U+FFFD as in other lists, and `foreign` says that the last value has some.
    """

    def __init__(self, file: BinaryIO, offset: int = 0) -> None:
        self.offset = offset
        self.foreign = False
        self._file = file
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._place, self._ended = "", 0, False

    def _more(self) -> None:
        data = self._file.read(max(_WINDOW, len(self._text) - self._place))
        self._text = self._text[self._place :] + self._decode(data, not data)
        self._place, self._ended = 0, not data

    def _advance(self, place: int) -> str:
        text = self._text[self._place : place]
        self.offset += len(text.encode("utf-8", "surrogateescape"))
        self._place = place
        return text

    def peek(self) -> str:
        """The next character that is no white space, where the text is read from now on; empty at the end."""
        while True:
            space = _SPACE.match(self._text, self._place)
            assert space is not None
            self._advance(space.end())
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._more()

    def skip(self, character: str) -> bool:
        """Past the character, if it is the next one; whether it was."""
        if found := self.peek() == character:
            self._advance(self._place + 1)
        return found

    def value(self) -> Any:
        """The value that begins here. Raises ValueError or RecursionError."""
        while True:
            try:
                value, end = self._parse(self._text, self._place)
                # A number may go on beyond the window.
                if end < len(self._text) or self._ended:
                    text = self._advance(end)
                    self.foreign = not text.isascii() and _ESCAPED.search(text) is not None
                    return json.loads(_ESCAPED.sub("\ufffd", text)) if self.foreign else value
            except ValueError as error:
                if self._ended or len(self._text) - self._place > LONGEST:
                    raise ValueError(
                        error.msg if isinstance(error, json.JSONDecodeError) else error
                    ) from None
            self._more()


# -- Parquet --------------------------------------------------------------------------------------------------------


class ParquetRecords(Records):
    """The rows of a Parquet file, read some thousand at a time."""

    form = "give a Parquet file, whole and not compressed as a file"

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._held: tuple[int, int, pa.RecordBatch] | None = None
        self._name(self.schema.names)

    def __getstate__(self) -> dict[str, Any]:
        return {"place": self.place, "names": self.names, "_held": None}

    @cached_property
    def _file(self) -> pq.ParquetFile:
        try:
            file: Any = self.place.open()
            whole = file.peek(4).startswith(_PARQUET)
            if whole and self.place.remote:
                return pq.ParquetFile(file)
            file.close()
            return pq.ParquetFile(self.place.name if whole else self._decompressed())
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.place}: is not a Parquet file ({_first_line(error)}); {self.form}"
            ) from None

    def _decompressed(self) -> Any:
        file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the ParquetFile that reads it
        with self.place.stream() as stream:
            while (data := stream.read(1 << 20)) and (file.tell() or data.startswith(_PARQUET)):
                if file.tell() > _LONGEST_SKIPPED:
                    raise UserError(f"{self.place}: is longer than {_LONGEST_SKIPPED} bytes; {self.form}")
                file.write(data)
        return file

    @property
    def schema(self) -> pa.Schema:
        return self._file.schema_arrow

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def iterate(self, first: Record | None = None) -> Iterator[Record]:
        row = first.offset if first else 0
        for begin, _, batch in self._batches(row, self.names):
            for number, fields in enumerate(batch.slice(max(0, row - begin)).to_pylist(), max(begin, row)):
                yield Record(number + 1, number, fields)

    def table(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """The rows from `start` to before `stop`. Rows after those of the last call are found the soonest."""
        held = self._held
        if held is None or not held[0] <= start < held[1] or held[2].schema.names != list(columns):
            self._source = self._batches(start, columns)
            held = next(self._source)
        pieces = []
        while True:
            begin, _, batch = held
            end = begin + batch.num_rows
            if end > start:
                pieces.append(batch.slice(max(0, start - begin), min(stop, end) - max(start, begin)))
            if end >= stop:
                self._held = held
                return pa.Table.from_batches(pieces)
            held = next(self._source)

    def _batches(self, row: int, columns: Sequence[str]) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """(first row, end of its row group, rows), from the row group of `row` on."""
        begin = 0
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            end = begin + group.num_rows
            if row < end:
                try:
                    most = self._rows_at_once(group, columns)
                    for batch in self._file.iter_batches(most, [number], list(columns)):
                        yield begin, end, batch
                        begin += batch.num_rows
                except (pa.ArrowException, OSError) as error:
                    words = f"row group {number} cannot be read ({_first_line(error)})"
                    raise UserError(f"{self.place}: {words}; {self.form}") from None
            begin = end

    def _rows_at_once(self, group: Any, columns: Sequence[str]) -> int:
        """How many rows fit into memory together, by what the file says of itself. Raises UserError for none."""
        chunks = [group.column(number) for number in range(group.num_columns)]
        chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
        for chunk in chunks:
            if chunk.num_values > max(_MOST_VALUES * group.num_rows, 1_000_000):
                raise UserError(
                    f"{self.place}: column {chunk.path_in_schema} has {chunk.num_values} values in {group.num_rows} rows; "
                    "take it out of the file"
                )
        size = sum(chunk.total_uncompressed_size for chunk in chunks)
        if size > LONGEST * max(1, group.num_rows):
            raise UserError(f"{self.place}: {size} bytes in {group.num_rows} rows; make the rows shorter")
        return int(max(1, min(_ROWS, 8 * LONGEST * group.num_rows // max(1, size))))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
