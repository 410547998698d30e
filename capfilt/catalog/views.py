"""A workspace as a DuckDB connection that can read its committed shards and do nothing else.

The analyst's views are SQL, in `schemas/views.sql`; this module makes what they stand on: `raw.<table>` over the
shards' files, `raw.parts` and `raw.funnel`, and the function that gives found texts their ids.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from capfilt.catalog.funnel import Account, accounts, funnel_table, parts_table
from capfilt.errors import RunError, UserError
from capfilt.resources import schema_dir
from capfilt.tables import ids
from capfilt.tables.contracts import CONTRACTS
from capfilt.tables.ddl import BY_HAND, sql_type
from capfilt.tables.workspace import Workspace

_SETTINGS = {
    # A query never fetches code.
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    # A name that is no view must be an error, not a variable of the calling Python.
    "python_enable_replacements": "false",
    # Prefetching reads about 1 MB per row group beside a list column, half of the pixels; measured on 500 MB of
    # pictures, `SELECT count(*) FROM texts` read 251 MB with it and 0.8 MB without (DuckDB 2.0.0).
    "disable_parquet_prefetching": "true",
    "TimeZone": "UTC",
}


@dataclass(frozen=True)
class Column:
    """A column of a view, its DuckDB type, and what it means ("" where nobody says)."""

    name: str
    type: str
    comment: str


@dataclass(frozen=True)
class View:
    """A view with its meaning and columns."""

    name: str
    comment: str
    columns: tuple[Column, ...]


@contextmanager
def open_catalog(
    workspace: Workspace, found: Sequence[Account] | None = None
) -> Iterator[duckdb.DuckDBPyConnection]:
    """A connection with the views `images captions texts scores signals verdicts pairs examples funnel parts`.

    It reads the files of the shards that were committed when it was opened, and no other file; it cannot be told
    otherwise (`lock_configuration`). Pixels are read only by a query that names `raw.images.image` or
    `raw.pairs.image`. A table without a part is an empty view with the contract's columns.

    Args:
        workspace: the workspace.
        found: its accounts, where they are at hand already.

    Raises:
        UserError: when the directory is missing or a part's files do not agree with its manifests.
    """
    if not workspace.path.is_dir():
        raise UserError(f"{workspace.path}: no such directory; name the workspace with --workspace")
    found = accounts(workspace) if found is None else found
    for account in found:
        if account.part.gap:
            warnings.warn(f"{account.part.path}: {account.part.gap}", RuntimeWarning, stacklevel=3)
    # DuckDB would spill large sorts into the working directory.
    with tempfile.TemporaryDirectory(prefix="capfilt-query-") as spill, duckdb.connect() as connection:
        for name, value in (_SETTINGS | {"temp_directory": spill}).items():
            connection.execute(f"SET {name} = {_literal(value)}")
        _make_raw(connection, found)
        # The enumeration of kinds lives elsewhere in each release of DuckDB; its names work in all of them.
        kind: Any = "arrow"
        parameters: Any = ["VARCHAR", "VARCHAR", "VARCHAR", "INTEGER"]
        connection.create_function("found_text_id", _found_text_ids, parameters, "VARCHAR", type=kind)
        connection.execute(_script())
        for account in found:
            further = account.part.contract.further if account.manifests else {}
            for name, meaning in further.items():
                connection.execute(f'COMMENT ON COLUMN {account.table}."{name}" IS {_literal(meaning)}')
        _lock(connection, found)
        yield connection


def describe(connection: duckdb.DuckDBPyConnection) -> list[View]:
    """The analyst's views, in the order of `schemas/views.sql`.

    A column that has no comment there has its contract's.
    """
    comments: dict[str, str] = dict(
        connection.execute(
            "SELECT view_name, coalesce(comment, '') FROM duckdb_views() WHERE NOT internal AND schema_name = 'main'"
        ).fetchall()
    )
    docs = {
        (name, field.name): (field.metadata or {}).get(b"doc", b"").decode()
        for name, contract in CONTRACTS.items()
        for field in contract.schema
    }
    shared = {column: doc for (_, column), doc in docs.items()}
    columns: dict[str, list[Column]] = {}
    for view, name, type_, comment in connection.execute(
        "SELECT table_name, column_name, data_type, coalesce(comment, '') FROM duckdb_columns() "
        "WHERE NOT internal AND schema_name = 'main' ORDER BY column_index"
    ).fetchall():
        doc = docs.get((view, name), "") if view in CONTRACTS else shared.get(name, "")
        columns.setdefault(view, []).append(Column(name, type_, comment or doc))
    names = re.findall(r"^CREATE VIEW (\w+)", _script(), re.MULTILINE)
    return [View(name, comments[name], tuple(columns[name])) for name in names]


def _script() -> str:
    path = schema_dir() / BY_HAND
    if not path.is_file():
        raise RunError(f"{path}: is missing from this installation of capfilt; install capfilt again")
    return path.read_text(encoding="utf-8")


def _found_text_ids(images: pa.Array, sources: pa.Array, texts: pa.Array, places: pa.Array) -> pa.Array:
    # SQL has no BLAKE2b. As a function of the view the ids cost nothing until a query asks for them; asked for, about
    # 2 microseconds each.
    rows = zip(images.to_pylist(), sources.to_pylist(), texts.to_pylist(), places.to_pylist(), strict=True)
    return pa.array(
        [ids.text_id(image, source, text, "", place) for image, source, text, place in rows], pa.string()
    )


def _make_raw(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> None:
    connection.execute("CREATE SCHEMA raw")
    for name, contract in CONTRACTS.items():
        # No rows, but every contract column with its type, whatever the parts hold or lack.
        nulls = (f'NULL::{sql_type(field.type)} AS "{field.name}"' for field in contract.schema)
        selects = [f"SELECT NULL::VARCHAR AS part, {', '.join(nulls)} WHERE false"]
        selects += [_select(account) for account in found if account.table == name and account.manifests]
        connection.execute(f"CREATE VIEW raw.{name} AS {' UNION ALL BY NAME '.join(selects)}")
    for name, table in (("parts", parts_table(found)), ("funnel", funnel_table(found))):
        connection.register("incoming", table)
        connection.execute(f"CREATE TABLE raw.{name} AS SELECT * FROM incoming")  # noqa: S608 - our own two names
        connection.unregister("incoming")


def _select(account: Account) -> str:
    contract = account.part.contract
    files = [_literal(_pattern(path)) for path in _files(account)]
    # Shards of one closed contract version have the same columns; comparing all footers would cost a second per 4,000.
    same = not contract.open and {manifest.contract_version for manifest in account.manifests} == {
        contract.version
    }
    return (
        # A carried column called `part` gives way to the part's name.
        f"SELECT {_literal(account.part.name)} AS part, COLUMNS(lambda name: lower(name) <> 'part') "  # noqa: S608
        f"FROM read_parquet([{', '.join(files)}], union_by_name = {not same}, hive_partitioning = false)"
    )


def _files(account: Account) -> list[str]:
    # Only files that a manifest vouches for: a crashed run may have left others.
    return [str(account.part.file(manifest).absolute()) for manifest in account.manifests]


def _lock(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> None:
    files = [path for account in found for path in _files(account)]
    # DuckDB asks for permission under the pattern as well as under the file's name.
    allowed = sorted({name for path in files for name in (path, _pattern(path))})
    connection.execute(f"SET allowed_paths = [{', '.join(map(_literal, allowed))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def _pattern(path: str) -> str:
    # read_parquet takes patterns, and a directory may be called `a[1]`.
    return re.sub(r"([*?\[])", r"[\1]", path)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
