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
from itertools import groupby
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from capfilt.catalog.funnel import Account, accounts, funnel_table, parts_table
from capfilt.errors import RunError, UserError
from capfilt.formats.columns import TEXT, common_type, connected, in_type, literal, lock, quoted, rows_of
from capfilt.resources import schema_dir
from capfilt.tables import ids
from capfilt.tables.contracts import CONTRACTS, IDENTIFIER, Contract
from capfilt.tables.workspace import Workspace

_SETTINGS = {
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

    Each signals part also has a view of its own, `signals.<part>`, with the columns of that signal alone.

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
    with (
        tempfile.TemporaryDirectory(prefix="capfilt-query-") as spill,
        connected(**_SETTINGS, temp_directory=spill) as connection,
    ):
        comments = _make_raw(connection, found)
        # The enumeration of kinds lives elsewhere in each release of DuckDB; its names work in all of them.
        kind: Any = "arrow"
        parameters: Any = ["VARCHAR", "VARCHAR", "VARCHAR", "INTEGER"]
        connection.create_function("found_text_id", _found_text_ids, parameters, "VARCHAR", type=kind)
        connection.execute(_script())
        for (view, name), comment in comments.items():
            connection.execute(f"COMMENT ON COLUMN {view}.{quoted(name)} IS {literal(comment)}")
        lock(connection, [path for account in found for path in _files(account)])
        yield connection


def describe(connection: duckdb.DuckDBPyConnection) -> list[View]:
    """The analyst's views, in the order of `schemas/views.sql`.

    A column that has no comment there has its contract's.
    """
    comments = {
        _shown(*place): comment
        for *place, comment in connection.execute(
            "SELECT schema_name, view_name, coalesce(comment, '') FROM duckdb_views() "
            "WHERE NOT internal AND schema_name IN ('main', 'signals') ORDER BY 2"
        ).fetchall()
    }
    docs = {
        (name, field.name): (field.metadata or {}).get(b"doc", b"").decode()
        for name, contract in CONTRACTS.items()
        for field in contract.schema
    }
    shared = {column: doc for (_, column), doc in docs.items()}
    columns: dict[str, list[Column]] = {}
    for *place, name, type_, comment in connection.execute(
        "SELECT schema_name, table_name, column_name, data_type, coalesce(comment, '') FROM duckdb_columns() "
        "WHERE NOT internal AND schema_name IN ('main', 'signals') ORDER BY column_index"
    ).fetchall():
        view = _shown(*place)
        table = view.partition(".")[0]
        doc = docs.get((table, name), "") if table in CONTRACTS else shared.get(name, "")
        columns.setdefault(view, []).append(Column(name, type_, comment or doc))
    names = re.findall(r"^CREATE VIEW (\w+)", _script(), re.MULTILINE)
    names += [name for name in comments if name not in names]
    return [View(name, comments[name], tuple(columns[name])) for name in names]


def _shown(schema: str, name: str) -> str:
    """The name of a view as SQL takes it."""
    return name if schema == "main" else f"{schema}.{name if IDENTIFIER.fullmatch(name) else quoted(name)}"


_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}


def sql_type(type_: pa.DataType) -> str:
    """The DuckDB type of an Arrow type, as `duckdb_columns().data_type` spells it but for quotes around field names.

    Raises ValueError for a type that no contract uses yet.
    """
    if pa.types.is_list(type_):
        return f"{sql_type(type_.value_type)}[]"
    if pa.types.is_struct(type_):
        return f"STRUCT({', '.join(f'{field.name} {sql_type(field.type)}' for field in type_)})"
    if type_ not in _TYPES:
        raise ValueError(f"no SQL type is chosen for the Arrow type {type_}; add it to _TYPES")
    return _TYPES[type_]


def _script() -> str:
    path = schema_dir() / "views.sql"
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
    """Files of one part that have the same columns, each with its DuckDB type and, where the file says it, its meaning."""

    part: str
    files: tuple[str, ...]
    types: Mapping[str, Any]
    docs: Mapping[str, str]


def _make_raw(connection: duckdb.DuckDBPyConnection, found: Sequence[Account]) -> dict[tuple[str, str], str]:
    """Make the schemas `raw` and `signals`. Returns comments on the further columns, by (view, column)."""
    connection.execute("CREATE SCHEMA raw; CREATE SCHEMA signals")
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
        comments |= _comments(name, groups, contract)
        for part, files in groupby(groups if name == "signals" else (), lambda group: group.part):
            own = list(files)
            view = f"signals.{quoted(part)}"
            selects = [_select(group, _further_types(own, contract)) for group in own]
            connection.execute(
                f"CREATE VIEW {view} AS SELECT * EXCLUDE (part) FROM ({' UNION ALL BY NAME '.join(selects)})"  # noqa: S608
            )
            connection.execute(f"COMMENT ON VIEW {view} IS {literal(f'the signals part {part} alone')}")
            comments |= _comments(view, own, contract)
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
        docs = {
            field.name: field.metadata[b"doc"].decode(errors="replace")
            for field in pq.read_schema(files[0])
            if field.metadata and b"doc" in field.metadata
        }
        yield _Files(account.part.name, tuple(files), types, docs)


def _further_types(groups: Sequence[_Files], contract: Contract) -> dict[str, str]:
    """The type of each further column whose type differs between files, by its lower-case name, as SQL sees it."""
    found: dict[str, dict[str, Any]] = {}
    for group in groups:
        for name, type_ in group.types.items():
            if name not in contract.schema.names:
                found.setdefault(name.lower(), {}).setdefault(str(type_), type_)
    return {name: common_type(list(types.values())) for name, types in found.items() if len(types) > 1}


def _comments(view: str, groups: Sequence[_Files], contract: Contract) -> dict[tuple[str, str], str]:
    """The meaning of the columns of these files that the contract does not have, by (view, column)."""
    found = {
        (view, name): meaning
        for group in groups
        for name, meaning in group.docs.items()
        if name in group.types and name not in contract.schema.names
    }
    mixed = _further_types(groups, contract)
    return found | {(view, name): _on_types(name, type_, groups) for name, type_ in mixed.items()}


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
