"""Would catch: a list that loses rows or shifts them, a caption that is not what the list has, a format misread in silence."""

from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import UserError
from capfilt.stages.download.lists import open_list
from capfilt.stages.download.presets import Layout


def read_all(path, extra=(), rows=2, **options):
    listing = pickle.loads(pickle.dumps(open_list(str(path), "auto", Layout(), extra, rows)))
    slices = [listing.read(number) for number in range(-(-listing.rows // rows))]
    urls = [url for each in slices for url in each.urls]
    captions = [texts for each in slices for texts in each.captions]
    faults = [fault for each in slices for fault in each.faults]
    assert len(urls) == len(captions) == len(faults) == listing.rows
    return urls, captions, faults, slices


def test_txt_is_a_url_per_line(tmp_path):
    path = tmp_path / "u.txt"
    path.write_bytes(b"\xef\xbb\xbfhttp://a/1,2.jpg\r\n\n  http://a/3.jpg \nhttp://a/\xff.jpg")
    urls, captions, _, _ = read_all(path)
    assert urls == ["http://a/1,2.jpg", "http://a/3.jpg", "http://a/\ufffd.jpg"]
    assert captions == [[], [], []]


def test_csv_quotes_and_tsv_does_not(tmp_path):
    csv, tsv = tmp_path / "u.csv", tmp_path / "u.tsv"
    csv.write_bytes(b'url,caption,n\r\nu1,"a ""b"",\nc",1\r\n\r\nu2,,\nu3,too,many,commas\nu4\n')
    urls, captions, faults, slices = read_all(csv, extra=("n",))
    assert urls == ["u1", "u2", None, "u4"]
    assert captions == [['a "b",\nc'], [""], [], []]
    assert faults == [None, None, "the line has 4 fields, the header 3", None]
    assert pa.concat_tables(each.extra for each in slices)["n"].to_pylist() == ["1", "", None, None]
    tsv.write_bytes(b'caption\turl\n"Quoted" he said\tu1\n"open\tu2\n')
    assert read_all(tsv)[:2] == (["u1", "u2"], [['"Quoted" he said'], ['"open']])


def test_jsonl_and_json(tmp_path):
    lines = [
        '{"url": "u1", "caption": "a\\ud83d b", "n": 1, "tags": ["x"]}',
        "not json",
        "",
        '{"url": 5, "caption": ["one", null, "two"], "n": 2.5}',
        "[1]",
        '{"caption": null, "tags": "y"}',
    ]
    path = tmp_path / "u.jsonl"
    path.write_text("\n".join(lines))
    urls, captions, faults, slices = read_all(path, extra=("n", "tags"))
    assert urls == ["u1", None, "5", None, None]
    assert captions == [["a\ufffd b"], [], ["one", "two"], [], []]
    assert [fault is None for fault in faults] == [True, False, True, False, True]
    extra = pa.concat_tables(each.extra for each in slices)
    assert extra["n"].to_pylist() == [1.0, None, 2.5, None, None]
    assert extra["tags"].to_pylist() == ['["x"]', None, None, None, "y"]

    path = tmp_path / "u.json"
    path.write_text('[{"url": "u1", "caption": "x"}, 3, {"url": "u2"}]')
    assert read_all(path)[0] == ["u1", None, "u2"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("u.json", b'{"url": 1}', "not an array"),
        ("u.json", b"[", "is not JSON"),
        ("u.jsonl", b"<html>\n", "is not JSON"),
        ("u.csv", b"", "is empty"),
        ("u.parquet", b"PAR1 no", "not a Parquet file"),
        ("u.list", b"http://a\n", "--input-format"),
    ],
)
def test_a_broken_list_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        open_list(str(tmp_path / name), "auto", Layout(), (), 10)
    assert str(tmp_path / name) in str(caught.value)


TEXTS = st.text(st.characters(exclude_characters="\r\n\t\0", exclude_categories=("Cs",)), max_size=30)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=12), st.integers(1, 5))
def test_slices_of_any_size_are_the_list(tmp_path_factory, pairs, rows):
    """Independent writers: csv and pyarrow. A record is found by its offset, whatever quotes and newlines it has."""
    import csv

    directory = tmp_path_factory.mktemp("lists")
    pairs = [(f"u{url}", text) for url, text in pairs]
    with (directory / "u.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("url", "caption"), *((url, f"{text}\n,") for url, text in pairs)])
    assert read_all(directory / "u.csv", rows=rows)[:2] == (
        [u for u, _ in pairs],
        [[f"{t}\n,"] for _, t in pairs],
    )
    pq.write_table(
        pa.table({"url": [u for u, _ in pairs], "caption": [t for _, t in pairs]}),
        directory / "u.parquet",
        row_group_size=2,
    )
    assert read_all(directory / "u.parquet", rows=rows)[:2] == (
        [u for u, _ in pairs],
        [[t] for _, t in pairs],
    )
