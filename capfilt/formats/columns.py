"""Columns that are carried along as they are: the one type that columns of several types share, and reading them from
foreign Parquet files.

Types are DuckDB's. Which columns a table has of its own is `capfilt/tables/contracts.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.errors import UserError
from capfilt.formats.parquet_file import open_parquet

if TYPE_CHECKING:
    import duckdb

TEXT = "VARCHAR"
"""The type of values of unlike types: a text as it is, bytes as base64, lists and structs as JSON, else DuckDB's text."""

_INTEGERS = (
    "tinyint", "utinyint", "smallint", "usmallint", "integer", "uinteger", "bigint", "ubigint", "hugeint",
)  # fmt: skip


SETTINGS = {
    # A query never fetches code.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # A name that is no view must be an error, not a variable of the calling Python.
    "python_enable_replacements": "false",
    "TimeZone": "UTC",
}
"""Settings of every connection here, so that a value has the same text on every machine."""


def lock(connection: duckdb.DuckDBPyConnection, files: Sequence[str] = ()) -> None:
    """From now on the connection reads these files and nothing else, and takes no setting."""
    # DuckDB asks for permission under the pattern as well as under the file's name.
    allowed = sorted({name for path in files for name in (path, pattern(path))})
    connection.execute(f"SET allowed_paths = [{', '.join(map(literal, allowed))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def refusal(message: str) -> str:
    """DuckDB's message in one line, without the caret picture."""
    return " ".join(message.split("\n\nLINE ", maxsplit=1)[0].split())


def quoted(name: str) -> str:
    """`name` as an identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """`text` as a string of SQL."""
    return "'" + text.replace("'", "''") + "'"


def pattern(path: str) -> str:
    """The pattern that matches `path` alone: read_parquet takes patterns, and a directory may be called `a[1]`."""
    return re.sub(r"([*?\[])", r"[\1]", path)


def rows_of(files: Sequence[str]) -> str:
    """SQL for the rows of Parquet files that have the same columns."""
    names = ", ".join(literal(pattern(path)) for path in files)
    return f"read_parquet([{names}], hive_partitioning = false)"


def common_type(types: Sequence[Any]) -> str:
    """The DuckDB type that columns of these DuckDB types become together.

    Where they merely widen, the wider: integers of several widths become an integer that holds them all, other numbers a
    DOUBLE (which rounds integers above 2^53), lists a list. NULL widens to anything. All else is TEXT.
    """
    return _wider(types) or TEXT


def _wider(types: Sequence[Any]) -> str | None:
    found = {str(type_): type_ for type_ in types if type_.id != "null"}
    if len(found) < 2:
        return next(iter(found), TEXT)
    kinds = {type_.id for type_ in found.values()}
    if kinds <= {*_INTEGERS}:
        widest = max(_INTEGERS.index(kind) for kind in kinds)
        # An unsigned integer does not hold a negative number; the next wider signed one does.
        signed = any(not kind.startswith("u") for kind in kinds)
        return _INTEGERS[widest + (signed and widest % 2)].upper()
    if kinds <= {*_INTEGERS, "float", "double", "decimal"}:
        return "DOUBLE"
    inner = _wider([type_.children[0][1] for type_ in found.values()]) if kinds == {"list"} else None
    return inner and f"{inner}[]"


def in_type(column: str, type_: Any, wanted: str | None) -> str:
    """SQL for `column`, which is of the DuckDB type `type_`, in the type that `common_type` found; as it is for None."""
    if wanted is None or wanted == str(type_):
        return column
    if wanted != TEXT:
        return f"CAST({column} AS {wanted})"
    if type_.id == "blob":
        return f"to_base64({column})"
    if type_.id in ("list", "array", "struct", "map", "union"):
        return f"CAST(to_json({column}) AS {TEXT})"
    return f"CAST({column} AS {TEXT})"


def read_columns(file: Path, files: Sequence[Path], names: Sequence[str]) -> pa.Table:
    """The columns `names` of one of some Parquet files, in the types that all of the files share.

    A column has the type it has in the files, or where they differ what `common_type` says. It is null where the file
    lacks it. Raises UserError for a column that cannot be read.
    """
    parquet = open_parquet(file, file, names)
    columns = []
    for name, type_ in zip(names, _types(*_key(files, names)), strict=True):
        if name not in parquet.schema_arrow.names:
            columns.append(pa.nulls(parquet.metadata.num_rows, type_))
        elif parquet.schema_arrow.field(name).type == type_:
            columns.append(_read_column(parquet, file, name, type_))
        else:
            columns.append(_ask(file, name, type_))
    return pa.table(columns, names=list(names))


def _read_column(parquet: pq.ParquetFile, file: Path, name: str, type_: pa.DataType) -> pa.ChunkedArray:
    try:
        return parquet.read(columns=[name]).column(name)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        # Arrow 26 cannot read nulls among the fixed-size arrays that DuckDB writes.
        return _ask(file, name, type_)


def mixed_types(files: Sequence[Path], names: Sequence[str]) -> dict[str, str]:
    """The type that each column has in the end whose type is not the same in all of the files."""
    found, types = _found(*_key(files, names)), _types(*_key(files, names))
    return {
        name: str(type_) for name, by_type, type_ in zip(names, found, types, strict=True) if len(by_type) > 1
    }


Files = tuple[tuple[Path, int], ...]
"""Files, each with the time of its last change: what was found out of them holds until then."""


def _key(files: Sequence[Path], names: Sequence[str]) -> tuple[Files, tuple[str, ...]]:
    return tuple((file, file.stat().st_mtime_ns) for file in files), tuple(names)


@lru_cache(maxsize=4)
def _found(files: Files, names: tuple[str, ...]) -> list[dict[pa.DataType, Path]]:
    """Of each column the Arrow types it has, each with the first file where it has it."""
    found: dict[str, dict[pa.DataType, Path]] = {name: {} for name in names}
    for file, _ in files:
        schema = pq.read_schema(file)
        for name in {*names} & {*schema.names}:
            found[name].setdefault(schema.field(name).type, file)
    return list(found.values())


@lru_cache(maxsize=4)
def _types(files: Files, names: tuple[str, ...]) -> list[pa.DataType]:
    """The Arrow type of each column, over all files."""
    return [
        next(iter(by_type), pa.string()) if len(by_type) < 2 else _shared(name, [*by_type.values()])
        for name, by_type in zip(names, _found(files, names), strict=True)
    ]


def _shared(name: str, files: Sequence[Path]) -> pa.DataType:
    with connected() as connection:
        asked = (f"SELECT {quoted(name)} FROM {rows_of([str(file)])}" for file in files)  # noqa: S608
        wanted = common_type([connection.sql(sql).types[0] for sql in asked])
        # DuckDB knows which Arrow type its type is.
        return connection.sql(f"SELECT NULL::{wanted} AS x").to_arrow_table().schema.field("x").type


def _ask(file: Path, name: str, type_: pa.DataType) -> pa.ChunkedArray:
    """The column, read by DuckDB."""
    import duckdb

    with connected() as connection:
        try:
            source = f"FROM {rows_of([str(file)])}"
            found = connection.sql(f"SELECT {quoted(name)} {source}").types[0]
            wanted = TEXT if type_ == pa.string() else str(found)
            sql = f"SELECT {in_type(quoted(name), found, wanted)} AS x {source}"
            return connection.sql(sql).to_arrow_table().column("x").cast(type_)
        except (duckdb.Error, pa.ArrowException) as error:
            raise UserError(
                f"{file}: column {name!r} cannot be read ({str(error).splitlines()[0]}); leave it out"
            ) from None


def values(column: pa.ChunkedArray) -> list[Any]:
    """The values of a column as Python has them; their text where it has not all of them, as of an infinite date."""
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        with connected() as connection:
            connection.register("incoming", pa.table([column], names=["x"]))
            rows = connection.sql("SELECT CAST(x AS VARCHAR) FROM incoming").fetchall()
            return [row[0] for row in rows]


@contextmanager
def connected(**settings: str) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with SETTINGS, and with these in their place."""
    import duckdb

    with duckdb.connect() as connection:
        for name, value in (SETTINGS | settings).items():
            connection.execute(f"SET {name} = {literal(value)}")
        yield connection
