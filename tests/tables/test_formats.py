"""Would catch: a picture without a row, a text of another picture, a file name that leads out of its folder, a cut tar
that passes for whole, two pictures with one key, a pickled tar member being loaded.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import string
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capfilt.errors import UserError
from capfilt.tables.contracts import FAILURES, SPLITS, STATUSES
from capfilt.tables.formats import (
    REST,
    Reading,
    SourceRow,
    arrow_column,
    failure_in_words,
    open_source,
    read_file,
    safe_join,
    storable,
)


def listed(path, format="auto", **reading) -> list[SourceRow]:
    """Every row, through the pickling that takes a source to its workers; whatever the shard size, the same."""
    source = pickle.loads(pickle.dumps(open_source(str(path), format, Reading(**reading))))
    rows = [row for shard in range(source.shard_count()) for row in source.rows(shard)]
    assert len(rows) == sum(source.count(shard) for shard in range(source.shard_count()))
    assert len({row.key for row in rows}) == len(rows)
    for row in rows:
        assert row.status in STATUSES
        assert (row.failure in FAILURES) if row.status != "success" else row.failure is None
        assert row.split is None or row.split in SPLITS
    return rows


def write_json(path: Path, value) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_tar(path: Path, members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


COCO = {
    "licenses": [{"id": 4, "name": "CC BY"}],
    "images": [
        {"id": 7, "file_name": "b.jpg", "license": 4, "split": "restval", "place": {"x": 1}},
        {"id": 3, "file_name": "a.jpg", "split": "dev", "place": None},
        {"id": 5, "file_name": "sub/../../secret.jpg"},
        {"id": 6, "file_name": "/etc/passwd"},
        {"id": 8, "file_name": "a.jpg", "split": "nowhere"},
        {"id": 9},
        "not an object",
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "caption": " second? no: first "},
        {"id": 2, "image_id": 7, "caption": "a \ud83d"},
        {"id": 3, "image_id": 3, "caption": ""},
        {"id": 4, "image_id": 99, "caption": "of nothing"},
        {"id": 5, "image_id": [1], "caption": "of a list"},
        {"id": 6, "image_id": 3},
    ],
}


def test_coco_has_a_row_per_image_and_texts_in_order(tmp_path):
    rows = listed(write_json(tmp_path / "captions.json", COCO), extra=("place",))
    assert [(row.key, row.captions, row.split, row.license) for row in rows] == [
        ("b.jpg", ("a \ufffd",), "train", "CC BY"),
        ("a.jpg", (" second? no: first ", ""), "val", None),
        ("sub/../../secret.jpg", (), None, None),
        ("/etc/passwd", (), None, None),
        ("a.jpg#2", (), None, None),
        ("#5", (), None, None),
        ("#6", (), None, None),
        ("#99", ("of nothing",), None, None),
        ("#[1]", ("of a list",), None, None),
    ]
    assert [row.file for row in rows] == [
        tmp_path / "b.jpg",
        tmp_path / "a.jpg",
        None,
        None,
        tmp_path / "a.jpg",
        *[None] * 4,
    ]
    assert {row.failure for row in rows if row.file is None} == {"file_missing"}
    assert rows[0].extra == {"place": {"x": 1}}


def test_pictures_are_beside_the_file_in_images_or_where_it_is_said(tmp_path):
    path = write_json(tmp_path / "captions.json", COCO)
    (tmp_path / "images").mkdir()
    assert listed(path)[0].file == tmp_path / "images" / "b.jpg"
    assert listed(path, images=tmp_path)[0].file == tmp_path / "b.jpg"


def test_splits_limits_and_shards_cut_the_same_list(tmp_path):
    images = [
        {"id": i, "file_name": f"{i}.jpg", "split": ("train", "val", "test", None)[i % 4]} for i in range(23)
    ]
    path = write_json(tmp_path / "captions.json", {"images": images, "annotations": []})
    assert [row.key for row in listed(path, shard_size=5)] == [f"{i}.jpg" for i in range(23)]
    assert [row.key for row in listed(path, shard_size=2, splits=("val",), limit=3)] == [
        "1.jpg",
        "5.jpg",
        "9.jpg",
    ]
    assert {row.split for row in listed(path, split="test")} == {"train", "val", "test"}
    assert len(listed(path, split="test", splits=("test",))) == 6 + 5


def test_karpathy(tmp_path):
    for folder in ("val2014", "flat"):
        (tmp_path / "images" / folder).mkdir(parents=True)
    data = {
        "dataset": "coco",
        "images": [
            {
                "filepath": "val2014",
                "filename": "COCO_val2014_1.jpg",
                "split": "restval",
                "cocoid": 1,
                "sentences": [{"raw": "A dog.", "tokens": ["a", "dog"]}, {"raw": "Two dogs."}],
            },
            {"filepath": "gone", "filename": "2.jpg", "split": "test", "sentences": []},
            {"filename": "3.jpg", "split": "val", "sentences": [{"raw": None}, {}]},
            {"filepath": "..", "filename": "4.jpg", "sentences": [{"raw": "out"}]},
        ],
    }
    rows = listed(write_json(tmp_path / "dataset_coco.json", data))
    assert [(row.key, row.split, row.captions) for row in rows] == [
        ("val2014/COCO_val2014_1.jpg", "train", ("A dog.", "Two dogs.")),
        ("gone/2.jpg", "test", ()),
        ("3.jpg", "val", ()),
        ("../4.jpg", None, ("out",)),
    ]
    images = tmp_path / "images"
    assert [row.file for row in rows] == [
        images / "val2014" / "COCO_val2014_1.jpg",
        images / "2.jpg",
        images / "3.jpg",
        None,
    ]


@pytest.mark.parametrize(
    ("content", "format", "words"),
    [
        ("{", "auto", "is not JSON"),
        ("[1, 2]", "auto", "no list `images`"),
        ("[" * 100_000, "auto", "is not JSON"),
        ('{"images": []}', "auto", "neither `annotations`"),
        ('{"images": [], "annotations": []}', "auto", "has no pictures"),
        ('{"images": [{"id": 1}], "annotations": [{"image_id": 1, "bbox": []}]}', "auto", "no `caption`"),
        ('{"images": [{"sentences": []}]}', "coco", "--format karpathy"),
        ('{"images": [{"id": 1}], "annotations": []}', "karpathy", "--format coco"),
        (
            '{"images": [{"id": 1, "file_name": "x", "split": "val"}], "annotations": []}',
            "no such",
            "--format 'no such'",
        ),
    ],
)
def test_a_broken_annotation_file_is_named(tmp_path, content, format, words):
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        listed(path, format)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value) or "--format" in str(caught.value)


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def test_a_folder_with_sidecars(tmp_path):
    touch(
        tmp_path,
        "train/b.jpg",
        "train/a.JPEG",
        "val/sub/c.png",
        "d.webp",
        ".hidden/x.jpg",
        ".y.jpg",
        "notes.md",
    )
    (tmp_path / "train/b.txt").write_bytes(b"\xef\xbb\xbffirst \r\n\n second\n")
    (tmp_path / "d.txt").write_text("")
    rows = listed(tmp_path)
    assert [(row.key, row.captions, row.split) for row in rows] == [
        ("d.webp", (), None),
        ("train/a.JPEG", (), "train"),
        ("train/b.jpg", ("first ", " second"), "train"),
        ("val/sub/c.png", (), "val"),
    ]
    assert [row.file for row in rows] == [tmp_path / row.key for row in rows]


METADATA = [
    {"file_name": "b.jpg", "text": 'say "b",\nthen', "alt": "", "n": 1, "license": "CC0"},
    {"file_name": "./a.jpg", "text": "first a", "alt": "alt a", "n": 2, "license": None},
    {"file_name": "a.jpg", "text": "second a", "alt": "", "n": 3, "license": None},
    {"file_name": "../out.jpg", "text": "out", "alt": "", "n": 4, "license": None},
]


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata(tmp_path, suffix):
    touch(tmp_path, "a.jpg", "b.jpg", "unnamed.jpg")
    path = tmp_path / f"metadata.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(METADATA), path)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in METADATA))
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(METADATA[0]))
            writer.writeheader()
            writer.writerows(METADATA)
    expected = {
        "b.jpg": ('say "b",\nthen',),
        "a.jpg": ("first a", "second a"),
        "../out.jpg": ("out",),
        "unnamed.jpg": (),
    }
    assert {row.key: row.captions for row in listed(tmp_path)} == expected
    rows = listed(tmp_path, caption_cols=("text", "alt"), extra=("n",))
    assert {row.key: row.captions for row in rows} == expected | {"a.jpg": ("first a", "alt a", "second a")}
    assert [row.extra["n"] for row in rows] == (["1", "2", "4", None] if suffix == "csv" else [1, 2, 4, None])
    # The table alone, named as the source: pictures it does not name are no rows.
    assert [row.key for row in listed(path)] == ["b.jpg", "a.jpg", "../out.jpg"]
    assert rows[0].license == "CC0"


def test_a_tsv_does_not_quote(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('file_name\tcaption\na.jpg\t"Quoted" she said\n')
    assert listed(path)[0].captions == ('"Quoted" she said',)


@pytest.mark.parametrize(
    ("name", "content", "reading", "words"),
    [
        ("metadata.csv", "a,b\n1,2\n", {}, "--image-col"),
        ("metadata.csv", "file_name,b\n1,2\n", {"caption_cols": ("c",)}, "--caption-col"),
        ("metadata.csv", "file_name,b\n1,2\n", {"extra": ("c",)}, "--save-additional-columns"),
        ("metadata.jsonl", '{"file_name": "a"}\n{\n', {}, "line 2 is not JSON"),
        ("metadata.jsonl", "[]\n", {}, "line 1 is not a JSON object"),
        ("metadata.parquet", "PAR1", {}, "is not a whole Parquet file"),
    ],
)
def test_broken_metadata_is_named(tmp_path, name, content, reading, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        listed(tmp_path, **reading)
    assert str(tmp_path / name) in str(caught.value)


# -- img2dataset and tars -------------------------------------------------------------------------------------------

RECORDS = [
    {"key": "000000001", "url": "u1", "caption": "one", "status": "success", "error_message": None},
    {
        "key": "000000000",
        "url": "u0",
        "caption": None,
        "status": "failed_to_download",
        "error_message": "HTTP Error 404: x",
    },
    {"key": "000000002", "url": "u2", "caption": "two", "status": "success", "error_message": None},
    {
        "key": "000000003",
        "url": "u3",
        "caption": "",
        "status": "failed_to_resize",
        "error_message": "image too small",
    },
]
for _record in RECORDS:
    _good = _record["status"] == "success"
    _record |= {
        "width": 8 if _good else None,
        "original_width": 80 if _good else None,
        "original_height": 60 if _good else None,
    }
    _record["sha256"] = "ab" * 32 if _good else None
EXPECTED = [
    ("000000001", ("one",), None, b"picture 000000001"),
    ("000000000", (), "not_found", None),
    ("000000002", ("two",), None, b"picture 000000002"),
    ("000000003", ("",), "too_small", None),
]


@pytest.mark.parametrize("output", ["parquet", "webdataset", "files"])
def test_the_three_outputs_of_img2dataset(tmp_path, output):
    """The layouts are its writer's: failed rows are in the Parquet file only, in the order they ended."""
    good = [record["key"] for record in RECORDS if record["status"] == "success"]
    records = RECORDS
    if output == "parquet":
        records = [
            {**r, "jpg": f"picture {r['key']}".encode() if r["key"] in good else None} for r in RECORDS
        ]
    elif output == "webdataset":
        members = [
            (f"{key}.{ext}", f"picture {key}".encode()) for key in reversed(good) for ext in ("json", "jpg")
        ]
        write_tar(tmp_path / "00000.tar", members)
    else:
        for key in good:
            touch(tmp_path / "00000", f"{key}.jpg")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "_tmp").mkdir()
    rows = listed(tmp_path)
    pictures = [
        row.picture if row.picture is not None or row.file is None else b"picture " + row.key.encode()
        for row in rows
    ]
    assert [(row.key, row.captions, row.failure) for row in rows] == [expected[:3] for expected in EXPECTED]
    assert pictures == [expected[3] for expected in EXPECTED]
    assert [row.file for row in rows if row.file] == (
        [tmp_path / "00000" / f"{k}.jpg" for k in good] if output == "files" else []
    )
    assert (rows[0].url, rows[0].original_width, rows[0].sha256) == ("u1", 80, "ab" * 32)
    assert len(listed(tmp_path, limit=3)) == 3


def test_a_picture_that_is_not_there_is_a_row(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "00000.parquet")
    write_tar(tmp_path / "00000.tar", [("000000002.jpg", b"2")])
    assert [row.failure for row in listed(tmp_path)] == ["file_missing", "not_found", None, "too_small"]
    (tmp_path / "00000.tar").write_bytes(b"")
    assert [row.failure for row in listed(tmp_path)] == ["truncated", "not_found", "truncated", "too_small"]


def test_a_parquet_file_of_the_hugging_face_kind(tmp_path):
    records = [{"image": {"bytes": b"x", "path": None}, "text": ["a", "b"]}, {"image": None, "text": None}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "train-00000-of-00001.parquet")
    rows = listed(tmp_path)
    assert [(row.key, row.captions, row.picture, row.failure) for row in rows] == [
        ("train-00000-of-00001/000000", ("a", "b"), b"x", None),
        ("train-00000-of-00001/000001", (), None, "file_missing"),
    ]


@pytest.mark.parametrize(
    ("status", "message", "failure"),
    [
        # As img2dataset 1.47 words them.
        ("failed_to_download", "HTTP Error 404: Not Found", "not_found"),
        ("failed_to_download", "HTTP Error 410: Gone", "not_found"),
        ("failed_to_download", "HTTP Error 403: Forbidden", "http_error"),
        ("failed_to_download", "HTTP Error 429: Too Many Requests", "rate_limited"),
        (
            "failed_to_download",
            "HTTP Error 302: The HTTP server returned a redirect error that ...",
            "too_many_redirects",
        ),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", "dns"),
        ("failed_to_download", "<urlopen error [Errno -3] Temporary failure in name resolution>", "dns"),
        ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", "connection"),
        ("failed_to_download", "<urlopen error timed out>", "timeout"),
        ("failed_to_download", "The read operation timed out", "timeout"),
        ("failed_to_download", "unknown url type: 'x'", "bad_url"),
        ("failed_to_download", "'NoneType' object has no attribute 'timeout'", "bad_url"),
        ("failed_to_download", "IncompleteRead(100 bytes read, 20 more expected)", "truncated"),
        ("failed_to_download", "Use of image disallowed by X-Robots-Tag directive", "opted_out"),
        ("failed_to_download", "hash mismatch", "hash_mismatch"),
        ("failed_to_resize", "Image decoding error", "decode_error"),
        ("failed_to_resize", "image too small", "too_small"),
        ("failed_to_resize", "aspect ratio too large", "bad_aspect_ratio"),
        ("failed_to_resize", "image area too large", "too_many_pixels"),
        ("failed_to_resize", None, "decode_error"),
    ],
)
def test_the_words_of_img2dataset_are_understood(status, message, failure):
    assert failure_in_words(status, message) == failure


class Explodes:
    """Were this ever unpickled, the test would not end well."""

    def __reduce__(self):
        return (os._exit, (99,))


def test_tars_of_other_tools(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x.jpg", b"X"),
            ("sub/y.seg.png", b"mask"),
            ("x.pyd", pickle.dumps(Explodes())),
            ("sub/y.png", b"Y"),
            ("x.txt", "a tëxt\n".encode()),  # not side by side with its picture
            ("z.json", json.dumps({"caption": "z", "url": "http://z", "n": 1}).encode()),
            ("z.JPG", b"Z"),
            ("w.json", b"{"),
            ("w.jpg", b"W"),
            ("v.txt", b"no picture"),
            ("x.jpg", b"X again"),
        ],
    )
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        for name, kind in (
            ("link.jpg", tarfile.SYMTYPE),
            ("hard.jpg", tarfile.LNKTYPE),
            ("pipe.jpg", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    write_tar(tmp_path / "b.tar", [("x.jpg", b"other X"), ("../../up.jpg", b"up")])
    write_tar(tmp_path / "c.tar", [("c0001.jpg", b"C")])
    rows = listed(tmp_path, extra=("n",))
    assert [(row.key, row.captions, row.picture, row.failure) for row in rows] == [
        ("a/x", ("a tëxt\n",), b"X again", None),
        ("a/sub/y", (), b"Y", None),
        ("a/z", ("z",), b"Z", None),
        ("a/w", (), None, "decode_error"),
        ("a/v", ("no picture",), None, "file_missing"),
        ("b/x", (), b"other X", None),
        ("b/../../up", (), b"up", None),
        ("c0001", (), b"C", None),
    ]
    assert rows[2].url == "http://z"
    assert [row.extra["n"] for row in rows] == [None, None, 1, *[None] * 5]
    assert [row.key for row in listed(tmp_path / "b.tar", "webdataset")] == ["b/x", "b/../../up"]


def test_a_tar_cut_anywhere_keeps_what_is_whole_and_says_so(tmp_path):
    members = [(f"{i}.jpg", bytes([65 + i]) * 700) for i in range(4)]
    whole = write_tar(tmp_path / "t.tar", members).read_bytes()
    for cut in [*range(0, 4 * 1536, 97), 512, 1536, 3 * 1536]:
        (tmp_path / "t.tar").write_bytes(whole[:cut])
        rows = listed(tmp_path)
        good = [row for row in rows if row.failure is None]
        assert [(row.key, row.picture) for row in good] == [
            (f"t/{i}", data) for i, (_, data) in enumerate(members[: len(good)])
        ]
        assert {row.failure for row in rows[len(good) :]} == {"truncated"}
        assert rows[-1].key == f"t/{REST}"


def test_sources_are_told_apart_and_the_rest_is_named(tmp_path):
    for path, words in (
        ("nowhere", "no such file"),
        ("s3://bucket/x", "shared file system"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(path, "auto", Reading())
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match="give --format"):
        open_source(str(tmp_path / "x.zip"), "auto", Reading())
    with pytest.raises(UserError, match="--images"):
        open_source(str(tmp_path), "folder", Reading(images=tmp_path / "gone"))
    with pytest.raises(UserError, match=r"has no \.tar files"):
        open_source(str(tmp_path), "webdataset", Reading())
    write_tar(tmp_path / "t.tar", [("a.jpg", b"A")])
    with pytest.raises(UserError, match="give --split"):
        open_source(str(tmp_path), "webdataset", Reading(splits=("train",)))
    assert listed(tmp_path, split="val")[0].split == "val"


def test_a_digest_changes_with_what_is_listed(tmp_path):
    touch(tmp_path, "a.jpg")

    def digest():
        return open_source(str(tmp_path), "folder", Reading()).digest()

    first = digest()
    assert digest() == first
    touch(tmp_path, "b.jpg")
    second = digest()
    (tmp_path / "b.jpg").write_bytes(b"longer than before")
    assert len({first, second, digest()}) == 3


# -- values ---------------------------------------------------------------------------------------------------------

NAMES = st.text(st.sampled_from(string.ascii_letters + "./\\ \0é"), max_size=12)


@settings(deadline=None)
@given(NAMES)
def test_no_name_leads_out_of_its_folder(name):
    root = Path("/folder/of/pictures")
    joined = safe_join(root, name)
    if joined is not None:
        normal = os.path.normpath(joined)
        assert normal.startswith(f"{root}/")


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "big.jpg").write_bytes(b"12345")
    assert read_file(tmp_path / "pipe.jpg")[0] == "file_missing"
    assert read_file(tmp_path)[0] == "file_missing"
    assert read_file(tmp_path / "gone.jpg")[0] == "file_missing"
    assert read_file(tmp_path / "\ud800.jpg")[0] == "file_missing"
    assert read_file(Path("/dev/zero"))[0] == "file_missing"
    assert read_file(tmp_path / "big.jpg", most=4)[0] == "too_large"
    assert read_file(tmp_path / "big.jpg", most=5) == b"12345"


@given(st.text())
def test_storable_text_is_the_text_but_for_lone_surrogates(text):
    result = storable(text)
    assert pa.array([result])[0].as_py() == result
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert result == text


@given(
    st.lists(
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            st.text(),
            st.lists(st.integers()),
        )
    )
)
def test_a_column_of_any_json_values_has_one_type(values):
    from capfilt.tables.formats import ColumnTypes

    types = ColumnTypes(["x"])
    for value in values:
        types.notice({"x": value})
    array = arrow_column(values, types.types()["x"])
    assert [value is None for value in array.to_pylist()] == [value is None for value in values]
