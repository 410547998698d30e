"""Would catch: a list that loses rows or shifts them, a caption that is not what the list has, a format misread in silence."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.stages.download.lists import open_list
from capfilt.stages.download.presets import Layout, layout
from tests.refusals import refused


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
    with pytest.warns(RuntimeWarning, match=r"u\.txt.*record 4"):
        urls, captions, _, _ = read_all(path)
    assert urls == ["http://a/1,2.jpg", "http://a/3.jpg", "http://a/\ufffd.jpg"]
    assert captions == [[], [], []]


def test_a_line_that_cannot_be_read_is_a_row(tmp_path):
    # A bare carriage return in an unquoted field, and brackets deeper than any parser goes.
    csv, jsonl = tmp_path / "u.csv", tmp_path / "u.jsonl"
    csv.write_bytes(b"url,caption\nu1,a\nu2,b\rc\nu3,d\n")
    urls, _, faults, _ = read_all(csv)
    assert (urls[0], urls[-1]) == ("u1", "u3")
    assert any("is no CSV" in (fault or "") for fault in faults)
    jsonl.write_bytes(b'{"url": "u1", "caption": "a"}\n' + b"[" * 100_000 + b'\n{"url": "u3"}\n')
    urls, _, faults, _ = read_all(jsonl)
    assert urls == ["u1", None, "u3"]
    assert "JSON" in faults[1]


def test_a_row_of_parquet_that_is_no_text_is_a_row(tmp_path):
    """Would catch: a shard that ends in a traceback, and its other rows with it, for one byte that is not UTF-8."""
    captions = pa.array([b"good", b"caf\xe9", b"x", None]).cast(pa.binary())
    captions = pa.Array.from_buffers(pa.string(), 4, captions.buffers())
    pq.write_table(pa.table({"url": ["u1", "u2", "u3", "u4"], "caption": captions}), tmp_path / "u.parquet")
    for rows in (1, 2, 4):
        urls, texts, faults, _ = read_all(tmp_path / "u.parquet", rows=rows)
        assert (urls, texts) == (["u1", None, "u3", "u4"], [["good"], [], ["x"], []])
        assert [fault is None for fault in faults] == [True, False, True, True]


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
        ("u.json", b'{"url": 1}', "column caption"),
        ("u.json", b'"url"', "begin"),
        ("u.json", b"[", "JSON"),
        ("u.json", b"[]", "empty"),
        ("u.json", b'[{"url": "u", "caption": "c"}', "JSON"),
        ("u.json", b'[{"url": "u", "caption": "c"}] 3', "more end"),
        ("u.json", b'[{"url": "u", "caption": "c"} {}]', "neither , ]"),
        ("u.json", b"\xff\xfe[\0", "JSON"),
        ("u.txt", b"\n", "empty"),
        ("u.jsonl", b"", "empty"),
        ("u.jsonl", b"<html>\n", "JSON"),
        ("u.csv", b"", "empty"),
        ("u.parquet", b"PAR1 no", "Parquet"),
        ("u.list", b"http://a\n", "--input-format"),
    ],
)
def test_a_broken_list_is_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with refused(tmp_path / name, words):
        open_list(str(tmp_path / name), "auto", Layout(), (), 10)


def test_a_quote_left_open_takes_no_other_line_along(tmp_path):
    """Would catch: an unclosed quote that makes all lines up to the next quote one caption, and no word about it."""
    path = tmp_path / "u.csv"
    lines = [
        'http://a/0,"two\nlines",x',
        'http://a/1,"open,x',  # the next quote opens another field
        "http://a/2,b,x",
        'http://a/3,"c, d",x',
        'http://a/4,"open,x',  # the next quote stands at the end of a field
        "http://a/5,b,x",
        'http://a/6,b,5"',
        'http://a/7,"quoted" and not,x',
        'http://a/8,"open to the end,x',
        "http://a/9,b,x",
    ]
    path.write_text("url,caption,n\n" + "\n".join(lines))
    for rows in (1, 3, 100):
        urls, captions, faults, _ = read_all(path, rows=rows)
        found = [n for n, fault in enumerate(faults) if fault is None]
        assert found == [0, 2, 3, 5, 6, 7, 9]
        assert [urls[n] for n in found] == [f"http://a/{n}" for n in found]
        assert (captions[0], captions[3], captions[7]) == (["two\nlines"], ["c, d"], ["quoted and not"])
        assert all("opens a quote and does not close it" in faults[n] for n in (1, 4, 8))
        offset = path.read_bytes().index(b"http://a/4")
        assert f"at byte {offset} " in faults[4]
    path.write_text('url,"caption\nhttp://a/1,b\n')
    with refused(path, "quote"):
        open_list(str(path), "auto", Layout(), (), 10)


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


# -- published layouts, folders, URLs ----------------------------------------------------------------------------------


def opened(path, preset="", rows=2, url_col="url", caption_col="caption"):
    listing = pickle.loads(
        pickle.dumps(open_list(str(path), "auto", layout(preset, url_col, caption_col), (), rows))
    )
    slices = [listing.read(number) for number in range(listing.slices)]
    assert [listing.bounds(n)[1] - listing.bounds(n)[0] for n in range(listing.slices)] == [
        len(each.urls) for each in slices
    ]
    pairs = [pair for each in slices for pair in zip(each.urls, each.captions, strict=True)]
    return listing, pairs, slices


def test_presets_are_the_published_layouts(tmp_path):
    laion = tmp_path / "laion.parquet"
    columns = {
        "SAMPLE_ID": [1.0],
        "URL": ["u"],
        "TEXT": ["t"],
        "WIDTH": [3],
        "LICENSE": ["?"],
        "punsafe": [0.1],
    }
    pq.write_table(pa.table(columns), laion)
    _listing, pairs, slices = opened(laion, "laion")
    assert pairs == [("u", ["t"])]
    assert slices[0].extra.column_names == ["SAMPLE_ID", "punsafe", "LICENSE"]
    pq.write_table(
        pa.table({"uid": ["x"], "url": ["u"], "text": ["t"], "sha256": ["0"]}), tmp_path / "d.parquet"
    )
    assert opened(tmp_path / "d.parquet", "datacomp")[1] == [("u", ["t"])]
    (tmp_path / "cc3m.tsv").write_text('a "quoted" text\thttp://a\nother\thttp://b\n')
    assert opened(tmp_path / "cc3m.tsv", "cc3m")[1] == [
        ("http://a", ['a "quoted" text']),
        ("http://b", ["other"]),
    ]
    (tmp_path / "cc12m.tsv").write_text("http://a\tone\nhttp://b\ttwo\nhttp://c\tthree\n")
    assert [url for url, _ in opened(tmp_path / "cc12m.tsv", "cc12m")[1]] == [
        "http://a",
        "http://b",
        "http://c",
    ]
    # Many put the missing line in front.
    (tmp_path / "named.tsv").write_text("caption\turl\none\thttp://a\n")
    assert opened(tmp_path / "named.tsv", "cc12m")[1] == [("http://a", ["one"])]
    assert opened(tmp_path / "named.tsv", "cc12m", caption_col="")[1] == [("http://a", [])]
    # What is given by name wins.
    assert opened(laion, "laion", caption_col="LICENSE")[1] == [("u", ["?"])]
    with refused("--preset laion"):
        opened(laion, url_col="link")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("URL", "TEXT"), ("URL", "TEXT")),
        (("Url", "Caption"), ("Url", "Caption")),
        (("url", "text", "TEXT"), ("url", "text")),
        (("URL", "text", "caption"), ("URL", "caption")),
        (("url", "Texts"), ("url", "Texts")),
        (("URL", "Url", "caption"), None),
        (("url", "TEXT", "Text"), None),
        (("link", "caption"), None),
    ],
)
def test_columns_are_found_in_any_case_where_one_is_meant(tmp_path, names, found):
    """Would catch: LAION's own lists refused for their capitals; of two columns that could be meant, the wrong one."""
    row = {name: f"http://{name}" for name in names}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "u.parquet")
    (tmp_path / "u.jsonl").write_text(json.dumps(row))
    (tmp_path / "u.csv").write_text(", ".join(names) + "\n" + ",".join(row.values()))
    for name in ("u.parquet", "u.jsonl", "u.csv"):
        if found is None:
            with refused(name, "column"):
                opened(tmp_path / name)
        else:
            assert opened(tmp_path / name)[1] == [(f"http://{found[0]}", [f"http://{found[1]}"])]


def test_ids_and_captions_may_be_numbers(tmp_path):
    """Would catch: a caption of 7, or an id that is a number in one list and a text in another, lost or refused."""
    (tmp_path / "a.csv").write_text("id,url,caption\n1,u1,7\n")
    (tmp_path / "b.jsonl").write_text(
        '{"id": 2, "url": "u2", "caption": 7.5}\n{"id": "c", "url": 3, "caption": [8]}\n'
    )
    pq.write_table(pa.table({"id": [4], "url": ["u4"], "caption": [7]}), tmp_path / "c.parquet")
    listing = open_list(str(tmp_path), "auto", Layout(), ("id",), 10)
    slices = [listing.read(number) for number in range(listing.slices)]
    assert [url for each in slices for url in each.urls] == ["u1", "u2", "3", "u4"]
    assert [texts for each in slices for texts in each.captions] == [["7"], ["7.5"], ["8"], ["7"]]
    assert pa.concat_tables(each.extra for each in slices)["id"].to_pylist() == ["1", "2", "c", "4"]


@pytest.mark.parametrize(
    "compress", [bytes, gzip.compress, lambda data: pa.Codec("zstd").compress(data, asbytes=True)]
)
@pytest.mark.parametrize("name", ["u.csv", "u.tsv", "u.txt", "u.json", "u.jsonl", "u.parquet"])
def test_slices_of_any_list_are_read_in_any_order(tmp_path, name, compress):
    """Would catch: rows of another slice where a file that cannot go back is asked for an earlier one."""
    rows = [{"url": f"http://a/{n}", "caption": f"t{n}"} for n in range(1000)]
    path = tmp_path / f"{name}.gz"
    if name == "u.parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=300)
        data = sink.getvalue().to_pybytes()
    else:
        data = {
            "u.csv": "url,caption\n" + "".join(f"{row['url']},{row['caption']}\n" for row in rows),
            "u.tsv": "url\tcaption\n" + "".join(f"{row['url']}\t{row['caption']}\n" for row in rows),
            "u.txt": "".join(f"{row['url']}\n" for row in rows),
            "u.json": json.dumps(rows),
            "u.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        }[name].encode()
    path.write_bytes(compress(data))
    listing = open_list(str(path), "auto", Layout(), (), 7)
    assert (listing.rows, listing.slices) == (1000, 143)
    numbers = [0, 1, 2, 40, 41, 43, 44, 142, 3, 3, 139, 0, *range(140, 143)]
    for number in numbers:
        found = listing.read(number)
        expected = rows[number * 7 : number * 7 + 7]
        assert found.urls == [row["url"] for row in expected]
        assert found.captions == [[row["caption"]] if name != "u.txt" else [] for row in expected]
    # By --input-format too, whatever the name.
    path = path.rename(tmp_path / "list")
    assert open_list(str(path), name.partition(".")[2], Layout(), (), 7).read(5).urls[0] == "http://a/35"


def test_a_folder_is_its_lists_one_after_the_other(tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    (folder / "b.csv").write_text("url,caption\n" + "".join(f"b.csv{n},t\n" for n in range(3)))
    with gzip.open(folder / "a.csv.gz", "wt") as file:
        file.write("url,caption\n" + "".join(f"a.csv{n},t\n" for n in range(5)))
    for name in ("_SUCCESS.csv", ".hidden.csv", "README.md"):
        (folder / name).write_text("no list")
    listing, pairs, slices = opened(folder)
    assert [url for url, _ in pairs] == [*(f"a.csv{n}" for n in range(5)), *(f"b.csv{n}" for n in range(3))]
    assert [len(each.urls) for each in slices] == [2, 2, 1, 2, 1]
    before = listing.digest
    (folder / "b.csv").write_text("url,caption\nx,t\n")
    assert opened(folder)[0].digest != before
    with refused(tmp_path, "list"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a.jsonl"])
def test_an_empty_list_of_a_folder_is_left_out_and_said_to_be(tmp_path, name):
    """Would catch: a crawl of a thousand lists that one empty shard of it refuses; columns lost for it."""
    (tmp_path / name).write_text("\n")
    (tmp_path / "b.csv").write_text("url,caption,n\nu1,t,1\n")
    with pytest.warns(RuntimeWarning, match=rf"1 of 2 lists.*{name}"):
        listing = open_list(str(tmp_path), "auto", Layout(carried=("n",)), (), 2)
    assert listing.read(0).urls == ["u1"]
    assert listing.extra == ("n",)
    (tmp_path / "b.csv").unlink()
    with refused(tmp_path, "empty"):
        open_list(str(tmp_path), "auto", Layout(), (), 2)
    (tmp_path / "b.csv").write_text("")
    with refused(tmp_path, "2 lists", "URLs"):
        open_list(str(tmp_path), "auto", Layout(), (), 2)


def test_a_column_of_a_folder_has_one_type(tmp_path):
    """Would catch: shards of one part whose columns differ, for a file has numbers where another has words."""
    pq.write_table(
        pa.table({
            "url": ["u1"], "caption": ["t"], "n": [2**60], "w": pa.array([1], pa.int32()),
            "f": pa.array([0.1], pa.float32()), "l": [[1, 2]], "d": pa.array(["x"]).dictionary_encode(),
        }),
        tmp_path / "a.parquet",
    )  # fmt: skip
    pq.write_table(
        pa.table({
            "url": ["u2"], "caption": ["t"], "n": ["two"], "w": [2**40], "f": [0.5], "l": ["z"], "d": ["y"],
        }),
        tmp_path / "b.parquet",
    )  # fmt: skip
    (tmp_path / "c.jsonl").write_text(
        '{"url": "u3", "caption": "t", "n": 3, "w": 4, "f": 1.5, "l": true, "d": "z"}\n'
    )
    listing = pickle.loads(
        pickle.dumps(open_list(str(tmp_path), "auto", Layout(), ("n", "w", "f", "l", "d"), 2))
    )
    table = pa.concat_tables(listing.read(number).extra for number in range(listing.slices))
    assert table["n"].to_pylist() == [str(2**60), "two", "3"]
    assert (table.schema.field("w").type, table["w"].to_pylist()) == (pa.int64(), [1, 2**40, 4])
    assert table.schema.field("f").type == pa.float64()
    assert table["l"].to_pylist() == ["[1, 2]", "z", "true"]
    assert table["d"].to_pylist() == ["x", "y", "z"]


def test_a_json_array_is_read_in_pieces(tmp_path):
    """Would catch: a list of gigabytes read whole; values cut where a piece of it ends."""
    rows = [
        {"url": f"http://a/{n}", "caption": "日本🙂" * (n % 50), "n": n, "deep": [{"x": ["]", '"\\\\,']}]}
        for n in range(20_000)
    ]
    path = tmp_path / "u.json"
    path.write_text("\ufeff" + json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    size = path.stat().st_size
    assert size > 5_000_000
    tracemalloc.start()
    listing = open_list(str(path), "auto", Layout(), ("n",), 1000)
    assert listing.rows == len(rows)
    pieces = []
    for number in (13, 0, 19):
        found = listing.read(number)
        pieces.append(
            (found.urls == [row["url"] for row in rows[number * 1000 :][:1000]], found.extra["n"][0].as_py())
        )
        assert found.captions[7] == [rows[number * 1000 + 7]["caption"]]
        del found
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pieces == [(True, 13_000), (True, 0), (True, 19_000)]
    assert peak < size / 2


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5)),
    st.integers(1, 9),
)
def test_a_json_array_of_anything_is_its_values(tmp_path_factory, values, window):
    """Independent reader: json. Numbers, texts and brackets are cut at every place by so small a window."""
    path = tmp_path_factory.mktemp("json") / "u.json"
    rows = [
        {"url": "u", "caption": "c"},
        *({"url": json.dumps(value), "caption": "c"} for value in values),
        *values,
    ]
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capfilt.formats.records._WINDOW", window)
        urls, _, faults, _ = read_all(path, rows=2)
    assert urls == [row["url"] if isinstance(row, dict) else None for row in rows]
    assert [fault is None for fault in faults] == [isinstance(row, dict) for row in rows]


@pytest.mark.parametrize("name", ["u.txt", "u.csv", "u.jsonl", "u.parquet", "u.json"])
def test_a_list_behind_a_url_is_read_the_same(tmp_path, name):
    pytest.importorskip("fsspec")
    plain = tmp_path / name
    rows = [{"url": f"http://a/{n}", "caption": f"t{n}"} for n in range(5)]
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), plain, row_group_size=2)
    else:
        text = {
            ".txt": "\n".join(row["url"] for row in rows),
            ".csv": "url,caption\n" + "\n".join(f"{row['url']},{row['caption']}" for row in rows),
            ".jsonl": "\n".join(json.dumps(row) for row in rows),
            ".json": json.dumps(rows),
        }[plain.suffix]
        plain.write_text(text)
    local, remote = opened(plain), opened(f"file://{plain}")
    assert remote[1] == local[1]
    assert remote[0].digest == local[0].digest
    with refused(f"{plain}.gone", "list"):
        opened(f"file://{plain}.gone")


@pytest.mark.parametrize("twice", ["url", "caption", "license", "other"])
def test_a_parquet_list_with_one_column_twice_is_refused_by_name(tmp_path, twice):
    """Which of two columns of one name is meant nobody can tell; Arrow's own error told of neither file nor cure."""
    columns = {"url": ["http://a/1.jpg"], "caption": ["a"], "license": ["x"], "other": [1]}
    table = pa.table(columns).append_column(twice, pa.array(columns[twice]))
    pq.write_table(table, tmp_path / "u.parquet")
    with refused("u.parquet", "twice", twice):
        open_list(str(tmp_path / "u.parquet"), "auto", Layout(), ("license",), 2)
