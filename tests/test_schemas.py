"""Would catch: a published schema that is not the contract's, SQL that does not run, comments that are lost."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest

from capfilt.catalog.views import sql_type
from capfilt.resources import schema_dir
from capfilt.tables.contracts import CONTRACTS, FAILURES, Contract
from tests import schemas

TABLES = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)


@pytest.fixture
def connection():
    with duckdb.connect() as connection:
        yield connection


@TABLES
def test_published_file_is_what_the_contract_writes(contract: Contract) -> None:
    assert (schema_dir() / f"{contract.name}.sql").read_text() == schemas.files()[f"{contract.name}.sql"]


@TABLES
def test_columns_have_the_contracts_names_types_and_nullability(connection, contract: Contract) -> None:
    connection.execute((schema_dir() / f"{contract.name}.sql").read_text())
    # Compared through Arrow, which did not write the SQL: DuckDB's own reading of an empty column of each type.
    found = connection.sql(f"SELECT * FROM {contract.name}").to_arrow_table().schema
    assert found.names == contract.schema.names
    for mine, theirs in zip(contract.schema, found, strict=True):
        assert plain(mine.type) == plain(theirs.type), mine.name
    nullable = connection.execute(
        "SELECT column_name, is_nullable FROM duckdb_columns() WHERE table_name = ? ORDER BY column_index",
        [contract.name],
    ).fetchall()
    assert nullable == [(field.name, field.nullable) for field in contract.schema]


def plain(type_: pa.DataType) -> object:
    """Arrow types without the names of list items, which libraries choose differently."""
    if pa.types.is_list(type_):
        return ["list", plain(type_.value_type)]
    if pa.types.is_struct(type_):
        return [(field.name, plain(field.type)) for field in type_]
    return type_


@TABLES
def test_comments_survive_in_the_database(connection, contract: Contract) -> None:
    connection.execute(schemas.create_table(contract))
    columns = dict(
        connection.execute(
            "SELECT column_name, comment FROM duckdb_columns() WHERE table_name = ?", [contract.name]
        ).fetchall()
    )
    assert columns == {field.name: field.metadata[b"doc"].decode() for field in contract.schema}
    said = connection.execute(
        "SELECT comment FROM duckdb_tables() WHERE table_name = ?", [contract.name]
    ).fetchone()[0]
    assert said.startswith(contract.doc)
    assert f"contract version {contract.version}" in said
    assert ("further columns" in said) == contract.open


@TABLES
def test_key_and_closed_lists_are_enforced(connection, contract: Contract) -> None:
    connection.execute(schemas.create_table(contract))
    row = {
        field.name: filler(field)
        for field in contract.schema
        if not field.nullable or field.name in contract.key
    }

    def insert(**changes: object) -> None:
        values = row | changes
        names, marks = ", ".join(values), ", ".join("?" * len(values))
        connection.execute(f"INSERT INTO {contract.name} ({names}) VALUES ({marks})", list(values.values()))

    insert()
    with pytest.raises(duckdb.ConstraintException):
        insert()
    if "failure" in contract.schema.names:
        other = {name: f"other {name}" for name in contract.key}
        insert(**other, failure=FAILURES[-1])
        with pytest.raises(duckdb.ConstraintException, match="CHECK"):
            insert(**{name: f"third {name}" for name in contract.key}, failure="bad luck")


def filler(field: pa.Field) -> object:
    known = {"status": "success", "source": "web", "split": "val", "task": "vqa"}
    if pa.types.is_list(field.type):
        return []
    if pa.types.is_boolean(field.type):
        return True
    return 0 if pa.types.is_integer(field.type) else known.get(field.name, field.name)


def test_pictures_come_with_found_texts_only(connection) -> None:
    sql = schemas.create_table(CONTRACTS["images"])
    assert "CHECK (source IN ('web', 'human'))" in sql
    assert "CHECK (source IN ('web', 'human', 'synthetic'))" in schemas.create_table(CONTRACTS["verdicts"])


def test_a_type_or_name_without_sql_is_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        sql_type(pa.uint8())
    broken = Contract(
        "t", 1, pa.schema([pa.field("a b", pa.string(), metadata={"doc": "x"})]), ("a b",), "doc"
    )
    with pytest.raises(ValueError, match="a b"):
        schemas.create_table(broken)


def test_quotes_in_comments_are_escaped(connection) -> None:
    field = pa.field("a", pa.string(), metadata={"doc": "it's; -- 'quoted'"})
    connection.execute(schemas.create_table(Contract("t", 3, pa.schema([field]), ("a",), "a row's doc")))
    assert connection.execute("SELECT comment FROM duckdb_columns() WHERE table_name = 't'").fetchone()[
        0
    ] == ("it's; -- 'quoted'")


def test_no_file_of_schemas_but_the_views_is_by_hand() -> None:
    assert sorted(path.name for path in schema_dir().glob("*.sql")) == sorted([*schemas.files(), "views.sql"])
