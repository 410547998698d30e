"""`--require`: a condition in SQL on one row, checked before any row is read, and asked in the sandbox (`sandbox.py`).

Which tables and columns a condition may name is the business of the stage that asks.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from capfilt.errors import UserError
from capfilt.formats.columns import connected, quoted, refusal
from capfilt.stages.sandbox import SANDBOX, NoAnswer
from capfilt.tables.visible import shortened

SECONDS = 30.0
"""A condition that takes longer over one shard counts as endless: 10,000 texts take milliseconds."""

LONGEST = 10_000
"""Characters of a condition, at most: nested expressions cost the parser its stack."""

_OF_ONE_ROW = frozenset(
    {
        "BETWEEN", "CASE", "CAST", "COLLATE", "COLUMN_REF", "COMPARISON", "CONJUNCTION", "CONSTANT", "FUNCTION", "LAMBDA",
        "LAMBDA_REF", "OPERATOR", "TYPE",
    }
)  # fmt: skip
"""The classes of DuckDB's expressions that need one row and nothing else."""

_ROW = "#"
"""The table, and its column, that number the rows of an answer."""


class Requirement:
    """One boolean expression of SQL that needs one row, and has the same answer for it every time.

    Raises UserError, in one line, for everything else: several expressions or statements, a subquery, an aggregate, a window,
    a function that reads files, a function whose answer changes.
    """

    def __init__(self, sql: str, seconds: float = SECONDS) -> None:
        self.sql = sql
        self.seconds = seconds
        self.columns: dict[str, pa.Schema] = {}
        if len(sql) > LONGEST:
            raise _refused(sql, f"longer than {LONGEST:,} characters; a signal can say as much in one column")
        with connected() as connection:
            nodes = _nodes_of(connection, sql)
            _check_functions(connection, nodes)
        names = [[name.lower() for name in node.get("column_names", ())] for node in nodes]
        self.names = frozenset(name for several in names for name in several)
        """Every name in it, in lower case, that may be a table's or a column's."""
        lambdas = [each for node in nodes if node.get("class") == "LAMBDA" for each in _nodes(node["lhs"])]
        parameters = {name.lower() for node in lambdas for name in node.get("column_names", ())}
        self.bare = {name for name, *more in filter(None, names) if not more} - parameters

    def bind(self, tables: Mapping[str, Iterable[pa.Schema]]) -> None:
        """Find the columns that the expression names: `columns` has them from now on, by table.

        Each table comes with the schemas of its shards; a column has the type that holds those of all shards. Raises UserError
        for a name that no table has or several have, for types that do not go together, and for an expression that is of
        another type than boolean.
        """
        found = {table: list(schemas) for table, schemas in tables.items()}
        listed = {
            table: dict.fromkeys(n for each in schemas for n in each.names)
            for table, schemas in found.items()
        }
        there = "; there are " + ", ".join(f"{table}({', '.join(names)})" for table, names in listed.items())
        known = {name.lower() for names in listed.values() for name in names}
        # DuckDB takes current_date and the like for a function's name where no column has it.
        for name in sorted(self.bare - known - {table.lower() for table in found}):
            raise _refused(self.sql, f"no column is called {name}{there}")
        for table, schemas in found.items():
            named = [
                pa.schema([each for each in schema if each.name.lower() in self.names]) for schema in schemas
            ]
            try:
                self.columns[table] = pa.unify_schemas(named, promote_options="permissive")
            except pa.ArrowException as error:
                raise _refused(self.sql, f"{table}: {error}") from error
        try:
            answer = self._asked(0, {name: schema.empty_table() for name, schema in self.columns.items()})
        except UserError as error:
            if "not found" not in str(error):
                raise
            raise UserError(str(error).split("!")[0] + there) from error
        if answer.type != pa.bool_():
            raise _refused(self.sql, f"is {answer.type}, where true or false is needed")

    def holds(self, tables: Mapping[str, pa.Table]) -> pa.ChunkedArray:
        """The answer for each row of the tables, which all have as many: true, false or null.

        Raises UserError for a row for which there is no answer (`CAST` of a text that is no number), and where the answer
        takes longer than `seconds`.
        """
        return self._asked(next(iter(tables.values())).num_rows, tables)

    def _asked(self, rows: int, tables: Mapping[str, pa.Table]) -> pa.ChunkedArray:
        given = {_ROW: pa.table({_ROW: np.arange(rows)})}
        row = f"{quoted(_ROW)}.{quoted(_ROW)}"
        try:
            for name, schema in self.columns.items():
                if schema.names:
                    columns = [_in_type(tables[name], field, rows) for field in schema]
                    given[name] = pa.table(columns, schema=schema)
            answer = SANDBOX.ask(f"{row}, (\n{self.sql}\n) AS answer", given, self.seconds)
        except (NoAnswer, pa.ArrowException) as error:
            raise _refused(self.sql, shortened(str(error), 300)) from error
        return answer.sort_by(_ROW)["answer"]


def _in_type(table: pa.Table, field: pa.Field, rows: int) -> Any:
    """The column of a shard in the type that it has over all of them; nulls where the shard lacks it."""
    return (
        table[field.name].cast(field.type) if field.name in table.column_names else pa.nulls(rows, field.type)
    )


def _refused(sql: str, why: str) -> UserError:
    return UserError(f"--require {shortened(' '.join(sql.split()), 60)!r}: {why}")


def _nodes_of(connection: duckdb.DuckDBPyConnection, sql: str) -> list[dict[str, Any]]:
    """The parts of one expression, as DuckDB parses it. Raises UserError where it is none, or needs more than one row."""
    tree, empty = _parsed(connection, sql), _parsed(connection, "true")
    found, _ = (each["statements"][0]["node"].pop("select_list", []) for each in (tree, empty))
    if tree != empty or len(found) != 1:
        raise _refused(sql, "give one expression, such as duplicates.first")
    nodes = list(_nodes(found))
    for node in nodes:
        kind = node.get("class", "CONSTANT")
        if kind not in _OF_ONE_ROW:
            raise _refused(sql, f"has a {kind.lower()}; it may look at one row and nothing else")
    return nodes


def _parsed(connection: duckdb.DuckDBPyConnection, sql: str) -> Any:
    (text,) = connection.execute("SELECT json_serialize_sql(?)", [f"SELECT (\n{sql}\n)"]).fetchone() or ("",)
    try:
        tree = json.loads(text)
    except RecursionError:
        raise _refused(sql, "too deeply nested; write it flat") from None
    if tree["error"]:
        raise _refused(sql, refusal(tree["error_message"]))
    return tree


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    """Every object in a tree of JSON."""
    left = [tree]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            yield node
        left += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()


@lru_cache(maxsize=1)
def _functions() -> dict[str, list[tuple[str, str, str, int]]]:
    """By lower-case name, the kind, stability, definition (of a macro) and number of parameters of each function."""
    found: dict[str, list[tuple[str, str, str, int]]] = {}
    with connected() as connection:
        rows = connection.execute(
            "SELECT lower(function_name), function_type, stability, macro_definition, len(parameters) FROM duckdb_functions()"
        ).fetchall()
    for name, *row in rows:
        found.setdefault(name, []).append(tuple(row))
    return found


def _check_functions(connection: duckdb.DuckDBPyConnection, nodes: Iterable[dict[str, Any]]) -> None:
    """Raise UserError for a function that needs more than one row, or has another answer the next time; also within a macro."""
    left, seen = list(nodes), set[tuple[str, int]]()
    while left:
        node = left.pop()
        call = (
            str(node.get("function_name", "")).lower(),
            len(node.get("arguments", node.get("children", ()))),
        )
        if not call[0] or call in seen:
            continue
        seen.add(call)
        name, count = call
        found = _functions().get(name, [])
        kinds = {kind for kind, *_ in found}
        if found and (kinds & {"aggregate", "window"} or not kinds & {"scalar", "macro"}):
            raise _refused(f"{name}()", "is no function of one row")
        # Of `+`, some are of times in the zone of the session, which is always UTC.
        fits = [stability for kind, stability, _, takes in found if kind == "scalar" and takes == count]
        if fits and "CONSISTENT" not in fits:
            raise _refused(f"{name}()", "may have another answer every time")
        left += [each for _, _, macro, _ in found if macro for each in _nodes_of(connection, macro)]
