"""Catches a part that another library cannot open, or of which it sees other rows: files beside the shards that polars and
pyarrow refuse, and a retried shard whose two generations both match `*.parquet`.

The table in docs/guarantees.md has a row for each reader here; its cells are what the libraries do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from capfilt.tables.contracts import IMAGES
from capfilt.tables.ids import image_id
from capfilt.tables.manifest import Counts, Successor
from capfilt.tables.shards import Part
from capfilt.tables.workspace import Workspace
from tests.worlds import failed_row, image_rows, write_images

COLUMNS = ["image_id", "failure"]
Rows = list[tuple[str, str | None]]


def pandas(path: str) -> Rows:
    import pandas as pd

    frame = pd.read_parquet(path, columns=COLUMNS)
    return list(frame.itertuples(index=False, name=None))


def polars(path: str) -> Rows:
    import polars as pl

    return pl.read_parquet(path, columns=COLUMNS).rows()


def duckdb(path: str) -> Rows:
    import duckdb

    return duckdb.sql(f"SELECT image_id, failure FROM read_parquet('{path}')").fetchall()


def load_dataset(path: str, **named: str) -> Rows:
    from datasets import load_dataset

    found = load_dataset(path, split="train", **named).select_columns(COLUMNS)
    return [(row["image_id"], row["failure"]) for row in found]


RAY = """
import json, sys, ray
ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False
for path in sys.argv[1:]:
    try:
        rows = ray.data.read_parquet(path, columns=["image_id", "failure"]).take_all()
        print(json.dumps([[row["image_id"], row["failure"]] for row in rows]))
    except Exception as error:
        print(json.dumps(type(error).__name__))
"""


def ray_data(paths: list[str], _: Path) -> list[Rows | str]:
    # In a process of its own: a Ray that is still up would share this one with every later test.
    done = subprocess.run(
        [sys.executable, "-c", RAY, *paths], capture_output=True, text=True, timeout=300, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()[-len(paths) :]]
    return [each if isinstance(each, str) else [tuple(row) for row in each] for each in found]


def one_by_one(
    read: Callable[..., Rows], *, cached: bool = False
) -> Callable[[list[str], Path], list[Rows | str]]:
    """Rows of each path, or the name of the error with which the library refuses it."""

    def every(paths: list[str], cache: Path) -> list[Rows | str]:
        found: list[Rows | str] = []
        for number, path in enumerate(paths):
            try:
                found.append(read(path, cache_dir=str(cache / str(number))) if cached else read(path))
            except Exception as error:  # noqa: BLE001 - the library's own refusal is what is documented
                found.append(type(error).__name__)
        return found

    return every


def rows_of(table) -> Rows:
    return [(row["image_id"], row["failure"]) for row in table.to_pylist()]


READERS: dict[str, Callable[[list[str], Path], list[Rows | str]]] = {
    "`pyarrow.parquet.read_table`": one_by_one(lambda path: rows_of(pq.read_table(path, columns=COLUMNS))),
    "`pyarrow.dataset.dataset`": one_by_one(lambda path: rows_of(ds.dataset(path).to_table(COLUMNS))),
    "`pandas.read_parquet`": one_by_one(pandas),
    "`polars.read_parquet`": one_by_one(polars),
    "DuckDB's `read_parquet`": one_by_one(duckdb),
    "`load_dataset(PATH)`": one_by_one(load_dataset, cached=True),
    '`load_dataset("parquet", data_dir=PATH)`': one_by_one(
        lambda path, **cache: load_dataset("parquet", data_dir=path, **cache), cached=True
    ),
    '`load_dataset("parquet", data_files=PATH)`': one_by_one(
        lambda path, **cache: load_dataset("parquet", data_files=path, **cache), cached=True
    ),
    "`ray.data.read_parquet`": ray_data,
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> dict[str, Part]:
    """A part as `download` leaves it, and the same after its failed row was retried."""
    found = {}
    for name in ("downloaded", "retried"):
        part = Workspace(tmp_path_factory.mktemp(name)).part("images", "web")
        lost = failed_row("web", "lost")
        write_images(part, [[*image_rows("web", 2), lost], image_rows("web", 2, start=10)])
        if name == "retried":
            came = {**image_rows("web", 1, start=5)[0], "key": "lost", "image_id": image_id("web", "lost")}
            first = part.manifest(0)
            after = Successor(1, first.sha256, {"timeout": 30.0})
            table = IMAGES.table([*image_rows("web", 2), came])
            part.commit(0, table, Counts(3, 3), first.fingerprint, 0.1, successor=after)
        part.finish()
        found[name] = part
    return found


def documented() -> dict[str, list[str]]:
    """The cells of the table in docs/guarantees.md, by reader."""
    text = (Path(__file__).parents[1] / "docs" / "guarantees.md").read_text()
    lines = text[text.index("| reader |") :].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {reader: cells for reader, *cells in rows}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_each_row_once_and_the_newest(parts, reader, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    layouts = [(kind, pattern) for kind in ("downloaded", "retried") for pattern in (".", "*.parquet")]
    found = READERS[reader]([str(parts[kind].path / pattern) for kind, pattern in layouts], tmp_path)
    cells = []
    for (kind, _), rows in zip(layouts, found, strict=True):
        expected = rows_of(pa.concat_tables(parts[kind].tables(COLUMNS)))
        assert isinstance(rows, str) or sorted(rows) == sorted(expected)
        cells.append(rows if isinstance(rows, str) else "yes")
    assert documented()[reader] == cells


def test_the_table_has_no_reader_that_is_not_tried():
    assert set(documented()) == set(READERS)
