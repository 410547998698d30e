"""Would catch: a failed row that is lost, a picture that is not there taken for one, words misread."""

from __future__ import annotations

import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.formats.img2dataset import failure_in_words
from tests.formats.sources import listed, touch, write_tar
from tests.refusals import refused

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


@pytest.mark.parametrize("output", ["parquet", "webdataset", "compressed", "files"])
def test_the_three_outputs_of_img2dataset(tmp_path, output):
    """The layouts are its writer's: failed rows are in the Parquet file only, in the order they ended."""
    good = [record["key"] for record in RECORDS if record["status"] == "success"]
    records = RECORDS
    if output == "parquet":
        records = [
            {**r, "jpg": f"picture {r['key']}".encode() if r["key"] in good else None} for r in RECORDS
        ]
    elif output in ("webdataset", "compressed"):
        members = [
            (f"{key}.{ext}", f"picture {key}".encode()) for key in reversed(good) for ext in ("json", "jpg")
        ]
        write_tar(tmp_path / "00000.tar", members)
        if output == "compressed":
            (tmp_path / "00000.tgz").write_bytes(gzip.compress((tmp_path / "00000.tar").read_bytes()))
            (tmp_path / "00000.tar").unlink()
    else:
        for key in good:
            touch(tmp_path / "00000", f"{key}.jpg")
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    (tmp_path / "_tmp").mkdir()
    rows = listed(tmp_path, save_additional_columns=("width",))
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
    assert [row.extra["width"] for row in rows] == [8, None, 8, None]
    assert len(listed(tmp_path, limit=3)) == 3


def test_a_picture_that_is_not_there_is_a_row(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "00000.parquet")
    write_tar(tmp_path / "00000.tar", [("000000002.jpg", b"2")])
    assert [row.failure for row in listed(tmp_path)] == ["file_missing", "not_found", None, "too_small"]
    (tmp_path / "00000.tar").write_bytes(b"")
    assert [row.failure for row in listed(tmp_path)] == ["truncated", "not_found", "truncated", "too_small"]


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


def test_links_beside_a_shard_lead_nowhere(tmp_path):
    """Catches: an output from elsewhere whose folder or tar is a link to files of this machine."""
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "out.parquet")
    touch(tmp_path, *(f"secret/{record['key']}.jpg" for record in RECORDS))
    folder = tmp_path / "out"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "00000.parquet")
    (folder / "00000").symlink_to(tmp_path / "secret")
    assert [row.failure for row in listed(folder)] == [
        "file_missing",
        "not_found",
        "file_missing",
        "too_small",
    ]
    (folder / "00000.tar").symlink_to(write_tar(tmp_path / "secret.tar", [("000000001.jpg", b"x")]))
    assert listed(folder, "img2dataset")[0].failure == "file_missing"
    with refused(folder / "00000.tar", "link"):
        listed(folder)
