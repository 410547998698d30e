"""Asking a workspace in SQL: one read-only statement, printed as a table, JSON or CSV.

DuckDB turns every value into the text that is printed; this module writes the texts. Which views there are is
`schemas/views.sql`; what the connection may touch is in `views.py`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from itertools import chain, islice
from typing import Any, TextIO

import duckdb
import pyarrow as pa

from capfilt.catalog.terminal import write_table
from capfilt.catalog.views import View, describe, open_catalog
from capfilt.errors import UserError
from capfilt.formats.columns import literal, quoted, refusal
from capfilt.tables.visible import shortened, visible, visible_json
from capfilt.tables.workspace import Workspace

FORMATS = ("table", "json", "csv")
TABLE_ROWS = 40
"""Rows a table shows unless told otherwise: a screenful."""

_BATCH_ROWS = 10_000
_CELL_CHARACTERS = 400


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
    if not sql.strip() and format == "table":
        _print_views(workspace, out)
        return
    with _answer(workspace, sql) as relation:
        names = _distinct(relation.columns)
        found = _texts(relation, format)
        found = chain([*islice(found, 1)], found)  # asked before anything is written
        if format == "json":
            _print_json(names, found, out)
        elif format == "csv":
            _print_csv(names, found, out)
        elif names == ["explain_key", "explain_value"]:
            out.writelines(f"{row[1]}\n" for row in found)
        else:
            right = [type_.id in (*_EXACT[1:], *_FLOATS) for type_ in relation.types]
            _print_table(names, found, right, out, rows, width or _terminal_width(out))


# -- asking --------------------------------------------------------------------------------------------------


@contextmanager
def _answer(workspace: Workspace, sql: str) -> Iterator[duckdb.DuckDBPyRelation]:
    with open_catalog(workspace) as connection:
        try:
            if sql.strip():
                _refuse_all_but_reading(connection, sql)
                relation = connection.sql(sql)
            else:
                relation = connection.from_arrow(_columns_table(describe(connection)))
        except duckdb.Error as error:
            raise UserError(_explain(str(error), connection)) from error
        yield relation


def _reader(relation: duckdb.DuckDBPyRelation, columns: str = "") -> pa.RecordBatchReader:
    # DuckDB 1.4 renamed the method.
    method = "to_arrow_reader" if hasattr(relation, "to_arrow_reader") else "fetch_arrow_reader"
    try:
        return getattr(relation.project(columns) if columns else relation, method)(_BATCH_ROWS)
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


_EXACT = (
    "boolean", "tinyint", "smallint", "integer", "bigint", "utinyint", "usmallint", "uinteger", "ubigint", "hugeint",
    "decimal",
)  # fmt: skip
_FLOATS = ("float", "double")
_NESTED = ("list", "array", "struct", "map")


def _texts(relation: duckdb.DuckDBPyRelation, format: str) -> Iterator[tuple[str | None, ...]]:
    """The rows, each value as the text that the format has of it; a null is None."""
    # By place, because names may be there twice.
    columns = (_text(f"#{place}", type_, format) for place, type_ in enumerate(relation.types, start=1))
    for batch in _batches(_reader(relation, ", ".join(columns))):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _text(value: str, type_: Any, format: str) -> str:
    """SQL for the text of a value: JSON in JSON and of all that is nested, and otherwise as people write it."""
    if type_.id in _EXACT:
        pass  # the text of numbers is JSON already
    elif format == "json" or (type_.id in _NESTED and type_.children):
        value = f"to_json({_plain(value, type_, format)})"
    elif type_.id not in _FLOATS:
        value = _plain(value, type_, format)
    elif format == "table":
        value = f"format('{{:.6g}}', {value})"
    return f"CAST({value} AS VARCHAR)"


def _plain(value: str, type_: Any, format: str, depth: int = 0) -> str:
    """SQL for a value in types of which DuckDB makes right JSON. Of other types, as dates and times, it is text."""
    kind, each = type_.id, f"each{depth}"

    def inner(part: str, child: Any) -> str:
        return _plain(part, child, format, depth + 1)

    if kind in _EXACT:
        return value
    if kind in _FLOATS:
        # By way of text, which has as few digits as tell a 32-bit number from its neighbours. JSON has no infinity.
        exact = f"CAST(CAST({value} AS VARCHAR) AS DOUBLE)"
        return exact if format == "table" else f"CASE WHEN isfinite({value}) THEN {exact} END"
    if kind == "blob":
        return (
            f"format('<{{:,}} bytes>', octet_length({value}))" if format == "table" else f"to_base64({value})"
        )
    if kind.startswith("timestamp"):
        # ISO 8601; infinity, and years beyond four digits, as they are.
        moment = rf"regexp_replace(CAST({value} AS VARCHAR), '^(\d{{4}}-\d\d-\d\d) (\d\d:[\d:.]+)', '\1T\2')"
        return rf"regexp_replace({moment}, '(T.*\+00)$', '\1:00')"
    if kind in ("list", "array"):
        return f"list_transform({value}, lambda {each}: {inner(each, type_.children[0][1])})"
    if kind == "map":
        pair = (
            f"{{'key': CAST({each}.key AS VARCHAR), 'value': {inner(f'{each}.value', type_.children[1][1])}}}"
        )
        return f"map_from_entries(list_transform(map_entries({value}), lambda {each}: {pair}))"
    if kind == "struct" and type_.children:
        fields = (
            f"{quoted(name)} := {inner(f'struct_extract({value}, {literal(name)})', child)}"
            for name, child in type_.children
        )
        return f"CASE WHEN {value} IS NOT NULL THEN struct_pack({', '.join(fields)}) END"
    return f"CAST({value} AS VARCHAR)"


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


Rows = Iterator[tuple[str | None, ...]]


def _print_json(names: Sequence[str], rows: Rows, out: TextIO) -> None:
    keys = [json.dumps(name, ensure_ascii=False) for name in names]
    opening = "["
    for row in rows:
        fields = ", ".join(f"{key}: {value or 'null'}" for key, value in zip(keys, row, strict=True))
        out.write(f"{opening}\n{{{visible_json(fields)}}}")
        opening = ","
    out.write("[]\n" if opening == "[" else "\n]\n")


def _print_csv(names: Sequence[str], rows: Rows, out: TextIO) -> None:
    # A terminal would obey what a file or a program has to get as it is.
    shown = visible if out.isatty() else str
    lines = (",".join(_csv_field(value, shown) for value in row) for row in chain([names], rows))
    out.writelines(f"{line}\r\n" for line in lines)


def _csv_field(value: str | None, shown: Callable[[str], str]) -> str:
    if value is None:
        return ""
    text = shown(value)
    return '"' + text.replace('"', '""') + '"' if not text or set(text) & set('",\r\n') else text


def _print_table(
    names: Sequence[str], rows: Rows, right: Sequence[bool], out: TextIO, limit: int, width: int
) -> None:
    shown = list(islice(rows, limit or None))
    more = next(rows, None) is not None
    cells = [
        ["null" if value is None else shortened(visible(value), _CELL_CHARACTERS) for value in row]
        for row in shown
    ]
    write_table(names, cells, right, out, width)
    count = f"{len(shown):,} {'row' if len(shown) == 1 else 'rows'}"
    said = f"the first {count}; there are more: --format csv or json gives all" if more else count
    out.write(f"\n{said}\n")


def _terminal_width(out: TextIO) -> int:
    return shutil.get_terminal_size().columns if out.isatty() else 0


# -- help ----------------------------------------------------------------------------------------------------


_HELD = "SELECT table_name, sum(rows_out)::BIGINT FROM parts GROUP BY table_name"


def _columns_table(views: Sequence[View]) -> pa.Table:
    rows = [(view.name, *astuple(column)) for view in views for column in view.columns]
    return pa.table(list(map(list, zip(*rows, strict=True))), names=["view", "column", "type", "comment"])


def _print_views(workspace: Workspace, out: TextIO) -> None:
    with open_catalog(workspace) as connection:
        views = describe(connection)
        counts = dict(connection.execute(_HELD).fetchall())
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
