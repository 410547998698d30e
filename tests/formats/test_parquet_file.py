"""Catches a Parquet file of some kilobytes that takes gigabytes to read, wherever others' files are read; and one that is
refused though its columns are only long, repetitive or empty."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.formats import parquet_file as parquet
from capfilt.formats.parquet_file import open_parquet
from tests import limits
from tests.refusals import refused

MANY = 3_000_000
URL = "http://127.0.0.1:9/x"

DOWNLOAD = """
from capfilt.stages.download.lists import open_list
from capfilt.stages.download.presets import layout
def read(path): open_list(path, "parquet", layout("", "url", "caption"), (), 1000).read(0)
"""
INGEST = """
from pathlib import Path
from capfilt.formats.places import Place
from capfilt.formats.records import open_records
from capfilt.formats import Reading
from capfilt.formats.source import open_source
def read(path):
    if Path(path).stem in ("list", "struct", "sharedlist"):
        open_source(path, "parquet", Reading()).read(0)
    else:
        list(open_records(Place(path)))
"""


def nulls(count):
    return pa.nulls(count, pa.string())


def bombs():
    """(name, columns) of each."""
    whole = pa.ListArray.from_arrays(pa.array([0, MANY], pa.int32()), nulls(MANY))
    nested = pa.StructArray.from_arrays([whole], ["texts"])
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), pa.array(["x" * 1_000_000]))
    lists = pa.ListArray.from_arrays(pa.array([0, 100_000], pa.int32()), shared)
    yield "list", {"url": [URL], "jpg": [b"x"], "caption": whole}
    yield "rows", {"url": nulls(MANY), "caption": nulls(MANY)}
    yield "struct", {"url": [URL], "jpg": [b"x"], "caption": nested}
    yield "shared", {"url": [URL] * 100_000, "caption": shared}
    yield "sharedlist", {"url": [URL], "jpg": [b"x"], "caption": lists}
    yield "metadata", {"file_name": ["a.jpg"], "caption": whole}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("bombs")
    for name, columns in bombs():
        pq.write_table(pa.table(columns), root / f"{name}.parquet")
        assert (root / f"{name}.parquet").stat().st_size < 100_000
    return {path.stem: str(path) for path in root.iterdir()}


@pytest.mark.parametrize("code", [DOWNLOAD, INGEST], ids=["download", "ingest"])
def test_a_file_that_explodes_is_refused_in_time_and_memory(files, code):
    names = [name for name in files if code == INGEST or name != "metadata"]
    for name, told in zip(names, limits.refused(code, [files[name] for name in names]), strict=True):
        assert files[name] in told
        assert "row group 0 of column" in told


def test_a_text_of_zeros_is_measured_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "SMALL", 2**20)
    table = pa.table({"caption": ["\0" * 5_000_000]})
    for how in ({"use_dictionary": False}, {}):
        pq.write_table(table, tmp_path / "zeros.parquet", compression="zstd", **how)
        assert (tmp_path / "zeros.parquet").stat().st_size < 5_000
        with refused("zeros", "1,048,576"):
            open_parquet(tmp_path / "zeros.parquet", "zeros")


def test_what_is_only_long_repetitive_or_empty_is_read(tmp_path):
    rows = 200_000
    columns = {
        "url": [f"{URL}/{number}" for number in range(rows)],
        "caption": [["a text of many"] * 3] * rows,
        "license": nulls(rows),
        "note": pa.array(["short"] * (rows - 1) + ["y" * 100_000]).dictionary_encode(),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with open_parquet(tmp_path / "a.parquet", "a") as file:
        assert file.metadata.num_rows == rows
    pq.write_table(pa.table({"url": [], "caption": []}), tmp_path / "b.parquet")
    open_parquet(tmp_path / "b.parquet", "b").close()


def test_a_column_that_nobody_reads_may_be_what_it_is(files):
    open_parquet(files["list"], "list", ["url"]).close()
    with refused("list", "caption"):
        open_parquet(files["list"], "list", ["url", "caption"])


@pytest.mark.parametrize(
    "data", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"PAR1" + b"\xff" * 8 + b"PAR1"]
)
def test_what_is_no_parquet_file_is_named(tmp_path, data):
    (tmp_path / "x.parquet").write_bytes(data)
    with refused(tmp_path / "x.parquet", "Parquet"):
        open_parquet(tmp_path / "x.parquet", tmp_path / "x.parquet")
