"""Would catch: SQL that writes, errors of many lines, output a terminal obeys, JSON and CSV that do not read back."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from pathlib import Path

import pytest

from capfilt.catalog.query import print_query, query
from capfilt.tables.contracts import SCORES
from capfilt.tables.manifest import Counts
from capfilt.tables.workspace import Workspace
from tests.refusals import refused

ODD = """
SELECT 'tab\t"quote", comma' AS text, chr(27) || '[31m' || chr(8238) || chr(13) || chr(10) AS control, '' AS empty,
  NULL AS nothing, 0.3::FLOAT AS small, 1 / 3 AS third, 'nan'::DOUBLE AS nan, sum(n) AS total, 1.50 AS fixed,
  [0.1::FLOAT, NULL] AS list, {'a': 'x'::BLOB, 'b': {'c': 0.2::FLOAT}} AS nested, map {'k': 1} AS map,
  DATE '2020-01-02' AS day, TIMESTAMPTZ '2020-01-02 03:04:05+00' AS moment, true AS yes, '日本' AS wide,
  9007199254740993 AS big, 'twice' AS text
FROM range(4) t(n)
"""


def printed(workspace: Workspace, sql: str, format: str = "table", **options: int) -> str:
    out = io.StringIO(newline="")
    print_query(workspace, sql, format, out, **options)
    return out.getvalue()


def test_quantile_without_pixels_or_models(workspace: Workspace) -> None:
    table = query(workspace, "SELECT quantile_cont(itm_score, 0.3) AS q, count(*) AS n FROM scores")
    scores = sorted(
        row["itm_score"]
        for shard in workspace.part("scores", "filter").tables(["itm_score"])
        for row in shard.to_pylist()
    )
    place = 0.3 * (len(scores) - 1)
    low = math.floor(place)
    expected = scores[low] + (place - low) * (scores[low + 1] - scores[low])
    assert table["n"].to_pylist() == [len(scores)]
    assert table["q"].to_pylist()[0] == pytest.approx(expected, rel=1e-6)


def test_readme_query_joins_texts_with_scores(workspace: Workspace) -> None:
    rows = query(
        workspace, "SELECT source, count(*) AS n FROM texts JOIN scores USING (text_id) GROUP BY 1 ORDER BY 1"
    ).to_pylist()
    assert rows == [{"source": "synthetic", "n": 70}, {"source": "web", "n": 78}]


@pytest.mark.parametrize(
    "sql",
    [
        "WITH a AS (SELECT 1 AS x) SELECT * FROM a", "FROM captions LIMIT 1", "VALUES (1)", "DESCRIBE images",
        "SUMMARIZE scores", "SHOW TABLES", "TABLE funnel", "EXPLAIN SELECT * FROM scores",
        "-- a comment\n/* é */ EXPLAIN /* é */ ANALYZE SELECT count(*) FROM scores;", "(SELECT 1)",
        "PIVOT funnel ON outcome USING sum(rows) GROUP BY part",
        "SELECT * FROM (PIVOT funnel ON outcome USING sum(rows))",
        "SELECT getvariable('x')",
    ],
)  # fmt: skip
def test_reading_statements_are_let_through(workspace: Workspace, sql: str) -> None:
    assert query(workspace, sql).num_rows > 0


@pytest.mark.parametrize(
    "sql",
    [
        "COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
        "/* */ EXPLAIN /* */ ANALYZE COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE EXPLAIN ANALYZE COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
        "COPY (PIVOT funnel ON outcome USING sum(rows)) TO '{shard}' (USE_TMP_FILE false)",
        "EXPLAIN ANALYZE COPY (PIVOT funnel ON outcome USING sum(rows)) TO '{shard}' (USE_TMP_FILE false)",
        "EXPLAIN (FORMAT json) COPY (SELECT 1) TO '{shard}'",
        "SELECT 1; COPY (SELECT 1) TO '{shard}' (USE_TMP_FILE false)",
        "CREATE TABLE t AS SELECT 1", "DROP VIEW images", "INSERT INTO raw.parts SELECT * FROM raw.parts",
        "DELETE FROM raw.funnel", "ATTACH 'x.db'", "SET threads = 1", "PRAGMA database_list", "CALL pragma_version()",
        "INSTALL httpfs", "LOAD httpfs", "EXPORT DATABASE 'x'", "BEGIN", "CHECKPOINT", "PREPARE p AS SELECT 1",
        "USE raw", "-- nothing", ";",
    ],
)  # fmt: skip
def test_a_workspace_is_read_only(workspace: Workspace, tmp_path: Path, monkeypatch, sql: str) -> None:
    monkeypatch.chdir(tmp_path)
    shard = workspace.part("scores", "filter").path / "00000.parquet"
    before = shard.read_bytes()
    with refused():
        printed(workspace, sql.replace("{shard}", str(shard)))
    assert shard.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM scores", "column nope"),
        ("SELECT * FROM missing", "views captions texts scores"),
        ("SELECT CAST(text AS INT) FROM captions", "convert"),
        ("SELECT error('a' || chr(10) || chr(27) || 'b')", r"a \u001bb"),
        ("SELECT 'a", "unterminated"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT * FROM read_csv('/etc/hostname')", "disabled"),
    ],
)
@pytest.mark.parametrize("format", ["table", "json", "csv"])
def test_errors_are_one_line_and_nothing_is_written(
    workspace: Workspace, sql: str, said: str, format: str
) -> None:
    out = io.StringIO()
    with refused(said) as error:
        print_query(workspace, sql, format, out)
    assert "LINE 1" not in str(error.value)
    assert out.getvalue() == ""


def test_options_are_checked(workspace: Workspace) -> None:
    with refused("--format xml"):
        printed(workspace, "SELECT 1", "xml")
    with refused("--rows -1"):
        printed(workspace, "SELECT 1", rows=-1)
    with refused("/nonexistent --workspace"):
        printed(Workspace("/nonexistent"), "SELECT 1")


def test_json_reads_back_with_every_type(workspace: Workspace) -> None:
    text = printed(workspace, ODD, "json")
    assert "\x1b" not in text
    assert "\u202e" not in text
    (row,) = json.loads(text)
    assert row == {
        "text": 'tab\t"quote", comma', "control": "\x1b[31m\u202e\r\n", "empty": "", "nothing": None, "small": 0.3,
        "third": 1 / 3, "nan": None, "total": 6, "fixed": 1.5, "list": [0.1, None],
        "nested": {"a": "eA==", "b": {"c": 0.2}}, "map": {"k": 1}, "day": "2020-01-02",
        "moment": "2020-01-02T03:04:05+00:00", "yes": True, "wide": "日本", "big": 9007199254740993, "text_2": "twice",
    }  # fmt: skip
    assert json.loads(printed(workspace, "SELECT 1 AS a WHERE false", "json")) == []
    assert len(json.loads(printed(workspace, "FROM range(25000)", "json"))) == 25000


def test_csv_is_rfc_4180(workspace: Workspace) -> None:
    text = printed(workspace, ODD, "csv")
    names, values = csv.reader(io.StringIO(text, newline=""), strict=True)
    row = dict(zip(names, values, strict=True))
    assert row["text"] == 'tab\t"quote", comma'
    assert row["control"] == "\x1b[31m\u202e\r\n"
    assert (row["small"], row["total"], row["yes"], row["day"]) == ("0.3", "6", "true", "2020-01-02")
    assert json.loads(row["nested"]) == {"a": "eA==", "b": {"c": 0.2}}
    # A null and an empty text differ, though most readers do not look.
    assert printed(workspace, "SELECT NULL AS a, '' AS b, 'x' AS c", "csv") == 'a,b,c\r\n,"",x\r\n'
    assert printed(workspace, "SELECT 1 AS a WHERE false", "csv") == "a\r\n"


def test_table_is_for_reading(workspace: Workspace, hostile: tuple[str, ...]) -> None:
    lines = printed(workspace, "SELECT n, repeat('x', n::INT) AS x FROM range(3) t(n)").splitlines()
    assert lines == ["n  x", "─  ──", "0", "1  x", "2  xx", "", "3 rows"]
    assert "\x1b" not in printed(workspace, ODD)
    assert r"\u001b[31m\u202e\r\n" in printed(workspace, ODD)
    assert set(hostile) <= set(query(workspace, "SELECT text FROM texts")["text"].to_pylist())
    assert "\x00" not in printed(workspace, "SELECT text FROM texts", rows=0)


def test_table_says_what_it_does_not_show(workspace: Workspace) -> None:
    assert printed(workspace, "FROM range(40)").endswith("\n40 rows\n")
    assert "the first 40 rows; there are more" in printed(workspace, "FROM range(41)")
    assert "the first 1 row; there are more" in printed(workspace, "FROM range(41)", rows=1)
    assert printed(workspace, "FROM range(41)", rows=0).endswith("\n41 rows\n")
    assert printed(workspace, "SELECT 1 AS a WHERE false").endswith("\n0 rows\n")


def test_table_fits_the_terminal_also_with_wide_characters(workspace: Workspace) -> None:
    sql = "SELECT repeat('日', 50) AS a, repeat('b', 100) AS b, 12345 AS c"
    for width in (40, 80, 120):
        lines = printed(workspace, sql, width=width).splitlines()
        assert all(sum(2 if ord(c) > 0x2E80 else 1 for c in line) <= width for line in lines)
        assert lines[2].endswith("12345")
        assert lines[2].count("…") == 2


def test_blobs_are_counted_not_shown(workspace: Workspace) -> None:
    text = printed(workspace, "SELECT image FROM raw.images WHERE status = 'success' LIMIT 1")
    assert "bytes>" in text
    assert "PNG" not in text


def test_help_lists_views_columns_and_comments(workspace: Workspace) -> None:
    text = printed(workspace, "  ")
    assert "scores (148 rows): a text under one scorer\n" in text
    assert "softmax(itm_logits)[1]" in text
    columns = json.loads(printed(workspace, "", "json"))
    assert {"view": "verdicts", "column": "rule", "type": "VARCHAR"}.items() <= next(
        row for row in columns if row["view"] == "verdicts"
    ).items()
    assert printed(workspace, "", "csv").startswith("view,column,type,comment\r\nimages,part,VARCHAR,")


def test_results_stream(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    part = workspace.part("scores", "f")
    mark = part.begin(SCORES, "score", {"version": 1})
    rows = [{"text_id": f"{n}", "image_id": "i", "itm_score": 0.5} for n in range(2000)]
    part.commit(0, SCORES.table(rows), Counts(2000, 2000), mark, 0.1)
    start = time.process_time()
    # 4,000,000 rows in all: a table of 5 must not wait for, nor hold, the rest.
    text = printed(workspace, "SELECT a.text_id FROM scores a, scores b", rows=5)
    assert "the first 5 rows" in text
    assert time.process_time() - start < 5


@pytest.mark.parametrize("format", ["table", "json", "csv"])
def test_every_type_of_duckdb_is_printed(tmp_path: Path, format: str) -> None:
    """Would catch: `OverflowError: date value out of range` for an infinite date, or a number that lost its digits."""
    text = printed(Workspace(tmp_path), "FROM test_all_types()", format, rows=0)
    for said in ("infinity", "5881580-07-10", "2262-04-11T23:47:16.854775806", "24:00:00-15:59:59", "10101"):
        assert said in text
    assert "340282366920938463463374607431768211455" in text
    if format == "json":
        rows = json.loads(text)
        assert rows[1]["struct"] == {"a": 42, "b": "🦆" * 6}
        assert rows[1]["timestamptz_array"][4] == "2022-05-12T23:23:45+00:00"
        assert (rows[1]["map"]["key2"], rows[1]["union"], rows[1]["fixed_int_array"]) == (
            "goose",
            "5",
            [4, 5, 6],
        )


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("999999999999.999999::DECIMAL(18, 6)", "999999999999.999999"),
        ("-0.05::DECIMAL(3, 2)", "-0.05"),
        ("[12345678901234567890.12::DECIMAL(30, 2)]", "[12345678901234567890.12]"),
        ("{'a': {'b': (-170141183460469231731687303715884105727)::HUGEINT}}",
         '{"a":{"b":-170141183460469231731687303715884105727}}'),
        ("map {1: 0.00000000000000000001::DECIMAL(38, 20)}", '{"1":0.00000000000000000001}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("format", ["table", "json", "csv"])
def test_numbers_keep_their_digits(tmp_path: Path, value: str, said: str, format: str) -> None:
    """Would catch: a DECIMAL of 18 digits printed as 1000000000000.0, by way of a 64-bit float."""
    assert said in printed(Workspace(tmp_path), f"SELECT {value} AS x", format).replace('""', '"')


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("NULL::STRUCT(a INT, b INT[])", None),
        ("{'a': NULL, 'b': 'inf'::DOUBLE}", {"a": None, "b": None}),
        ("""{'quo"te''s': 'x'}""", {"quo\"te's": "x"}),
        ("[map {'k': [0.1::FLOAT, 'nan'::FLOAT]}, NULL]", [{"k": [0.1, None]}, None]),
        ("[[{'each0': '\x01'::BLOB}]]", [[{"each0": "AQ=="}]]),
        ("map {DATE '2020-01-02': TIMESTAMP '2020-01-02 03:04:05.5'}", {"2020-01-02": "2020-01-02T03:04:05.5"}),
        ("""'{"a": 1}'::JSON""", '{"a": 1}'),
    ],
)  # fmt: skip
def test_nested_values_read_back(tmp_path: Path, value: str, read: object) -> None:
    """Would catch: a struct of nulls in place of a null, a name that ends SQL early, JSON that is no JSON."""
    (row,) = json.loads(printed(Workspace(tmp_path), f"SELECT {value} AS x", "json"))
    assert row["x"] == read
    _, (_, cell) = csv.reader(
        io.StringIO(printed(Workspace(tmp_path), f"SELECT 1, {value}", "csv"), newline="")
    )
    assert (cell if isinstance(read, str) else json.loads(cell or "null")) == read
