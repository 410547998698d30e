"""A workspace as a DuckDB connection that can read its committed shards and do nothing else.

The analyst's views are SQL, in `schemas/views.sql`; this module makes what they stand on: `raw.<table>` over the
shards' files, `raw.parts` and `raw.funnel`, and the function that gives found texts their ids.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.catalog.funnel import Account, accounts, funnel_table, parts_table
from capfilt.errors import RunError, UserError
from capfilt.formats.columns import SETTINGS, TEXT, common_type, in_type, literal, pattern, quoted, rows_of
from capfilt.resources import schema_dir
from capfilt.tables import ids
from capfilt.tables.contracts import CONTRACTS, Contract
from capfilt.tables.ddl import BY_HAND, sql_type
from capfilt.tables.workspace import Workspace

_SETTINGS = {
    **SETTINGS,
    # Prefetching reads about 1 MB per row group beside a list column, half of the pixels; measured on 500 MB of
    # pictures, `SELECT count(*) FROM texts` read 251 MB with it and 0.8 MB without (DuckDB 2.0.0).
    "disable_parquet_prefetching": "true",
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
            connection.execute(f"SET {name} = {literal(value)}")
        comments = _make_raw(connection, found)
        # The enumeration of kinds lives elsewhere in each release of DuckDB; its names work in all of them.
        kind: Any = "arrow"
        parameters: Any = ["VARCHAR", "VARCHAR", "VARCHAR", "INTEGER"]
        connection.create_function("found_text_id", _found_text_ids, parameters, "VARCHAR", type=kind)
        connection.execute(_script())
        for account in found:
            further = account.part.contract.further if account.manifests else {}
            for name, meaning in further.items():
                comments[account.table, name] = meaning
        for (table, name), comment in comments.items():
            connection.execute(f"COMMENT ON COLUMN {table}.{quoted(name)} IS {literal(comment)}")
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


@dataclass(frozen=True)
class _Files:
    """Files of one part that have the same columns, each with its DuckDB type."""

    part: str
    files: tuple[str, ...]
    types: Mapping[str, Any]


def _make_raw(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> dict[tuple[str, str], str]:
    """Make the schema `raw`. Returns comments on the columns, by (table, column), whose type differs between files."""
    connection.execute("CREATE SCHEMA raw")
    comments: dict[tuple[str, str], str] = {}
    for name, contract in CONTRACTS.items():
        # No rows, but every contract column with its type, whatever the parts hold or lack.
        nulls = (f'NULL::{sql_type(field.type)} AS "{field.name}"' for field in contract.schema)
        selects = [f"SELECT NULL::VARCHAR AS part, {', '.join(nulls)} WHERE false"]
        groups = [
            group
            for account in found
            if account.table == name
            for group in _groups(connection, account, contract)
        ]
        further = _further_types(groups, contract)
        selects += [_select(group, further) for group in groups]
        connection.execute(f"CREATE VIEW raw.{name} AS {' UNION ALL BY NAME '.join(selects)}")
        for column, type_ in further.items():
            comments[name, column] = _on_types(column, type_, groups)
    for name, table in (("parts", parts_table(found)), ("funnel", funnel_table(found))):
        connection.register("incoming", table)
        connection.execute(f"CREATE TABLE raw.{name} AS SELECT * FROM incoming")  # noqa: S608 - our own two names
        connection.unregister("incoming")
    return comments


def _groups(connection: duckdb.DuckDBPyConnection, account: Account, contract: Contract) -> Iterator[_Files]:
    """The part's files by their columns: DuckDB itself would read each footer, and take one type for all of them."""
    groups: dict[Any, list[str]] = {}
    for manifest, path in zip(account.manifests, _files(account), strict=True):
        # Shards of one version of a closed contract have the same columns.
        key = pq.read_schema(path).remove_metadata() if contract.open else manifest.contract_version
        groups.setdefault(key, []).append(path)
    for files in groups.values():
        relation = connection.sql(f"FROM {rows_of(files[:1])}")
        types = {
            name: type_
            for name, type_ in zip(relation.columns, relation.types, strict=True)
            if name.lower() != "part"  # a carried column called so gives way to the part's name
        }
        yield _Files(account.part.name, tuple(files), types)


def _further_types(groups: Sequence[_Files], contract: Contract) -> dict[str, str]:
    """The type of each further column whose type differs between files, by its lower-case name, as SQL sees it."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name, type_ in group.types.items():
            if name not in contract.schema.names:
                found.setdefault(name.lower(), {}).setdefault(str(type_), type_)
    return {name: common_type(list(types.values())) for name, types in found.items() if len(types) > 1}


def _on_types(column: str, type_: str, groups: Sequence[_Files]) -> str:
    parts: dict[str, list[str]] = {}
    for group in groups:
        for name, found in group.types.items():
            if name.lower() == column and group.part not in parts.setdefault(str(found), []):
                parts[str(found)].append(group.part)
    listed = "; ".join(f"{found} in {', '.join(names)}" for found, names in parts.items())
    how = ": bytes as base64, lists and structs as JSON" if type_ == TEXT else ""
    return f"carried along, of several types ({listed}), here as {type_}{how}"


def _select(group: _Files, further: Mapping[str, str]) -> str:
    columns = [
        f"{in_type(quoted(name), type_, further.get(name.lower()))} AS {quoted(name)}"
        for name, type_ in group.types.items()
    ]
    return f"SELECT {literal(group.part)} AS part, {', '.join(columns)} FROM {rows_of(group.files)}"  # noqa: S608


def _files(account: Account) -> list[str]:
    # Only files that a manifest vouches for: a crashed run may have left others.
    return [str(account.part.file(manifest).absolute()) for manifest in account.manifests]


def _lock(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> None:
    files = [path for account in found for path in _files(account)]
    # DuckDB asks for permission under the pattern as well as under the file's name.
    allowed = sorted({name for path in files for name in (path, pattern(path))})
    connection.execute(f"SET allowed_paths = [{', '.join(map(literal, allowed))}]")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")
