"""Would catch: a picture or a text of a folder that vanishes, a split unseen."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capfilt.errors import UserError
from tests.formats.sources import listed, touch


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


@pytest.mark.parametrize(
    ("name", "content", "reading", "words"),
    [
        ("metadata.csv", "a,b\n1,2\n", {}, "--image-col"),
        ("metadata.csv", "file_name,b\n1,2\n", {"caption_cols": ("c",)}, "--caption-col"),
        ("metadata.csv", "file_name,text\n1,2\n", {"extra": ("c",)}, "--save-additional-columns"),
        ("metadata.jsonl", "[]\n", {}, "is not a JSON object"),
        ("metadata.parquet", "PAR1", {}, "is not a Parquet file"),
    ],
)
def test_broken_metadata_is_named(tmp_path, name, content, reading, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        listed(tmp_path, **reading)
    assert str(tmp_path / name) in str(caught.value)
