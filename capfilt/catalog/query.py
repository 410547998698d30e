"""Asking a workspace in SQL: one read-only statement, printed as a table, JSON or CSV.

Which views there are is `schemas/views.sql`; what the connection may touch is in `views.py`.
"""

from __future__ import annotations

import base64
import json
import math
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from itertools import islice
from typing import Any, TextIO

import duckdb
import numpy as np
import pyarrow as pa

from capfilt.catalog.views import View, describe, open_catalog
from capfilt.errors import UserError
from capfilt.formats.columns import quoted, refusal
from capfilt.tables.visible import shortened, visible, visible_json
from capfilt.tables.workspace import Workspace

FORMATS = ("table", "json", "csv")
TABLE_ROWS = 40
"""Rows a table shows unless told otherwise: a screenful."""

_BATCH_ROWS = 10_000
_CELL_CHARACTERS = 400
_NARROWEST_CELL = 8


def query(workspace: Workspace, sql: str) -> pa.Table:
    """The rows of one SELECT over the workspace's views.

    Raises UserError, in one line, for SQL that DuckDB refuses and for every statement but SELECT (WITH, FROM, VALUES,
    DESCRIBE, SUMMARIZE, PIVOT) and EXPLAIN.
    """
    with _answer(workspace, sql) as relation:
        reader = _reader(relation)
        batches = list(_batches(reader))
        return pa.Table.from_batches(batches, schema=reader.schema)


def print_query(
    workspace: Workspace, sql: str, format: str, out: TextIO, *, rows: int = TABLE_ROWS, width: int = 0
) -> None:
    """Write the rows of `sql` to `out`; without SQL, the views with their columns and what they mean.

    Nothing is written before the first rows are there, so most errors leave `out` untouched.

    Args:
        workspace: the workspace.
        sql: one statement, as in `query`; blank for help.
        format: "table" (for people: long cells are cut, and what is not shown is said below), "json" (an array of
            objects) or "csv" (RFC 4180: CRLF line ends, a null is an empty field, an empty text is ""). In JSON and CSV
            bytes are base64; JSON has no NaN or infinity and says null. A terminal gets control characters as escapes in
            every format; in a file or a pipe, JSON and CSV read back as they were.
        out: a text stream; for CSV opened with newline="" where it is a file.
        rows: at most so many rows in a table; 0 for all. JSON and CSV always have all.
        width: of a table in columns; 0: the terminal's, or unlimited when `out` is none.

    Raises:
        UserError: for another format, and as `query`.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format!r}: choose {', '.join(FORMATS)}")
    if rows < 0:
        raise UserError(f"--rows {rows}: give a number of rows, or 0 for all")
    if not sql.strip():
        _print_help(workspace, out, format)
        return
    with _answer(workspace, sql) as relation:
        names = _distinct(relation.columns)
        reader, found = _plain_rows(relation)
        if format == "json":
            _print_json(names, found, out)
        elif format == "csv":
            _print_csv(names, found, out)
        elif names == ["explain_key", "explain_value"]:
            out.writelines(f"{row[1]}\n" for row in found)
        else:
            _print_table(names, found, reader.schema, out, rows, width or _terminal_width(out))


# -- asking --------------------------------------------------------------------------------------------------


@contextmanager
def _answer(workspace: Workspace, sql: str) -> Iterator[duckdb.DuckDBPyRelation]:
    with open_catalog(workspace) as connection:
        try:
            _refuse_all_but_reading(connection, sql)
            relation = connection.sql(sql)
        except duckdb.Error as error:
            raise UserError(_explain(str(error), connection)) from error
        yield relation


def _reader(relation: duckdb.DuckDBPyRelation) -> pa.RecordBatchReader:
    # DuckDB 1.4 renamed the method.
    method = "to_arrow_reader" if hasattr(relation, "to_arrow_reader") else "fetch_arrow_reader"
    try:
        return getattr(relation, method)(_BATCH_ROWS)
    except duckdb.Error as error:
        raise UserError(_explain(str(error))) from error


def _refuse_all_but_reading(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    statements = connection.extract_statements(sql)
    if len(statements) != 1:
        raise UserError(f"query: {len(statements)} statements; give one SELECT")
    text = statements[0].query
    kind = statements[0].type
    words = _words(text)
    if kind == duckdb.StatementType.EXPLAIN:
        # EXPLAIN ANALYZE runs what follows, and COPY may follow.
        words = words[1:]
        if words and words[0][1] == "analyze":
            words = words[1:]
        inner = connection.extract_statements(text[words[0][0] :]) if words else []
        kind = inner[0].type if inner else kind
    # A PIVOT anywhere turns a statement into several, so what it began as decides.
    reads = kind == duckdb.StatementType.SELECT or (
        kind == duckdb.StatementType.MULTI
        and bool(words)
        and words[0][1] in ("select", "from", "with", "pivot", "(")
    )
    if not reads:
        raise UserError("query: a workspace is read only; give one SELECT")


def _words(sql: str) -> list[tuple[int, str]]:
    """Offset and lower-case text of each token, comments left out. Offsets count bytes, as DuckDB's do."""
    data = sql.encode()
    tokens = [(place, kind) for place, kind in duckdb.tokenize(sql)]
    ends = [place for place, _ in tokens[1:]] + [len(data)]
    words = [
        (place, data[place:end].decode(errors="replace").strip().lower())
        for (place, kind), end in zip(tokens, ends, strict=True)
        if "comment" not in str(kind)
    ]
    return [(len(data[:place].decode(errors="replace")), word.split()[0]) for place, word in words if word]


def _batches(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    # Arrow hands an error of the running query on as an OSError with DuckDB's message.
    try:
        yield from reader
    except (duckdb.Error, pa.ArrowException, OSError) as error:
        raise UserError(_explain(str(error))) from error


def _explain(message: str, connection: duckdb.DuckDBPyConnection | None = None) -> str:
    """DuckDB's message in one line; a missing table gets the names of the views."""
    text = refusal(message)
    if connection is not None and "Table with name" in text:
        names = " ".join(view.name for view in describe(connection))
        text = f"{text.split('!')[0]}; the views are {names}"
    return visible(f"query: {text}")


# -- values --------------------------------------------------------------------------------------------------


_KEPT = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint", "hugeint",
    "float", "double", "decimal", "varchar", "blob", "null",
)  # fmt: skip
"""The types whose every value Arrow and Python hold. Of dates and times they know no infinity, nor the year 10000."""

_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d+)?)(\+00)?")


def _plain_rows(relation: duckdb.DuckDBPyRelation) -> tuple[pa.RecordBatchReader, Iterator[list[Any]]]:
    """The answer in types that `_KEPT` has, with its rows as the plain types of JSON; all other values are text."""
    types = relation.types
    plain = [_plain_type(type_) for type_ in types]
    if any(wanted != str(type_) for wanted, type_ in zip(plain, types, strict=True)):
        # By place, because names may be there twice.
        casts = (f"CAST(#{place} AS {wanted})" for place, wanted in enumerate(plain, start=1))
        relation = relation.project(", ".join(casts))
    reader = _reader(relation)
    return reader, _rows(reader, [_converter(type_) for type_ in types])


def _plain_type(type_: Any) -> str:
    if type_.id in _KEPT:
        return str(type_)
    if type_.id in ("list", "array"):
        return f"{_plain_type(type_.children[0][1])}[]"
    if type_.id == "map":
        key, value = (_plain_type(child) for _, child in type_.children)
        return f"MAP({key}, {value})"
    if type_.id == "struct" and type_.children:
        fields = (f"{quoted(name)} {_plain_type(child)}" for name, child in type_.children)
        return f"STRUCT({', '.join(fields)})"
    return "VARCHAR"


def _rows(
    reader: pa.RecordBatchReader, converters: Sequence[Callable[[Any], Any] | None]
) -> Iterator[list[Any]]:
    for batch in _batches(reader):
        columns = [
            [None if value is None else convert(value) for value in column.to_pylist()]
            if convert
            else column.to_pylist()
            for convert, column in zip(converters, batch.columns, strict=True)
        ]
        yield from (list(row) for row in zip(*columns, strict=True))


def _converter(type_: Any) -> Callable[[Any], Any] | None:
    """The function from a value, no null, of a DuckDB type to JSON's plain types; None where nothing needs doing."""
    if type_.id == "float":
        # As few digits as tell the 32-bit number from its neighbours: 0.3, not 0.30000001192092896.
        return lambda value: float(str(np.float32(value)))
    if type_.id in ("decimal", "hugeint"):
        return _decimal
    if type_.id.startswith("timestamp"):
        return _iso
    if type_.id in ("list", "array"):
        inner = _converter(type_.children[0][1])
        return inner and (lambda values: [None if value is None else inner(value) for value in values])
    if type_.id == "struct":
        inners = {name: inner for name, child in type_.children if (inner := _converter(child))}
        if not inners:
            return None
        return lambda value: {
            name: inners[name](each) if name in inners and each is not None else each
            for name, each in value.items()
        }
    if type_.id == "map":
        return lambda value: {str(key): item for key, item in value}
    return None


def _iso(text: str) -> str:
    """DuckDB's text of a moment as ISO 8601 has it; infinity, and years beyond four digits, as they are."""
    found = _MOMENT.fullmatch(text)
    return f"{found[1]}T{found[2]}{'+00:00' if found[3] else ''}" if found else text


def _decimal(value: Decimal) -> int | float:
    # DuckDB sums integers to DECIMAL(38, 0), and reads 0.5 as a DECIMAL.
    return (
        int(value) if value == value.to_integral_value() and value.as_tuple().exponent == 0 else float(value)
    )


def _plain(value: Any) -> Any:
    """`value` as JSON can say it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value


def _distinct(names: Sequence[str]) -> list[str]:
    """The names with `_2`, `_3`, ... behind repeated ones: a JSON object has each key once."""
    seen: set[str] = set()
    result = []
    for name in names:
        unique, count = name, 1
        while unique in seen:
            count += 1
            unique = f"{name}_{count}"
        seen.add(unique)
        result.append(unique)
    return result


# -- printing ------------------------------------------------------------------------------------------------


def _print_json(names: Sequence[str], rows: Iterator[list[Any]], out: TextIO) -> None:
    opening = "["
    for row in rows:
        record = {name: _plain(value) for name, value in zip(names, row, strict=True)}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
        out.write(f"{opening}\n{visible_json(line)}")
        opening = ","
    out.write("[]\n" if opening == "[" else "\n]\n")


def _print_csv(names: Sequence[str], rows: Iterator[list[Any]], out: TextIO) -> None:
    first = next(rows, None)
    # A terminal would obey what a file or a program has to get as it is.
    shown = visible if out.isatty() else str
    line: Sequence[Any] | None = names
    while line is not None:
        out.write(",".join(_csv_field(value, shown) for value in line) + "\r\n")
        line, first = first, next(rows, None)


def _csv_field(value: Any, shown: Callable[[str], str]) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        text = repr(value)
    else:
        plain = _plain(value)
        text = shown(json.dumps(plain, ensure_ascii=False) if isinstance(plain, dict | list) else str(plain))
    if not text or any(character in text for character in '",\r\n'):
        return '"' + text.replace('"', '""') + '"'
    return text


def _print_table(
    names: Sequence[str], rows: Iterator[list[Any]], schema: pa.Schema, out: TextIO, limit: int, width: int
) -> None:
    shown = list(islice(rows, limit)) if limit else list(rows)
    more = bool(limit) and next(rows, None) is not None
    cells = [[_cell(value) for value in row] for row in shown]
    header = [visible(name) for name in names]
    widths = [
        max([_columns(name), *(_columns(row[place]) for row in cells)]) for place, name in enumerate(header)
    ]
    widths = _fit(widths, width)
    right = [_is_number(field.type) for field in schema]
    for line in (header, ["─" * size for size in widths], *cells):
        fields = (
            _pad(cell, size, right=number) for cell, size, number in zip(line, widths, right, strict=True)
        )
        out.write("  ".join(fields).rstrip() + "\n")
    count = f"{len(shown):,} {'row' if len(shown) == 1 else 'rows'}"
    out.write(
        f"\nthe first {count}; there are more: --format csv or json gives all\n" if more else f"\n{count}\n"
    )


def _cell(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return str(value) if not math.isfinite(value) else f"{value:.6g}"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, dict | list):
        return shortened(
            visible(json.dumps(_brief(value), ensure_ascii=False, default=str)), _CELL_CHARACTERS
        )
    return shortened(visible(value if isinstance(value, str) else str(value)), _CELL_CHARACTERS)


def _brief(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _brief(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_brief(item) for item in value]
    return f"<{len(value):,} bytes>" if isinstance(value, bytes) else value


def _is_number(type_: pa.DataType) -> bool:
    return bool(pa.types.is_integer(type_) or pa.types.is_floating(type_) or pa.types.is_decimal(type_))


def _fit(widths: list[int], total: int) -> list[int]:
    """`widths` with the widest columns narrowed until all fit into `total` columns of the terminal (0: no limit)."""
    result = list(widths)
    gaps = 2 * (len(widths) - 1)
    while total and sum(result) + gaps > total:
        widest = max(range(len(result)), key=lambda place: result[place])
        if result[widest] <= _NARROWEST_CELL:
            break
        result[widest] -= 1
    return result


def _columns(text: str) -> int:
    """How many terminal columns `text` takes: East Asian wide characters two, combining ones none."""
    if text.isascii():
        return len(text)
    return sum(map(_character_columns, text))


def _character_columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1


def _pad(text: str, size: int, *, right: bool) -> str:
    room = size - _columns(text)
    if room < 0:
        kept, used = [], 0
        for character in text:
            used += _character_columns(character)
            if used > size - 1:
                break
            kept.append(character)
        text = "".join(kept) + "…"
        room = size - _columns(text)
    return " " * room + text if right else text + " " * room


def _terminal_width(out: TextIO) -> int:
    return shutil.get_terminal_size().columns if out.isatty() else 0


# -- help ----------------------------------------------------------------------------------------------------


def _print_help(workspace: Workspace, out: TextIO, format: str) -> None:
    with open_catalog(workspace) as connection:
        views = describe(connection)
        counts = dict(connection.execute(_HELD).fetchall())
    if format == "table":
        _print_views(views, counts, out)
        return
    names = ["view", "column", "type", "comment"]
    rows = (
        [view.name, column.name, column.type, column.comment] for view in views for column in view.columns
    )
    (_print_json if format == "json" else _print_csv)(names, rows, out)


_HELD = "SELECT table_name, sum(rows_out)::BIGINT FROM parts GROUP BY table_name"


def _print_views(views: Sequence[View], counts: Mapping[str, int], out: TextIO) -> None:
    wide = max(len(column.name) for view in views for column in view.columns)
    types = max(min(len(column.type), 24) for view in views for column in view.columns)
    for view in views:
        held = f" ({counts[view.name]:,} rows)" if view.name in counts else ""
        out.write(f"{view.name}{held}: {visible(view.comment)}\n")
        for column in view.columns:
            kind = visible(shortened(column.type, types))
            line = f"  {visible(column.name):<{wide}}  {kind:<{types}}  {visible(column.comment)}"
            out.write(line.rstrip() + "\n")
        out.write("\n")
    out.write('capfilt query "SELECT quantile_cont(itm_score, 0.3) FROM scores"\n')
