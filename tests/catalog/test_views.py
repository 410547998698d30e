"""Would catch: views that read uncommitted or foreign files, lose rows, invent ids, touch pixels, or let SQL out."""

from __future__ import annotations

import random
import shutil
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pytest

from capfilt.catalog.views import describe, open_catalog
from capfilt.tables.contracts import CONTRACTS, IMAGES, SCORES, SIGNALS
from capfilt.tables.manifest import Counts
from capfilt.tables.texts import texts_of
from capfilt.tables.workspace import Workspace
from tests.refusals import refused

VIEWS = [
    "images",
    "captions",
    "texts",
    "scores",
    "signals",
    "verdicts",
    "pairs",
    "examples",
    "funnel",
    "parts",
]


def bytes_read() -> int:
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar"))
    return int(line.split()[1])


def image(key: str, **more: object) -> dict:
    row = {"image_id": key, "dataset": "d", "key": key, "source": "web", "captions": [], "status": "success"}
    return row | more


def commit(workspace: Workspace, name: str, rows: list[dict], shard: int = 0) -> None:
    part = workspace.part("images", name)
    mark = part.begin(IMAGES, "ingest", {"version": 1})
    part.commit(shard, IMAGES.table(rows), Counts(len(rows), len(rows)), mark, 0.1)


def test_every_view_and_every_column_says_what_it_is(workspace: Workspace) -> None:
    with open_catalog(workspace) as connection:
        views = describe(connection)
    assert [view.name for view in views] == VIEWS
    missing = [
        f"{view.name}.{column.name}" for view in views for column in view.columns if not column.comment
    ]
    # The one column that ingestion carried along: no contract knows it.
    assert missing == ["images.pwatermark"]
    assert all(view.comment for view in views)


def test_rows_of_the_views_are_the_rows_of_the_parts(workspace: Workspace) -> None:
    with open_catalog(workspace) as connection:
        for table in ("images", "captions", "scores", "verdicts", "pairs"):
            rows = connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            assert rows == sum(part.rows for part in workspace.parts(table)) > 0
        assert connection.execute("SELECT DISTINCT rule FROM verdicts ORDER BY 1").fetchall() == [
            ("best",),
            ("capfilt",),
        ]
        assert connection.execute("SELECT DISTINCT scorer FROM scores").fetchall() == [("filter",)]
        assert connection.execute("SELECT DISTINCT part, captioner FROM captions").fetchall() == [
            ("captioner",) * 2
        ]


def test_texts_are_those_that_score_and_select_see_with_the_same_ids(workspace: Workspace) -> None:
    images, captions = workspace.part("images", "web"), workspace.part("captions", "captioner")
    expected = [texts_of(images.read(shard), [captions.read(shard)]) for shard in images.shards()]
    columns = ["text_id", "image_id", "source", "text"]
    with open_catalog(workspace) as connection:
        found = connection.sql(f"SELECT {', '.join(columns)} FROM texts ORDER BY text_id").to_arrow_table()
        unmatched = connection.execute(
            "SELECT count(*) FROM verdicts ANTI JOIN texts USING (text_id)"
        ).fetchone()[0]
    assert found.to_pylist() == pa.concat_tables(expected).select(columns).sort_by("text_id").to_pylist()
    assert unmatched == 0


def test_a_null_among_the_found_texts_keeps_its_place(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit(
        workspace, "web", [image("a", captions=["x", None, "", "x"]), image("b"), image("c", captions=["y"])]
    )
    expected = texts_of(workspace.part("images", "web").read(0), [])
    with open_catalog(workspace) as connection:
        found = connection.execute("SELECT text_id, text, sample_index FROM texts").fetchall()
    assert [row[0] for row in found] == expected["text_id"].to_pylist()
    assert [row[1:] for row in found] == [("x", 0), (None, 1), ("", 2), ("x", 3), ("y", 0)]


def test_empty_tables_are_empty_views_with_the_contracts_columns(tmp_path: Path) -> None:
    with open_catalog(Workspace(tmp_path)) as connection:
        for name, contract in CONTRACTS.items():
            relation = connection.sql(f"SELECT * FROM raw.{name}")
            assert relation.columns == ["part", *contract.schema.names]
            assert relation.fetchall() == []
        for view in VIEWS:
            assert connection.execute(f"SELECT * FROM {view}").fetchall() == []


def test_a_part_without_a_committed_shard_is_an_empty_view(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.part("scores", "filter").begin(SCORES, "score", {"version": 1})
    with open_catalog(workspace) as connection:
        assert connection.execute("SELECT count(*) FROM scores").fetchone() == (0,)
        assert connection.execute("SELECT part, shards, rows_in FROM parts").fetchall() == [("filter", 0, 0)]


def test_only_committed_shards_are_read(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit(workspace, "web", [image("a")])
    part = workspace.part("images", "web")
    # What a run killed between the file and its manifest leaves, an unfinished attempt, and somebody's own file.
    shutil.copy(part.path / "00000.parquet", part.path / "00001.parquet")
    shutil.copy(part.path / "00000.parquet", part.path / ".00002.parquet.abc.tmp")
    shutil.copy(part.path / "00000.parquet", part.path / "mine.parquet")
    with open_catalog(workspace) as connection:
        assert connection.execute("SELECT count(*) FROM images").fetchone() == (1,)
        with pytest.raises(duckdb.PermissionException):
            connection.execute(f"SELECT * FROM '{part.path / '00001.parquet'}'")


def test_parts_with_differing_columns_come_together_by_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit(workspace, "one", [image("a", pwatermark=0.5)])
    commit(workspace, "two", [image("b", part="carried", NSFW="UNLIKELY")])
    commit(workspace, "two", [image("c")], shard=1)
    with open_catalog(workspace) as connection:
        rows = connection.execute(
            "SELECT part, image_id, pwatermark, nsfw FROM images ORDER BY image_id"
        ).fetchall()
    assert rows == [("one", "a", 0.5, None), ("two", "b", None, "UNLIKELY"), ("two", "c", None, None)]


def test_shards_of_an_older_contract_version_lack_columns_without_harm(tmp_path: Path, monkeypatch) -> None:
    workspace = Workspace(tmp_path)
    old = SCORES.__class__(
        "scores", 1, SCORES.schema.remove(SCORES.schema.get_field_index("fold")), SCORES.key, "old"
    )
    new = SCORES.__class__("scores", 2, SCORES.schema, SCORES.key, SCORES.doc)
    row = {"text_id": "t", "image_id": "i", "itm_score": 0.25}
    for name, contract in (("old", old), ("new", new)):
        monkeypatch.setitem(CONTRACTS, "scores", contract)
        part = workspace.part("scores", name)
        mark = part.begin(contract, "score", {"version": 1})
        part.commit(0, contract.table([row]), Counts(1, 1), mark, 0.1)
    with open_catalog(workspace) as connection:
        rows = connection.execute("SELECT scorer, itm_score, fold FROM scores ORDER BY scorer").fetchall()
    assert rows == [("new", 0.25, None), ("old", 0.25, None)]


def test_signals_of_several_tests_stand_side_by_side(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for name, row in (
        ("language", {"image_id": "a", "language": "en"}),
        ("cluster", {"image_id": "a", "cluster": 7}),
    ):
        part = workspace.part("signals", name)
        mark = part.begin(SIGNALS, name, {"version": 1})
        part.commit(0, SIGNALS.table([row]), Counts(1, 1), mark, 0.1)
    with open_catalog(workspace) as connection:
        rows = connection.execute(
            "SELECT signal, image_id, language, cluster FROM signals ORDER BY 1"
        ).fetchall()
    assert rows == [("cluster", "a", None, 7), ("language", "a", "en", None)]


def test_each_signal_has_a_view_of_its_own_in_its_own_types(tmp_path: Path) -> None:
    """Would catch: a signal whose columns turn into text beside another's of the same name, or that nothing explains."""
    workspace = Workspace(tmp_path)
    for name, rows in (
        ("clip-score", [{"image_id": "a", "score": 0.5}]),
        ("language", [{"image_id": "a", "text_id": "t", "score": "en", "sure": True}]),
        ("select", [{"image_id": "a", "first": True}]),
        ('we"i.rd', [{"image_id": "a", "first": 1}]),
    ):
        part = workspace.part("signals", name)
        mark = part.begin(SIGNALS, name, {"version": 1})
        table = SIGNALS.table(rows)
        fields = [
            f.with_metadata({"doc": f"of {name}: {f.name}"}) if f.name == "score" else f for f in table.schema
        ]
        part.commit(0, table.cast(pa.schema(fields)), Counts(1, 1), mark, 0.1)
    with open_catalog(workspace) as connection:
        rows = connection.execute('SELECT * FROM signals."clip-score"').fetchall()
        assert rows == [("a", None, 0.5)]
        assert connection.execute("SELECT * FROM signals.language").fetchall() == [("a", "t", "en", True)]
        assert connection.execute('SELECT first FROM signals."select"').fetchall() == [(True,)]
        assert connection.execute("SELECT count(*), count(score) FROM signals").fetchall() == [(4, 2)]
        views = {view.name: {column.name: column for column in view.columns} for view in describe(connection)}
        for name in views:
            connection.execute(f"SELECT * FROM {name}").fetchall()
    assert {*views} >= {"signals", 'signals."clip-score"', "signals.language", 'signals."we""i.rd"'}
    assert [*views["signals.language"]] == ["image_id", "text_id", "score", "sure"]
    assert views["signals.language"]["score"].comment == "of language: score"
    assert views['signals."clip-score"']["score"].type == "DOUBLE"
    assert "128-bit hash" in views["signals.language"]["image_id"].comment


@pytest.mark.parametrize("name", ["we[i]rd *x?", "it's", "k=3", 'a"b', "ünï ☃"])
def test_directories_with_strange_names(tmp_path: Path, name: str) -> None:
    workspace = Workspace(tmp_path / name)
    commit(workspace, name, [image("a")])
    with open_catalog(workspace) as connection:
        assert connection.execute("SELECT part, image_id FROM images").fetchall() == [(name, "a")]
        assert "k" not in connection.sql("SELECT * FROM images").columns


def test_a_workspace_named_relatively(tmp_path: Path, monkeypatch) -> None:
    commit(Workspace(tmp_path / "w"), "web", [image("a")])
    monkeypatch.chdir(tmp_path)
    with open_catalog(Workspace("w")) as connection:
        assert connection.execute("SELECT count(*) FROM images").fetchone() == (1,)


def test_pixels_are_not_read_unless_asked_for(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    pixels = 40_000
    noise = random.Random(0)
    rows = [
        image(f"{n:04d}", captions=[f"text {n}"], image={"bytes": noise.randbytes(pixels), "path": None})
        for n in range(300)
    ]
    commit(workspace, "web", rows)
    file = workspace.part("images", "web").path / "00000.parquet"
    assert file.stat().st_size > 300 * pixels
    with open_catalog(workspace) as connection:
        for sql in (
            "SELECT * FROM images", "SELECT count(DISTINCT text_id) FROM texts", "SELECT count(*) FROM images",
            "SELECT text FROM texts WHERE image_id = '0007'", "DESCRIBE images",
        ):  # fmt: skip
            before = bytes_read()
            connection.execute(sql).fetchall()
            assert bytes_read() - before < 300 * pixels / 20, sql
        before = bytes_read()
        one = connection.execute(
            "SELECT octet_length(image.bytes) FROM raw.images WHERE image_id = '0007'"
        ).fetchall()
        assert one == [(pixels,)]
        # One row group of 100 pictures, not all three.
        assert bytes_read() - before < 1.5 * 100 * pixels


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM read_text('/etc/hostname')",
        "SELECT * FROM glob('/*')",
        "SELECT * FROM 'other.csv'",
        "COPY (SELECT 1) TO 'made.csv'",
        "ATTACH 'made.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "SELECT * FROM 'http://127.0.0.1:9/x.parquet'",
        "SET enable_external_access = true",
        "SET threads = 1",
        "RESET allowed_paths",
        "SET lock_configuration = false",
        "SELECT * FROM workspace",
        "SELECT * FROM sql",
    ],
)
def test_the_connection_reaches_nothing_else(
    workspace: Workspace, tmp_path: Path, monkeypatch, sql: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a\n1\n")
    with open_catalog(workspace) as connection, pytest.raises(duckdb.Error):
        connection.execute(sql).fetchall()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.csv"]


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit(workspace, "web", [image("a")])
    path = tmp_path / "images" / "web" / "00000.parquet"
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    with refused("00000.parquet"), open_catalog(workspace):
        pass


def test_a_part_in_another_tables_directory_is_refused(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    commit(workspace, "web", [image("a")])
    for folder in (tmp_path, tmp_path / ".capfilt"):
        shutil.copytree(folder / "images" / "web", folder / "scores" / "web")
    with refused("table images"), open_catalog(workspace):
        pass


def test_a_missing_workspace_is_named(tmp_path: Path) -> None:
    with (
        refused(tmp_path / "absent"),
        open_catalog(Workspace(tmp_path / "absent")),
    ):
        pass


def test_large_sorts_spill_outside_the_working_directory(
    workspace: Workspace, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with open_catalog(workspace) as connection:
        spill = Path(connection.execute("SELECT current_setting('temp_directory')").fetchone()[0])
        assert spill.is_dir()
        assert tmp_path not in spill.parents
    assert not spill.exists()
    assert list(tmp_path.iterdir()) == []


MOMENT = datetime(2020, 1, 2, 3, 4, 5, tzinfo=UTC)
VALUES = {
    "int": pa.array([7]),
    "float": pa.array([1.5]),
    "bool": pa.array([True]),
    "string": pa.array(["none found"]),
    "binary": pa.array([b"\xff\x00"]),
    "timestamp": pa.array([MOMENT], pa.timestamp("us")),
    "zoned": pa.array([MOMENT], pa.timestamp("us", "UTC")),
    "date": pa.array([date(2020, 1, 2)]),
    "decimal": pa.array([Decimal("1.50")]),
    "list": pa.array([["a", None]]),
    "nested": pa.array([[[0.5, 2.0]]]),
    "struct": pa.array([{"a": 1}]),
    "map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int32())),
    "null": pa.nulls(1),
    "dictionary": pa.array(["x"]).dictionary_encode(),
}
TEXTS = {
    "int": "7",
    "float": "1.5",
    "bool": "true",
    "string": "none found",
    "binary": "/wA=",
    "timestamp": "2020-01-02 03:04:05",
    "zoned": "2020-01-02 03:04:05+00",
    "date": "2020-01-02",
    "decimal": "1.50",
    "list": '["a",null]',
    "nested": "[[0.5,2.0]]",
    "struct": '{"a":1}',
    "map": '{"k":1}',
    "null": None,
    "dictionary": "x",
}
NUMBERS = {"int", "float", "decimal"}


def carrying(workspace: Workspace, name: str, columns: dict[str, pa.Array], shard: int = 0) -> None:
    """A shard of one row that carries these columns."""
    part = workspace.part("images", name)
    mark = part.begin(IMAGES, "ingest", {"version": 1})
    table = IMAGES.table([image(f"{name}{shard}")])
    for column, values in columns.items():
        table = table.append_column(column, values)
    part.commit(shard, table, Counts(1, 1), mark, 0.1)


def test_one_column_of_any_two_types_has_one_type(tmp_path: Path) -> None:
    """Would catch: `Conversion Error: ... can't be cast to DOUBLE[][]`, of `SELECT *` too, because two datasets carry one
    name in two types."""
    workspace = Workspace(tmp_path)
    pairs = {f"{a}_{b}": (a, b) for a in VALUES for b in VALUES if a != b}
    carrying(workspace, "one", {name: VALUES[a] for name, (a, _) in pairs.items()})
    carrying(workspace, "two", {name: VALUES[b] for name, (_, b) in pairs.items()})
    with open_catalog(workspace) as connection:
        relation = connection.sql("SELECT * FROM images ORDER BY part")
        types = dict(zip(relation.columns, map(str, relation.types), strict=True))
        rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
        comments = {
            column.name: column.comment for column in describe(connection)[0].columns if column.name in pairs
        }
    assert [row["part"] for row in rows] == ["one", "two"]
    for name, kinds in pairs.items():
        found = [row[name] for row in rows]
        if NUMBERS.issuperset(kinds):
            assert types[name] == "DOUBLE", name
            assert found == [float(TEXTS[kind]) for kind in kinds], name
        elif "null" in kinds:
            (other,) = {*kinds} - {"null"}
            assert types[name] != "VARCHAR" or other in ("string", "dictionary"), name
            assert [value is None for value in found] == [kind == "null" for kind in kinds], name
        else:
            assert types[name] == "VARCHAR", name
            assert found == [TEXTS[kind] for kind in kinds], name
    assert comments["nested_string"] == (
        "carried along, of several types (DOUBLE[][] in one; VARCHAR in two), here as VARCHAR: bytes as base64, lists and "
        "structs as JSON"
    )


def test_types_that_merely_widen_widen_between_shards_of_a_part_too(tmp_path: Path) -> None:
    """Would catch: numbers that become text, integers that become floats, and -1 that does not fit."""
    workspace = Workspace(tmp_path)
    unlike = {
        "narrow": (pa.array([-1], pa.int32()), pa.array([2**40]), "BIGINT"),
        "unsigned": (pa.array([2**32 - 1], pa.uint32()), pa.array([-1], pa.int8()), "BIGINT"),
        "huge": (pa.array([2**64 - 1], pa.uint64()), pa.array([-1]), "HUGEINT"),
        "real": (pa.array([0.5], pa.float32()), pa.array([0.25]), "DOUBLE"),
        "lists": (pa.array([[1]], pa.list_(pa.int32())), pa.array([[2**40]]), "BIGINT[]"),
        "empty": (pa.array([[]], pa.list_(pa.null())), pa.array([["a"]]), "VARCHAR[]"),
    }
    carrying(workspace, "one", {name: first for name, (first, _, _) in unlike.items()})
    carrying(workspace, "one", {name.upper(): second for name, (_, second, _) in unlike.items()}, shard=1)
    with open_catalog(workspace) as connection:
        relation = connection.sql(f"SELECT {', '.join(unlike)} FROM images ORDER BY image_id")
        assert [*map(str, relation.types)] == [type_ for _, _, type_ in unlike.values()]
        assert relation.fetchall() == [
            tuple(each[place][0].as_py() for each in unlike.values()) for place in (0, 1)
        ]


def test_a_test_may_have_a_column_called_part(tmp_path: Path) -> None:
    """Would catch: every query failing, because a column that the view does not show has two types."""
    workspace = Workspace(tmp_path)
    for name, value in (("one", 1), ("two", "x")):
        part = workspace.part("signals", name)
        mark = part.begin(SIGNALS, name, {"version": 1})
        part.commit(0, SIGNALS.table([{"image_id": "a", "Part": value}]), Counts(1, 1), mark, 0.1)
    with open_catalog(workspace) as connection:
        assert connection.execute("SELECT * FROM signals ORDER BY 1").fetchall() == [
            ("one", "a", None),
            ("two", "a", None),
        ]


@pytest.mark.parametrize("name", ['a"b', "we, ird; --", "ünï ☃", "FLOAT", "Part", "URL"])
def test_a_carried_column_may_be_called_anything(tmp_path: Path, name: str) -> None:
    """Would catch: a column's name that ends the SQL it stands in, or that hides a column of the table's own."""
    workspace = Workspace(tmp_path)
    carrying(workspace, "one", {name: pa.array([1])})
    carrying(workspace, "two", {name: pa.array(["x"])})
    with open_catalog(workspace) as connection:
        assert connection.execute("SELECT part, url FROM images ORDER BY 1").fetchall() == [
            ("one", None),
            ("two", None),
        ]
        connection.execute("SELECT * FROM images").fetchall()
