"""Would catch: a picture or a text of a folder that vanishes, a split unseen."""

from __future__ import annotations

import json
import os
import unicodedata

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.formats.sources import found, listed, picture, touch
from tests.refusals import refused


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
    rows = listed(tmp_path, caption_col=("text", "alt"), save_additional_columns=("n",))
    assert {row.key: row.captions for row in rows} == expected | {"a.jpg": ("first a", "alt a", "second a")}
    assert [row.extra["n"] for row in rows] == (["1", "2", "4", None] if suffix == "csv" else [1, 2, 4, None])
    # The table alone, named as the source: pictures it does not name are no rows.
    assert [row.key for row in listed(path)] == ["b.jpg", "a.jpg", "../out.jpg"]
    assert rows[0].license == "CC0"


@pytest.mark.parametrize(
    ("name", "content", "reading", "words"),
    [
        ("metadata.csv", "a,b\n1,2\n", {}, "--image-col"),
        ("metadata.csv", "file_name,b\n1,2\n", {"caption_col": ("c",)}, "--caption-col"),
        (
            "metadata.csv",
            "file_name,text\n1,2\n",
            {"save_additional_columns": ("c",)},
            "--save-additional-columns",
        ),
        ("metadata.jsonl", "[]\n", {}, "JSON object"),
        ("metadata.parquet", "PAR1", {}, "Parquet"),
    ],
)
def test_broken_metadata_is_named(tmp_path, name, content, reading, words):
    (tmp_path / name).write_text(content)
    with refused(tmp_path / name, words):
        listed(tmp_path, **reading)


def test_pictures_are_told_by_content_and_the_rest_is_counted(tmp_path):
    """Catches: a picture that vanishes for its name's ending; files left out that nobody hears of."""
    kinds = {
        "a.jfif": "JPEG",
        "b.jpe": "JPEG",
        "c.avif": "AVIF",
        "d.jp2": "JPEG2000",
        "e.ppm": "PPM",
        "f": "PNG",
        "g.dat": "WEBP",
    }
    for name, kind in kinds.items():
        (tmp_path / name).write_bytes(picture(kind))
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60)
    (tmp_path / "h.heic").write_bytes(heic)
    (tmp_path / "i.photo").write_bytes(heic)
    touch(
        tmp_path,
        "photo.1.jpg",
        "photo.2.jpg",
        "README.md",
        "list.csv",
        "LICENSE",
        "alone.txt",
        ".hidden/x.jpg",
        ".y.jpg",
    )
    os.mkfifo(tmp_path / "pipe")
    rows, left_out = found(tmp_path)
    assert [row.key for row in rows] == [*kinds, "h.heic", "i.photo", "photo.1.jpg", "photo.2.jpg"]
    assert left_out == {
        ".md": 1, ".csv": 1, "other files": 1, ".txt": 1, "hidden": 2, "unreadable files": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("a.jpg", "a.txt"),
        ("a.jpg", "a.TXT"),
        ("a.jpg", "a.jpg.txt"),
        ("photo.1.jpg", "photo.1.txt"),
        ("f", "f.txt"),
        (unicodedata.normalize("NFC", "é.jpg"), unicodedata.normalize("NFD", "é.txt")),
        (unicodedata.normalize("NFD", "é.jpg"), unicodedata.normalize("NFC", "é.txt")),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_text_beside_a_picture_is_found(tmp_path, name, beside, encoding):
    (tmp_path / name).write_bytes(picture())
    (tmp_path / beside).write_bytes("ein Küken\nzwei\n".encode(encoding))
    rows, left_out = found(tmp_path)
    assert [(row.key, row.captions) for row in rows] == [(name, ("ein Küken", "zwei"))]
    assert not left_out


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        ("train", "train"),
        ("validation", "val"),
        ("test", "test"),
        ("val", "val"),
        ("dev", "val"),
        ("a/train2017", "train"),
        ("odd", None),
    ],
)
def test_metadata_of_each_folder_as_imagefolder_has_it(tmp_path, folder, split):
    touch(tmp_path, f"{folder}/sub/0.jpg", f"{folder}/1.jpg")
    (tmp_path / folder / "metadata.csv").write_text("file_name,text\nsub/0.jpg,zero\n1.jpg,one\n")
    rows, left_out = found(tmp_path)
    assert [(row.key, row.captions, row.split) for row in rows] == [
        (f"{folder}/sub/0.jpg", ("zero",), split),
        (f"{folder}/1.jpg", ("one",), split),
    ]
    assert [row.file for row in rows] == [tmp_path / row.key for row in rows]
    assert not left_out


@pytest.mark.parametrize("said", ["NFC", "NFD"])
@pytest.mark.parametrize("stored", ["NFC", "NFD"])
def test_a_name_is_found_however_its_accents_are_spelled(tmp_path, said, stored):
    """Catches: metadata of a Linux machine about files of a Mac, whose text is lost."""
    (tmp_path / unicodedata.normalize(stored, "Ångström.jpg")).write_bytes(picture())
    name = unicodedata.normalize(said, "Ångström.jpg")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},a unit\n{name},again\n")
    (row,) = listed(tmp_path)
    assert (row.key, row.captions) == (name, ("a unit", "again"))
    assert row.file.is_file()


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    """Catches: a folder from elsewhere whose links bring in a file of this machine."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "s.jpg").write_bytes(picture())
    folder = tmp_path / "folder"
    touch(folder, "sub/real.jpg")
    (folder / "inside.jpg").symlink_to("sub/real.jpg")
    (folder / "out.jpg").symlink_to(secret / "s.jpg")
    (folder / "out").symlink_to(secret / "s.jpg")
    (folder / "up").symlink_to(secret)
    (folder / "sub/metadata.csv").write_text(
        "file_name,text\n../../secret/s.jpg,a\n../up/s.jpg,b\nreal.jpg,c\n"
    )
    rows, left_out = found(folder)
    assert {row.key: (row.captions, row.failure) for row in rows} == {
        "sub/../../secret/s.jpg": (("a",), "file_missing"),
        "sub/../up/s.jpg": (("b",), "file_missing"),
        "sub/real.jpg": (("c",), None),
        "inside.jpg": ((), None),
        "out.jpg": ((), "file_missing"),
    }
    assert left_out == {"links out of the folder": 1, "links to folders": 1}
    (folder / "captions.csv").write_text("file_name,text\nup/s.jpg,a\n")
    assert [row.failure for row in listed(folder / "captions.csv")] == ["file_missing"]
    (folder / "images").symlink_to(secret)
    with refused(folder / "images", "link", "--images"):
        listed(folder / "captions.csv")


@pytest.mark.parametrize("ending", [".gz", ".zst", ".bz2"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_compressed_metadata(tmp_path, ending, encoding):
    touch(tmp_path, "a.jpg")
    codec = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}[ending]
    contents = {"csv": "file_name,text\na.jpg,ü\n", "jsonl": '{"file_name": "a.jpg", "text": "ü"}\n'}
    for form, content in contents.items():
        path = tmp_path / f"metadata.{form}{ending}"
        with pa.CompressedOutputStream(pa.OSFile(str(path), "wb"), codec) as stream:
            stream.write(content.encode(encoding))
        rows, left_out = found(tmp_path)
        assert [(row.key, row.captions) for row in rows] == [("a.jpg", ("ü",))]
        assert not left_out
        path.unlink()


def test_a_line_that_cannot_be_read_takes_no_other_along(tmp_path):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.jpg", "text": "a"}\n{\n{"file_name": "b.jpg", "text": "b"}\n'
    )
    rows = listed(tmp_path)
    assert [(row.key, row.captions, row.failure) for row in rows] == [
        ("a.jpg", ("a",), None),
        ("#1", (), "decode_error"),
        ("b.jpg", ("b",), None),
    ]
    assert "metadata.jsonl" in rows[1].message
    assert "is not JSON" in rows[1].message


def test_two_metadata_files_of_one_folder_are_named(tmp_path):
    touch(tmp_path, "sub/a.jpg")
    for name in ("metadata.csv", "metadata.jsonl.gz"):
        (tmp_path / "sub" / name).write_text("file_name,text\na.jpg,a\n")
    with refused(tmp_path / "sub", "metadata.csv", "metadata.jsonl.gz"):
        listed(tmp_path)


def test_a_name_that_is_no_utf8_is_a_row(tmp_path):
    for name in (b"\xff.jpg", b"\xfe.jpg"):
        (tmp_path / os.fsdecode(name)).write_bytes(picture())
    assert [(row.key, row.failure) for row in listed(tmp_path)] == [
        ("\ufffd.jpg", None),
        ("\ufffd.jpg#2", None),
    ]
