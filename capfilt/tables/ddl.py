"""The contracts as SQL text: one CREATE TABLE with comments per table, in DuckDB's dialect, for `schemas/*.sql`.

    python -m capfilt.tables.ddl --write schemas     write the files
    python -m capfilt.tables.ddl --check schemas     exit 1 and name the first file that differs

Only text is made here, from `contracts.py` alone. The views over these tables, `schemas/views.sql`, are written by
hand; what executes any of it is in `catalog/`.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa

from capfilt.errors import UserError
from capfilt.tables.contracts import CONTRACTS, FAILURES, SOURCES, SPLITS, STATUSES, TASKS, Contract
from capfilt.tables.publish import replace
from capfilt.tables.visible import say

BY_HAND = "views.sql"
"""The one file of `schemas/` that is not written from the contracts."""

_TYPES = {
    pa.string(): "VARCHAR",
    pa.binary(): "BLOB",
    pa.bool_(): "BOOLEAN",
    pa.int32(): "INTEGER",
    pa.int64(): "BIGINT",
    pa.float32(): "FLOAT",
    pa.float64(): "DOUBLE",
}

_CLOSED = {"status": STATUSES, "failure": FAILURES, "split": SPLITS, "source": SOURCES, "task": TASKS}
"""The closed list of every column of this name. `images.source` is shorter: pictures come with found texts only."""

_IDENTIFIER = re.compile(r"^[a-z_][a-z0-9_]*$")


def sql_type(type_: pa.DataType) -> str:
    """The DuckDB type of an Arrow type, as `duckdb_columns().data_type` spells it but for quotes around field names.

    Raises ValueError for a type that no contract uses yet.
    """
    if pa.types.is_list(type_):
        return f"{sql_type(type_.value_type)}[]"
    if pa.types.is_struct(type_):
        return f"STRUCT({', '.join(f'{_name(field.name)} {sql_type(field.type)}' for field in type_)})"
    if type_ not in _TYPES:
        raise ValueError(f"no SQL type is chosen for the Arrow type {type_}; add it to capfilt/tables/ddl.py")
    return _TYPES[type_]


def comment(contract: Contract) -> str:
    """What COMMENT ON TABLE says: what a row is, the contract's version, and whether columns may follow its own."""
    return f"{contract.doc} (contract version {contract.version}{', open to further columns' if contract.open else ''})"


def create_table(contract: Contract) -> str:
    """One CREATE TABLE with its COMMENT ON TABLE and COMMENT ON COLUMN statements, ending in a newline.

    NOT NULL is as in the contract. The key is a PRIMARY KEY, or UNIQUE where one of its columns may be null, which a
    primary key would forbid. Closed lists are CHECKs.
    """
    name = _name(contract.name)
    width = max(len(field.name) for field in contract.schema)
    lines = [
        f"{_name(field.name):<{width}} {sql_type(field.type)}{'' if field.nullable else ' NOT NULL'}"
        for field in contract.schema
    ]
    nullable_key = any(contract.schema.field(column).nullable for column in contract.key)
    lines.append(f"{'UNIQUE' if nullable_key else 'PRIMARY KEY'} ({', '.join(map(_name, contract.key))})")
    lines += [
        _check(field.name, values)
        for field in contract.schema
        if (values := _closed_list(contract, field.name))
    ]
    body = ",\n".join(f"    {line}" for line in lines)
    statements = [
        f"CREATE TABLE {name} (\n{body}\n);",
        f"COMMENT ON TABLE {name} IS {_literal(comment(contract))};",
    ]
    statements += [
        f"COMMENT ON COLUMN {name}.{_name(field.name)} IS {_literal(field.metadata[b'doc'].decode())};"
        for field in contract.schema
    ]
    return f"{statements[0]}\n\n" + "\n".join(statements[1:]) + "\n"


def files() -> dict[str, str]:
    """Name and content of every generated file of `schemas/`."""
    head = "-- Written from capfilt/tables/contracts.py by `just schemas`; a change made here is lost.\n\n"
    return {f"{name}.sql": head + create_table(contract) for name, contract in CONTRACTS.items()}


def write(directory: Path) -> list[str]:
    """Write every file whose content changed. Returns their names."""
    directory.mkdir(parents=True, exist_ok=True)
    changed = [name for name, content in files().items() if _read(directory / name) != content]
    for name in changed:
        replace(directory / name, files()[name].encode())
    return changed


def check(directory: Path) -> list[str]:
    """What is wrong with the files in `directory`, a line each: one differs, is missing, or belongs to no contract."""
    wanted = files()
    problems = []
    for name, content in wanted.items():
        found = _read(directory / name)
        if found is None:
            problems.append(f"{directory / name}: is missing")
        elif found != content:
            problems.append(f"{directory / name}: differs from the contracts")
    known = {*wanted, BY_HAND}
    problems += [
        f"{path}: belongs to no contract"
        for path in sorted(directory.glob("*.sql"))
        if path.name not in known
    ]
    return problems


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _name(name: str) -> str:
    # Unquoted, the files read well; no contract's name needs quotes, and a test executes them all.
    if not _IDENTIFIER.match(name):
        raise ValueError(f"{name!r} is no plain SQL identifier")
    return name


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _closed_list(contract: Contract, column: str) -> tuple[str, ...]:
    if (contract.name, column) == ("images", "source"):
        return tuple(source for source in SOURCES if source != "synthetic")
    return _CLOSED.get(column, ())


def _check(column: str, values: Sequence[str]) -> str:
    line = f"CHECK ({_name(column)} IN ({', '.join(map(_literal, values))}))"
    return textwrap.fill(
        line, width=106, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see the module docstring. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m capfilt.tables.ddl", description="The contracts as SQL files."
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", metavar="DIR", type=Path, help="write the files into DIR")
    choice.add_argument("--check", metavar="DIR", type=Path, help="exit 1 when a file of DIR differs")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.write is not None:
            changed = write(chosen.write)
            say(f"{chosen.write}: {', '.join(changed) if changed else 'nothing'} changed")
            return 0
        if not chosen.check.is_dir():
            raise UserError(f"{chosen.check}: no such directory; --write it first")
    except (UserError, OSError) as error:
        say(f"capfilt.tables.ddl: {error}", err=True)
        return 2
    problems = check(chosen.check)
    for problem in problems:
        say(f"{problem}; run `just schemas`", err=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
