"""Catches a carried column that loses values where files of one source spell its type in several ways."""

from __future__ import annotations

import decimal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.errors import UserError
from capfilt.formats.columns import common_type, literal, mixed_types, pattern, quoted, read_columns, values


def types(*names):
    with duckdb.connect() as connection:
        return [connection.sql(f"SELECT NULL::{name} AS x").types[0] for name in names]


@pytest.mark.parametrize(
    ("several", "together"),
    [
        (["INTEGER", "BIGINT"], "BIGINT"),
        (["UTINYINT", "TINYINT"], "SMALLINT"),
        (["UINTEGER", "BIGINT"], "BIGINT"),
        (["UINTEGER", "SMALLINT"], "BIGINT"),
        (["UBIGINT", "TINYINT"], "HUGEINT"),
        (["UTINYINT", "USMALLINT"], "USMALLINT"),
        (["INTEGER", "FLOAT"], "DOUBLE"),
        (["DECIMAL(10, 2)", "BIGINT"], "DOUBLE"),
        (["BOOLEAN", "INTEGER"], "VARCHAR"),
        (["VARCHAR", "DATE"], "VARCHAR"),
        (["INTEGER[]", "BIGINT[]"], "BIGINT[]"),
        (["INTEGER[]", "VARCHAR[]"], "VARCHAR"),
        (["INTEGER[]", "INTEGER"], "VARCHAR"),
        (["INTEGER"], "INTEGER"),
        (["INTEGER", "INTEGER"], "INTEGER"),
    ],
)
def test_types_widen_to_one_that_holds_them_all_and_else_to_text(several, together):
    assert common_type(types(*several)) == together
    assert common_type(types(*reversed(several))) == together


def test_a_column_of_nulls_decides_nothing():
    with duckdb.connect() as connection:
        nothing = connection.sql("SELECT NULL AS x").types[0]
    assert common_type([nothing, *types("DATE")]) in ("DATE", "VARCHAR")
    assert common_type(types()) == "VARCHAR"


@pytest.fixture
def files(tmp_path):
    made = []
    for name, columns in {
        "a.parquet": {
            "n": pa.array([1, None], pa.int8()),
            "mixed": pa.array(["x", "y"]),
            "only": pa.array([1.5, 2.5]),
        },
        "b.parquet": {"n": pa.array([2**40], pa.int64()), "mixed": pa.array([[1, 2]], pa.list_(pa.int32()))},
        "c[1].parquet": {"n": pa.array([3], pa.int32()), "mixed": pa.array([b"\0\xff"], pa.binary())},
    }.items():
        pq.write_table(pa.table(columns), tmp_path / name)
        made.append(tmp_path / name)
    return made


def test_every_file_gives_the_types_that_all_share_and_keeps_its_values(files):
    read = [read_columns(file, files, ["n", "mixed", "only"]) for file in files]
    assert len({each.schema for each in read}) == 1
    whole = pa.concat_tables(read)
    assert whole.column("n").to_pylist() == [1, None, 2**40, 3]
    assert whole.column("mixed").to_pylist() == ["x", "y", "[1,2]", "AP8="]
    assert whole.column("only").to_pylist() == [1.5, 2.5, None, None]
    assert mixed_types(files, ["n", "mixed", "only"]) == {"n": "int64", "mixed": "string"}


def test_a_file_that_changes_is_looked_at_again(files, tmp_path):
    assert mixed_types(files[:1], ["n"]) == {}
    assert str(read_columns(files[0], files[:1], ["n"]).schema.field("n").type) == "int8"
    pq.write_table(pa.table({"n": ["seven"]}), files[0])
    assert read_columns(files[0], files[:1], ["n"]).column("n").to_pylist() == ["seven"]


def test_a_column_that_no_file_has_is_null(files):
    assert read_columns(files[0], files, ["nothing"]).column("nothing").to_pylist() == [None, None]


def test_a_value_that_python_cannot_hold_is_its_text():
    far = pa.chunked_array([pa.array([2**40, 0], pa.timestamp("s"))])
    assert [str(each)[:19] for each in values(far)][1] == "1970-01-01 00:00:00"
    assert str(values(far)[0]).startswith("36812-")
    money = [decimal.Decimal("1.50"), None]
    assert values(pa.chunked_array([pa.array(money)])) == money


@pytest.mark.parametrize("name", ['a"b', "a'b", "plain", '""', "x; DROP TABLE t"])
def test_names_and_texts_are_only_that_in_sql(name):
    with duckdb.connect() as connection:
        found = connection.sql(f"SELECT {literal(name)} AS {quoted(name)}")
        assert (found.columns, found.fetchall()) == ([name], [(name,)])


def test_a_path_is_no_pattern(files, tmp_path):
    (tmp_path / "c1.parquet").write_bytes(files[0].read_bytes())
    with duckdb.connect() as connection:
        found = connection.sql(f"SELECT n FROM read_parquet({literal(pattern(str(files[2])))})").fetchall()
    assert found == [(3,)]


def test_a_damaged_column_is_refused_by_file_and_name(files):
    data = bytearray(files[0].read_bytes())
    start = pq.ParquetFile(files[0]).metadata.row_group(0).column(1).data_page_offset
    data[start : start + 30] = b"\xff" * 30
    files[0].write_bytes(data)
    with pytest.raises(UserError, match=r"a\.parquet"):
        read_columns(files[0], files[:1], ["mixed"])
