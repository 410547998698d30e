"""Would catch: a condition that sees more than its row, that reads a file, that answers otherwise the next time or on another
shard, that never ends, or whose fault is a traceback.
"""

from __future__ import annotations

import pickle
import time

import pyarrow as pa
import pytest

from capfilt.errors import UserError
from capfilt.stages.require import LONGEST, Requirement
from tests.refusals import refused

TEXTS = pa.table(
    {
        "text_id": ["a", "b", "c", "d"], "image_id": ["i", "i", "j", "k"], "source": ["web", "web", "human", "synthetic"],
        "text": ["a red square", "blau", None, "two words"],
    }
)  # fmt: skip
SCORES = pa.table({"itm_score": pa.array([0.9, 0.2, None, 0.5], pa.float32())})
COPIES = pa.table({"first": [True, False, None, True], "cluster_size": [1, 2, None, 1]})
ODD = pa.table(
    {"first": ["x", "y", "z", "x"], "Two Words": [1, 2, 3, 4], "spot": [{"x": 1}, {"x": 2}, None, {"x": 4}]}
)
TABLES = {"texts": TEXTS, "scores": SCORES, "duplicates": COPIES, "odd-one": ODD}


def bound(sql, tables=TABLES, **more):
    found = Requirement(sql, **more)
    found.bind({name: [table.schema] for name, table in tables.items()})
    return found


@pytest.mark.parametrize(
    ("sql", "answers"),
    [
        ("duplicates.first", [True, False, None, True]),
        ("duplicates.first IS NOT false", [True, False, True, True]),
        ("DUPLICATES.First AND Itm_Score > 0.6", [True, False, None, False]),
        ("itm_score >= 0.5 OR source = 'human'", [True, False, True, True]),
        ("cluster_size = 1 -- a comment", [True, False, None, True]),
        ("text LIKE '%red%' OR text SIMILAR TO 'bl.*'", [True, True, None, False]),
        ("\"odd-one\".first = 'x' AND \"Two Words\" < 4", [True, False, False, False]),
        ("spot.x > 1", [False, True, None, True]),
        ("len(list_filter(string_split(text, ' '), lambda word: word <> 'a')) = 2", [True, False, None, True]),
        ("CASE WHEN text IS NULL THEN true ELSE length(text) BETWEEN 5 AND 10 END", [False, False, True, True]),
        ("try_cast(text AS INT) IS NULL AND coalesce(nullif(source, 'web'), 'none') = 'none'", [True, True, False, False]),
        ("true", [True] * 4),
        ("(texts.text_id, image_id) IN (('a', 'i'), ('c', 'j'))", [True, False, True, False]),
    ],
)  # fmt: skip
def test_a_condition_has_an_answer_for_every_row(sql, answers):
    assert bound(sql).holds(TABLES).to_pylist() == answers


MANY = [
    "true, false", "true; SELECT 1", "true) AS a, (true", "true) FROM range(3) AS t(x) WHERE (true",
    "true) UNION ALL SELECT (true",
    "true) LIMIT (1", "true) ORDER BY (1", "true; DROP TABLE given0", "SET threads = 2", "SELECT true", "", "--", "first AND",
]  # fmt: skip
MORE_ROWS = [
    "(SELECT true)", "EXISTS (FROM given0)", "text IN (SELECT text FROM texts)", "(FROM read_csv('/etc/passwd')) IS NULL",
    "count(*) > 1", "max(itm_score) > 0.5", "geomean(itm_score) > 0.5", "list(text) IS NULL", "row_number() OVER () < 3",
    "lag(text) OVER (ORDER BY text_id) = text", "text = ANY (SELECT 'a')", "COLUMNS(*) IS NULL", "#1 = 'a'", "$1", "? = 1",
    "itm_score > (VALUES (1))",
]  # fmt: skip
FILES = [
    "read_text('/etc/passwd') IS NULL", "read_blob('/etc/passwd') IS NULL", "glob('*') IS NULL", "read_csv('x.csv') IS NULL",
    "read_parquet('x') IS NULL", "parquet_metadata('x') IS NULL", "query('SELECT 1') IS NULL", "sniff_csv('x') IS NULL",
]  # fmt: skip
CHANGE = [
    "random() < 0.5", "now() > TIMESTAMP '2020-01-01'", "uuid()::VARCHAR = text_id", "current_date > DATE '2020-01-01'",
    "today() > DATE '2020-01-01'", "setseed(0.5) IS NULL", "current_setting('threads') = '1'", "nextval('x') = 1",
    "get_current_timestamp() IS NULL", "current_timestamp IS NULL", "gen_random_uuid() IS NULL", "txid_current() = 1",
]  # fmt: skip


@pytest.mark.parametrize("sql", [*MANY, *MORE_ROWS, *FILES, *CHANGE])
def test_what_is_no_condition_on_one_row_is_refused(sql):
    with refused("--require"):
        bound(sql)


@pytest.mark.parametrize(
    ("sql", "words"),
    [
        ("frist", ["frist", "duplicates(first, cluster_size)", "scores(itm_score)"]),
        ("duplicates.frist", ["frist", "duplicates(first, cluster_size)"]),
        ("language.first = 'x'", ["language", "texts(text_id, image_id, source, text)"]),
        ("first", ["mbiguous", "duplicates", "odd-one"]),
        ("nothing(text)", ["nothing"]),
        ("text", ["string"]),
        ("1", ["int"]),
        ("itm_score + true", ["+"]),
        ("text > duplicates.first", []),
        ("NULL", ["where true or false is needed"]),
        ("text = 'unclosed", []),
        ("(" * 200, []),
        ("true" + " AND true" * LONGEST, ["longer than"]),
        ("NOT " * 2000 + "true", []),
        ("[" * 3000 + "]" * 3000 + " IS NULL", []),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_one_line_that_says_what_there_is(sql, words):
    with refused("--require") as caught:
        bound(sql)
    said = str(caught.value)
    for word in words:
        assert word in said
    assert len(said) < 500


@pytest.mark.parametrize(
    "sql", ["CAST(text AS INT) = 1", "error(text)", "length(repeat(text, 1000000000)) > 1"]
)
def test_a_row_without_an_answer_is_named_in_one_line(sql):
    with refused("--require"):
        bound(sql).holds(TABLES)


ENDLESS = [
    # Over many rows, within one row, within the planning, which folds constants, and where DuckDB heeds no interrupt.
    "levenshtein(repeat(text, 20000), repeat('ab', 20000)) = 1",
    "list_sum(list_transform(range(100000), lambda x: x + length(text))) = 1",
    "length(text) = list_sum(list_transform(range(20000), lambda x: list_sum(list_transform(range(20000), lambda y: x * y))))",
    "list_sum(list_transform(range(20000), lambda x: list_sum(list_transform(range(20000), lambda y: x * y)))) = 1",
]


@pytest.mark.parametrize("sql", ENDLESS)
def test_a_condition_that_does_not_end_is_one_line_in_time(sql):
    tables = {"texts": pa.concat_tables([TEXTS] * 5000)}
    start = time.monotonic()
    with refused("--require", "0.3 s"):
        bound(sql, tables, seconds=0.3).holds(tables)
    assert time.monotonic() - start < 3


def test_answers_stay_with_their_rows_however_tables_are_cut():
    """Catches a join by place that loses step where tables come in pieces of unlike length."""
    count = 10_000
    numbers = pa.chunked_array([pa.array(range(low, low + 100)) for low in range(0, count, 100)])
    halves = pa.chunked_array([pa.array(range(3001)), pa.array(range(3001, count))])
    tables = {
        "texts": pa.table({"text_id": numbers.cast(pa.string())}),
        "a": pa.table({"x": numbers}),
        "b": pa.table({"y": halves}),
    }
    found = bound("x = y AND CAST(texts.text_id AS INT) = y AND x % 3 = 0", tables)
    assert found.holds(tables).to_pylist() == [each % 3 == 0 for each in range(count)]
    assert pickle.loads(pickle.dumps(found)).holds(tables).to_pylist() == [
        each % 3 == 0 for each in range(count)
    ]


def test_a_column_has_one_type_over_all_shards():
    """Catches an answer that depends on the shard: nulls, integers and fractions of one column, or none in a shard."""
    shards = [
        pa.table({"x": pa.nulls(2)}),
        pa.table({"x": [1, 2]}),
        pa.table({"x": [1.5, 2.5]}),
        pa.table({"z": [1, 2]}),
    ]
    found = Requirement("x / 2 < 1")
    found.bind({"odd": [shard.schema for shard in shards]})
    answers = [found.holds({"odd": shard}).to_pylist() for shard in shards]
    assert answers == [[None, None], [True, False], [True, False], [None, None]]
    with pytest.raises(UserError, match=r"odd: .*x"):
        Requirement("x = 1").bind({"odd": [shards[1].schema, pa.schema([("x", pa.string())])]})
    Requirement("y = 1").bind(
        {"odd": [*(shard.schema for shard in shards), pa.schema([("y", pa.int8()), ("x", pa.string())])]}
    )
