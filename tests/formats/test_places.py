"""Catches a list that is read as bytes it does not hold: packed under a plain name, plain
under a packed one, hidden, remote."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import pickle
import zipfile

import pyarrow as pa
import pytest

from capfilt.errors import UserError
from capfilt.formats.places import Place, places

TEXT = b"url,caption\nhttp://example.org/1.jpg,a red square\n" * 50


def packed(codec):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(TEXT)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("urls.csv", ".csv"),
        ("URLS.TSV.gz", ".tsv"),
        ("urls.parquet.zst", ".parquet"),
        ("urls", ""),
        ("urls.gz", ""),
        ("a.b/urls.jsonl", ".jsonl"),
        ("s3://bucket/urls.csv.gz?version=2.txt", ".csv"),
        ("https://example.org/list.tsv?download=true", ".tsv"),
        ("a?b.csv", ".csv"),  # on a disk that is part of the name
    ],
)
def test_the_suffix_is_that_of_what_is_packed(name, suffix):
    assert Place(name).suffix == suffix


@pytest.mark.parametrize("name", ["urls.csv", "urls.csv.gz", "urls"])
@pytest.mark.parametrize(
    "data",
    [TEXT, gzip.compress(TEXT), bz2.compress(TEXT), packed("zstd"), packed("lz4")],
    ids=["-", "gz", "bz2", "zst", "lz4"],
)
def test_the_bytes_and_not_the_name_say_how_it_is_packed(tmp_path, name, data):
    place = Place(str(tmp_path / name))
    (tmp_path / name).write_bytes(data)
    with pickle.loads(pickle.dumps(place)).stream() as stream:
        assert stream.read() == TEXT
    assert place.sha256() == hashlib.sha256(data).hexdigest()
    with place.open() as file:
        assert file.read() == data


def test_a_text_that_begins_as_a_packed_file_does_is_a_text(tmp_path):
    """`BZh` is three letters."""
    (tmp_path / "urls.csv").write_bytes(b"BZhello,caption\n")
    with Place(str(tmp_path / "urls.csv")).stream() as stream:
        assert stream.read() == b"BZhello,caption\n"


def test_what_cannot_be_unpacked_is_refused_by_name(tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("urls.csv", TEXT)
    for name, data in (("a.xz", lzma.compress(TEXT)), ("b.zip", archive.getvalue())):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            Place(str(tmp_path / name)).stream()
    with pytest.raises(UserError, match="nowhere"):
        Place(str(tmp_path / "nowhere")).open()


def test_a_folder_gives_its_lists_in_order_and_nothing_else(tmp_path):
    for name in ("b.csv", "a.CSV.gz", ".hidden.csv", "_SUCCESS.csv", "notes.md", "c.csv/part.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(TEXT)
    found = places(str(tmp_path), frozenset({".csv"}))
    assert [each.name for each in found] == [str(tmp_path / name) for name in ("a.CSV.gz", "b.csv")]
    with pytest.raises(UserError, match=r"\.tsv"):
        places(str(tmp_path), frozenset({".tsv"}))
    with pytest.raises(UserError, match="nowhere"):
        places(str(tmp_path / "nowhere"), frozenset({".csv"}))


def test_a_file_behind_a_url_is_read_as_one_on_a_disk():
    """fsspec's own memory is a file system as any bucket is."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for name in ("lists/b.csv", "lists/a.csv.gz", "lists/_x.csv"):
        with system.open(f"/{name}", "wb") as file:
            file.write(gzip.compress(TEXT) if name.endswith("gz") else TEXT)
    found = places("memory://lists", frozenset({".csv"}))
    assert [each.suffix for each in found] == [".csv", ".csv"]
    assert [each.stream().read() for each in found] == [TEXT, TEXT]
    assert all(each.remote for each in found)
    for refused in (
        lambda: places("memory://lists/none.csv", frozenset()),
        lambda: Place("nosuch://a/b.csv").open(),
    ):
        with pytest.raises(UserError, match="://"):
            refused()
