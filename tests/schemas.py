"""Writes `schemas/*.sql` from the contracts, a CREATE TABLE with comments per table, in DuckDB's dialect: `just schemas`.

The views over these tables, `schemas/views.sql`, are written by hand; `catalog/` executes them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from capfilt.catalog.views import sql_type
from capfilt.resources import schema_dir
from capfilt.tables.contracts import (
    CONTRACTS,
    FAILURES,
    IDENTIFIER,
    SOURCES,
    SPLITS,
    STATUSES,
    TASKS,
    Contract,
)

_CLOSED = {"status": STATUSES, "failure": FAILURES, "split": SPLITS, "source": SOURCES, "task": TASKS}
"""The closed list of every column of this name. `images.source` is shorter: pictures come with found texts only."""


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


def _name(name: str) -> str:
    # Unquoted, the files read well; no contract's name needs quotes, and a test executes them all.
    if not IDENTIFIER.fullmatch(name):
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


def main() -> None:
    """Write every file whose content changed."""
    for name, content in files().items():
        path = schema_dir() / name
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            path.write_text(content, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
