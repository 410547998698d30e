"""Would catch: records lost, shifted or misread in silence; a traceback for a file that is no list."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import pickle
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.formats.places import Place
from capfilt.formats.records import FILE, URL, EmptyFile, open_records
from tests.refusals import refused

ROWS = [{"url": f"http://a/{n}", "caption": f"日本 🙂 {n}, ü", "n": n} for n in range(300)]


def zstd(data):
    return pa.Codec("zstd").compress(data, asbytes=True)


def lz4(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".lz4": lz4,
}
ENCODINGS = {
    "utf-8": "utf-8",
    "utf-8-bom": "utf-8-sig",
    "utf-16": "utf-16",
    "utf-16-be": "utf-16-be",
    "utf-32": "utf-32",
}


def written(kind):
    if kind == "parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), sink, row_group_size=70)
        return sink.getvalue().to_pybytes()
    if kind in ("csv", "psv", "tsv"):
        mark = {"csv": ",", "psv": "|", "tsv": "\t"}[kind]
        quote = '"' if kind == "csv" else ""
        lines = [
            mark.join([" url", "caption ", " n"]),
            *(mark.join([row["url"], quote + row["caption"] + quote, str(row["n"])]) for row in ROWS),
        ]
        return "\r\n".join(lines)
    if kind == "txt":
        return "\n".join(row["caption"] for row in ROWS)
    if kind == "json":
        return json.dumps(ROWS, ensure_ascii=False, indent=1)
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n"


def read(path, format="auto", header=()):
    records = pickle.loads(pickle.dumps(open_records(Place(str(path)), format, header)))
    found = list(records)
    # What begins at any record is the rest of the list.
    for place in (0, len(found) // 2, len(found) - 1):
        assert list(records.iterate(found[place])) == found[place:]
    return records, found


@pytest.mark.parametrize("kind", ["csv", "psv", "tsv", "txt", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("ending", COMPRESSORS)
def test_a_list_of_every_kind_is_read_plain_and_compressed(tmp_path, kind, ending):
    """Would catch: a list that only another tool opens; a compression that is told by the name alone."""
    data = written(kind)
    path = tmp_path / f"list.{kind}{ending}"
    path.write_bytes(COMPRESSORS[ending](data if isinstance(data, bytes) else data.encode()))
    misnamed = tmp_path / f"misnamed.{kind}"
    misnamed.write_bytes(path.read_bytes())
    records, found = read(path)
    assert read(misnamed)[1] == found
    if kind == "txt":
        assert records.names == ["value"]
        assert [record.fields["value"] for record in found] == [row["caption"] for row in ROWS]
    else:
        assert records.names == ["url", "caption", "n"]
        convert = str if kind in ("csv", "psv", "tsv") else int
        assert [record.fields for record in found] == [row | {"n": convert(row["n"])} for row in ROWS]
    first = 2 if kind in ("csv", "psv", "tsv") else 1
    assert [record.number for record in found] == list(range(first, first + len(ROWS)))
    assert all(record.fault is None for record in found)


@pytest.mark.parametrize("kind", ["csv", "psv", "tsv", "txt", "json", "jsonl"])
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path, kind, encoding, ending):
    """Would catch: a mark in the first column's name; every other byte of UTF-16 as a character."""
    text = written(kind)
    data = text.encode(ENCODINGS[encoding])
    if encoding == "utf-16-be":
        data = b"\xfe\xff" + data
    path = tmp_path / f"list.{kind}{ending}"
    path.write_bytes(COMPRESSORS[ending](data))
    plain = tmp_path / f"plain.{kind}"
    plain.write_text(text, encoding="utf-8", newline="")
    strip = [record._replace(offset=0) for record in read(path)[1]]
    assert strip == [record._replace(offset=0) for record in read(plain)[1]]


@pytest.mark.parametrize(
    ("name", "content", "names", "rows"),
    [
        # Flickr30k's results.csv: bars, and blanks around the names.
        (
            "r.csv",
            "image_name| comment_number| comment\n1.jpg| 0| Two, men\n",
            ["image_name", "comment_number", "comment"],
            ["1.jpg", " 0", " Two, men"],
        ),
        ("r.csv", 'a;b\n"x;y";2\n', ["a", "b"], ["x;y", "2"]),
        ("r.csv", 'a\tb\n"x\ty\n', ["a", "b"], ['"x', "y"]),
        ("r.tsv", "a,b\nx,y\n", ["a", "b"], ["x", "y"]),
        ("r.psv", "a|b\nx|y\n", ["a", "b"], ["x", "y"]),
        # What the format says wins where it is there.
        ("r.csv", "a|b,c;d\nx,y\n", ["a|b", "c;d"], ["x", "y"]),
        ("r.csv", '"a,b"|c\nx|y\n', ["a,b", "c"], ["x", "y"]),
        ("r.csv", "url\nx|y\n", ["url"], ["x|y"]),
        ("r.tsv", "a|b\tc\nx\ty\n", ["a|b", "c"], ["x", "y"]),
    ],
)
def test_the_first_line_tells_what_stands_between_fields(tmp_path, name, content, names, rows):
    """Would catch: a list with bars or semicolons as one column."""
    (tmp_path / name).write_text(content)
    records, found = read(tmp_path / name)
    assert records.names == names
    assert [list(record.fields.values()) for record in found] == [rows]


def test_a_json_file_may_have_an_object_per_line(tmp_path):
    """Would catch: NLVR2's files, which are called .json and are lines, refused."""
    path = tmp_path / "x.json"
    path.write_text('\n{"a": 1}\n\n{"b": 2}\nno\n{"a": 3}')
    records, found = read(path)
    assert records.names == ["a", "b"]
    assert [(record.number, record.fields) for record in found] == [
        (2, {"a": 1}),
        (4, {"b": 2}),
        (5, {}),
        (6, {"a": 3}),
    ]
    assert "JSON" in found[2].fault


@pytest.mark.parametrize(
    ("key", "value", "names"),
    [(None, "", 3), (("x", URL), "http://a/{}", 4), (("x", FILE), "dir/{}.JPG", 4)],
)
def test_a_quote_left_open_takes_no_record_along_where_the_key_is_known(tmp_path, key, value, names):
    """Would catch: an unclosed quote that makes the records up to the next quote one text."""
    path = tmp_path / "x.csv"
    path.write_text(
        "x,text\n"
        + "".join(f"{value.format(n)},{text}\n" for n, text in enumerate(['"open', "b", '"']))
        + "\n"
    )
    records = open_records(Place(str(path)))
    records.key = key
    found = list(records)
    if key is None:
        assert [record.fault for record in found] == [None]
    else:
        assert [record.number for record in found] == [2, 3, 4]
        assert [record.fault is None for record in found] == [False, True, False]


def test_bytes_that_are_not_utf8_are_told(tmp_path):
    """Would catch: a list in Latin-1 whose accents are lost without a word."""
    rows = [
        {"url": "u1", "caption": "caf\u00e9"},
        {"url": "u2", "caption": "x"},
        {"url": "u3", "caption": "\u00fc"},
    ]
    for name, text in {
        "x.csv": "url,caption\n" + "".join(f"{row['url']},{row['caption']}\n" for row in rows),
        "x.tsv": "url\tcaption\n" + "".join(f"{row['url']}\t{row['caption']}\n" for row in rows),
        "x.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        "x.json": json.dumps(rows, ensure_ascii=False),
    }.items():
        path = tmp_path / name
        path.write_bytes(text.encode("latin-1"))
        with pytest.warns(RuntimeWarning, match="2 records .*iconv") as caught:
            found = list(open_records(Place(str(path))))
        assert str(path) in str(caught[0].message)
        assert [record.fields["caption"] for record in found] == ["caf\ufffd", "x", "\ufffd"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.csv", b"PK\x03\x04" + b"\0" * 100, "zip"),
        ("x.csv", b"\x89PNG\r\n" + b"\0" * 100, "text"),
        ("x.txt", "http://a".encode("utf-16-le"), "byte order"),
        ("x.jsonl", b"<html>\n<p>", "JSON"),
        ("x.json", b'"text"', "begin"),
        ("x.json", b'{\n "images": []\n}', "JSON"),
        ("x.json", b'[{"a": 1}', "neither ,"),
        ("x.csv.gz", gzip.compress(b"a,b\n" + b"c,d\n" * 99_999)[:-9], "end"),
        ("x.csv.gz", gzip.compress(b"a,b\nc,d\n")[:-9], "end"),
        ("x.json.gz", gzip.compress(b"[{}, {}]")[:-9], "end"),
        ("x.txt", "\ufeffa\n".encode("utf-16-le")[:-1], "end"),
        ("x.txt.zst", zstd(bytes(range(65, 91)) * 999)[:-3], "end"),
        ("x.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 9)[:-3], "end"),
        ("x.csv.xz", lzma.compress(b"a,b\n"), "xz"),
        ("x.parquet", b"PAR1 no", "Parquet"),
        ("x.parquet.gz", gzip.compress(b"PAR1 no"), "Parquet"),
        ("x.list", b"http://a\n", "format"),
    ],
)
def test_a_file_that_is_no_list_is_named(tmp_path, name, content, words):
    path = tmp_path / name
    path.write_bytes(content)
    with refused(path, words):
        list(open_records(Place(str(path))))


@pytest.mark.parametrize("name", ["x.csv", "x.tsv", "x.txt", "x.jsonl", "x.json", "x.csv.gz", "x.json.zst"])
def test_an_empty_file_is_told_from_a_broken_one(tmp_path, name):
    (tmp_path / name).write_bytes(
        COMPRESSORS[(tmp_path / name).suffix if name.count(".") > 1 else ""](b" \n" * ("sv" not in name))
    )
    with refused(tmp_path / name, error=EmptyFile):
        open_records(Place(str(tmp_path / name)))


def repeated(byte, size):
    """Gzip of many bytes in few: members of ten million, one after the other."""
    return gzip.compress(byte * 10_000_000) * (size // 10_000_000)


READ = """
import resource, sys, time
from capfilt.errors import UserError
from capfilt.formats.places import Place
from capfilt.formats.records import open_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    start = time.process_time()
    try:
        faults = [record.fault for record in open_records(Place(path))]
        words = f"{len(faults)} records, {[fault for fault in faults if fault]}"
    except UserError as error:
        words = str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert time.process_time() - start < 10 and grown < 1000, (path, time.process_time() - start, grown)
    print(words)
"""


def test_a_file_that_is_endless_is_one_line_of_words(tmp_path):
    """Would catch: a list from the web that takes all memory, or hours, or ends in a traceback, for it is a bomb."""
    zeros, letters, ends = (repeated(byte, 1_000_000_000) for byte in (b"\0", b"a", b"\n"))
    nulls = pa.ListArray.from_arrays(pa.array([0, 2 * 10**7], pa.int32()), pa.nulls(2 * 10**7))
    good = b"url,caption\nu1,c1\n"
    files = {
        **{f"zeros.{kind}.gz": (zeros, "text") for kind in ("csv", "tsv", "txt", "jsonl", "json")},
        **{f"letters.{kind}": (letters, "longer than|does not begin") for kind in ("csv", "txt", "json")},
        "zeros.parquet.gz": (zeros, "decompress it"),
        "ends.txt": (ends, "empty lines"),
        "late.csv": (gzip.compress(good) + letters, "longer than"),
        "field.csv": (gzip.compress(good + b'u2,"') + letters + gzip.compress(b'"\nu3,c3\n'), "longer than"),
        "open.csv": (gzip.compress(good + b'u2,"') + ends, "empty lines"),
        "wide.csv": (
            gzip.compress(good) + repeated(b"a", 30_000_000) + gzip.compress(b"\nu3,c3"),
            r"3 records, \['the line at byte 18 is longer",
        ),
        "columns.csv": (",".join(map(str, range(1_000_000))).encode(), "has 1000000 columns"),
        "columns.tsv": ("\t".join(map(str, range(1_000_000))).encode(), "has 1000000 columns"),
        "columns.jsonl": (json.dumps(dict.fromkeys(map(str, range(500_000)))).encode(), "has 500000 columns"),
        "deep.json": (b"[" * 1_000_000, "JSON"),
        "deeper.json": (b'[{"a":' * 1_000_000, "JSON"),
        "deep.jsonl": (b'{"a": 1}\n' + b"[" * 1_000_000 + b'\n{"a": 2}', "3 records, .*is not JSON"),
        "digits.jsonl": (b'{"a": 1}\n{"a": ' + b"1" * 1_000_000 + b"}", "2 records, .*is not JSON"),
        "value.json": (gzip.compress(b'["') + letters, "JSON"),
        "nulls.parquet": (pa.table({"url": ["u"], "caption": nulls}), "has 20,000,000 values in"),
        "bytes.parquet": (pa.table({"url": ["u" * 20_000_000]}), "20.* bytes in 1 rows"),
        "columns.parquet": (pa.table({str(n): [n] for n in range(10_001)}), "has 10001 columns"),
    }
    for name, (content, _) in files.items():
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            pq.write_table(content, tmp_path / name, compression="zstd")
    arguments = [sys.executable, "-c", READ, *(str(tmp_path / name) for name in files)]
    ran = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    told = ran.stdout.splitlines()
    assert len(told) == len(files)
    for (name, (_, words)), line in zip(files.items(), told, strict=True):
        assert re.search(words, line), (name, line)
        assert str(tmp_path / name) in line or " records, " in line


def test_an_object_without_fields_is_a_record(tmp_path):
    """Would catch: rows lost, and all after them shifted, for `{}` is as false as an empty line."""
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{}\n\n{"a": 3}\n')
    (tmp_path / "x.json").write_text('[{"a": 1}, {}, {"a": 3}]')
    for name in ("x.jsonl", "x.json"):
        assert [record.fields for record in read(tmp_path / name)[1]] == [{"a": 1}, {}, {"a": 3}]


def test_a_long_field_is_read_in_any_process(tmp_path):
    """Would catch: rows that a worker cannot read, for csv's own limit is set where the list was opened alone."""
    (tmp_path / "x.csv").write_text("a,b\n1," + "x" * 200_000 + "\n")
    records = open_records(Place(str(tmp_path / "x.csv")))
    csv.field_size_limit(131_072)
    assert [len(record.fields["b"]) for record in records] == [200_000]


def test_what_no_text_can_hold_is_told_in_utf16_too(tmp_path):
    """Would catch: half a character of UTF-16, which JavaScript writes, lost without a word, or all rows lost for it."""
    data = "a,b\n1,x\n2,\ud83d\n3,z\n".encode("utf-16", "surrogatepass")
    (tmp_path / "x.csv").write_bytes(data)
    with pytest.warns(RuntimeWarning, match="1 records .*UTF-8"):
        found = list(open_records(Place(str(tmp_path / "x.csv"))))
    assert [record.fields["b"].strip("\ufffd") for record in found] == ["x", "", "z"]
    (tmp_path / "x.csv").write_bytes(data[:-1])
    with refused(tmp_path / "x.csv", "end"):
        list(open_records(Place(str(tmp_path / "x.csv"))))


def test_a_row_of_parquet_that_python_cannot_hold_says_so(tmp_path):
    """Would catch: a traceback for one byte that is not UTF-8, or a time of no calendar, among all rows."""
    texts = pa.array([b"good", b"caf\xe9", b"x", b"y"]).cast(pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 4, texts.buffers())
    times = pa.array([0, 0, 2**62, 0], pa.int64()).cast(pa.timestamp("ms"))
    pq.write_table(pa.table({"text": texts, "time": times}), tmp_path / "x.parquet")
    found = read(tmp_path / "x.parquet")[1]
    assert [record.fault is None for record in found] == [True, False, False, True]
    assert [record.fields.get("text") for record in found] == ["good", None, None, "y"]
    assert [record.number for record in found] == [1, 2, 3, 4]


def test_a_server_that_knows_no_ranges_is_read_past(tmp_path):
    """Would catch: a list that is only read to the end of its first slice."""
    pytest.importorskip("aiohttp")
    (tmp_path / "x.csv").write_text("a\n" + "".join(f"{n}\n" for n in range(5000)))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = read(f"http://127.0.0.1:{server.server_port}/x.csv")[1]
        server.shutdown()
    assert [record.fields["a"] for record in found] == [str(n) for n in range(5000)]
